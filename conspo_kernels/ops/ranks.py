"""What crosses ranks, as ops: process groups are named, so that torch.compile can trace them; "" is none."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.distributed_c10d import _resolve_process_group  # type: ignore[attr-defined]

from ..distributed import context, groups, vocab
from ..distributed.vocab import Statistics
from ..kernels.linear_tiles import ELSEWHERE, IGNORED

LocalForward = Callable[[Tensor, int], tuple[Tensor, Tensor | None, Tensor, Tensor]]


def name_of(group: ProcessGroup | None) -> str:
    return "" if group is None else group.group_name


def resolved(name: str) -> ProcessGroup:
    return _resolve_process_group(name)  # type: ignore[arg-type]


def gradient_factor(group: ProcessGroup | None, grad_reduction: str) -> float:
    """What a rank's gradient is multiplied by, so that the trainer's mean over the ranks is their sum."""
    return float(group.size()) if group is not None and grad_reduction == "mean" else 1.0


def labels_here(labels: Tensor, ignore_index: int, start: int, size: int) -> Tensor:
    """Labels relative to a part of the vocabulary: IGNORED where there is no token, ELSEWHERE in another part."""
    inside = (labels >= start) & (labels < start + size)
    return torch.where(labels == ignore_index, IGNORED, torch.where(inside, labels - start, ELSEWHERE))


def statistics_of_all(
    forward: LocalForward, labels: Tensor, ignore_index: int, start: int, size: int, scale: float, group: str
) -> Statistics:
    """Statistics of rows whose logits are spread over the ranks of a group.

    forward: those of this rank's part, from labels in it and the value that means "no token".
    """
    here = labels_here(labels, ignore_index, start, size)
    part = Statistics(*forward(torch.where(here == ELSEWHERE, 0, here), IGNORED))
    ignored = here == IGNORED
    whole, owners = vocab.whole_statistics(part, here >= 0, ignored, scale, resolved(group))
    if labels.device.type == "cpu" and (bad := ~ignored & (owners != 1)).any():
        position = tuple(bad.nonzero()[0].tolist())
        if owners[position] > 1:
            raise ValueError(
                f"the parts of vocab_parallel must not overlap: {owners[position].item():.0f} ranks have the label "
                f"{labels[position].item()}, this one's entries from {start} to {start + size - 1}"
            )
        raise ValueError(
            f"labels must lie in the vocabulary of all ranks or equal ignore_index ({ignore_index}); "
            f"found {labels[position].item()} at token {position}"
        )
    return whole


@torch.library.custom_op("conspo::sum_over_ranks", mutates_args=())
def sum_over_ranks(x: Tensor, group: str) -> Tensor:
    total = x.clone()
    torch.distributed.all_reduce(total, group=resolved(group))
    return total


@sum_over_ranks.register_fake
def _(x: Tensor, group: str) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("conspo::whole_scores", mutates_args=())
def whole_scores(scores: Tensor, counts: Tensor, group: str, factor: float) -> tuple[Tensor, Tensor]:
    """Scores and counts [S] of rollouts whose tokens are spread over the ranks of a group, from those of this rank.

    factor: of the gradient; the number of ranks where the trainer takes the mean of theirs.
    """
    del factor
    return context.whole_scores(scores, counts, resolved(group))


@whole_scores.register_fake
def _(scores: Tensor, counts: Tensor, group: str, factor: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(scores), torch.empty_like(counts)


def _setup_scores(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    _scores, counts, _group, ctx.factor = inputs
    ctx.save_for_backward(counts, output[1])
    ctx.mark_non_differentiable(output[1])


def _backward_scores(ctx, grad_scores, _grad_counts):  # type: ignore[no-untyped-def]
    here, whole = ctx.saved_tensors
    share = here.to(grad_scores.dtype) / whole.clamp(min=1)
    return torch.where(here > 0, grad_scores * share * ctx.factor, 0.0), None, None, None


whole_scores.register_autograd(_backward_scores, setup_context=_setup_scores)


@torch.library.custom_op("conspo::gather_rollouts", mutates_args=())
def gather_rollouts(
    scores: Tensor, rewards: Tensor, counts: Tensor | None, ids: Tensor | None, group: str, factor: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """scores, rewards, counts and ids of all ranks in rank order (the last two empty if None), and the places of ours.

    The host waits once, for the numbers of rollouts.  factor: of the gradient, as in `whole_scores`.
    """
    del factor
    found = groups.gather(scores, rewards, counts, ids, resolved(group))
    nothing = [torch.empty(0, dtype=torch.int64, device=scores.device) for _ in range(2)]
    places = torch.arange(found.start, found.stop, device=scores.device)
    return (
        found.scores, found.rewards, nothing[0] if found.counts is None else found.counts,
        nothing[1] if found.groups is None else found.groups, places,
    )  # fmt: skip


@gather_rollouts.register_fake
def _(
    scores: Tensor, rewards: Tensor, counts: Tensor | None, ids: Tensor | None, group: str, factor: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    number = torch.library.get_ctx().new_dynamic_size()
    device = scores.device

    def like(x: Tensor | None) -> Tensor:
        if x is None:
            return torch.empty(0, dtype=torch.int64, device=device)
        return torch.empty(number, dtype=x.dtype, device=device)

    places = torch.empty(scores.shape, dtype=torch.int64, device=device)
    return like(scores), like(rewards), like(counts), like(ids), places


def _setup_gather(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.factor = inputs[5]
    ctx.save_for_backward(output[4])
    ctx.mark_non_differentiable(*output[1:])


def _backward_gather(ctx, grad_scores, *_):  # type: ignore[no-untyped-def]
    (places,) = ctx.saved_tensors
    return grad_scores.index_select(0, places) * ctx.factor, None, None, None, None, None


gather_rollouts.register_autograd(_backward_gather, setup_context=_setup_gather)
