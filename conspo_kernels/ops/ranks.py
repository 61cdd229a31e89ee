"""Collectives as ops. An op takes a process group by its name, so that torch.compile can trace it; "" is no group."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.distributed_c10d import _resolve_process_group  # type: ignore[attr-defined]

from ..distributed import context, groups, vocab
from ..registration import op
from ..values import ELSEWHERE, IGNORED, Statistics


def name_of(group: ProcessGroup | None) -> str:
    return "" if group is None else group.group_name


def resolved(name: str) -> ProcessGroup:
    return _resolve_process_group(name)  # type: ignore[arg-type]


def local_labels(labels: Tensor, start: int, size: int) -> Tensor:
    """Labels relative to a part of the vocabulary: ELSEWHERE if in another part."""
    inside = (labels >= start) & (labels < start + size)
    return torch.where(labels == IGNORED, IGNORED, torch.where(inside, labels - start, ELSEWHERE))


def statistics_over_ranks(
    forward: Callable[[Tensor], Statistics], labels: Tensor, start: int, size: int, scale: float, group: str
) -> Statistics:
    """Statistics of rows whose logits are spread over the ranks of a group.

    forward: those of this rank's part, from labels in it.
    """
    local = local_labels(labels, start, size)
    part = forward(torch.where(local == ELSEWHERE, 0, local))
    ignored = labels == IGNORED
    whole, owners = vocab.whole_statistics(part, local >= 0, ignored, scale, resolved(group))
    if labels.device.type == "cpu" and (bad := ~ignored & (owners != 1)).any():
        position = tuple(bad.nonzero()[0].tolist())
        if owners[position] > 1:
            raise ValueError(
                f"the parts of parallel.vocab must not overlap: {owners[position].item():.0f} ranks have the label "
                f"{labels[position].item()}, this one's entries from {start} to {start + size - 1}"
            )
        raise ValueError(
            "labels must lie in the vocabulary of all ranks or equal ignore_index; "
            f"got {labels[position].item()} at token {position}"
        )
    return Statistics(*whole)


def _fake_sum(x: Tensor, *_: object) -> Tensor:
    return torch.empty_like(x)


@op(_fake_sum)
def sum_over_ranks(x: Tensor, group: str) -> Tensor:
    """The sum over the ranks of a group."""
    total = x.clone()
    torch.distributed.all_reduce(total, group=resolved(group))
    return total


def _fake_scores(scores: Tensor, counts: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return torch.empty_like(scores), torch.empty_like(counts)


def _setup_scores(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _scores, counts, _group, ctx.factor = inputs
    ctx.save_for_backward(counts, output[1])
    ctx.mark_non_differentiable(output[1])


def _backward_scores(ctx: Any, grad_scores: Tensor, _grad_counts: object) -> tuple[Any, ...]:
    local, whole = ctx.saved_tensors
    share = local.to(grad_scores.dtype) / whole.clamp(min=1)
    return torch.where(local > 0, grad_scores * share * ctx.factor, 0.0), None, None, None


@op(_fake_scores, setup_context=_setup_scores, backward=_backward_scores)
def whole_scores(scores: Tensor, counts: Tensor, group: str, factor: float) -> tuple[Tensor, Tensor]:
    """Scores and counts [S] of rollouts whose tokens are spread over the ranks of a group, from those of this rank.

    factor: of the gradient; the number of ranks where the trainer takes the mean of theirs.
    """
    del factor
    return context.whole_scores(scores, counts, resolved(group))


def _fake_gather(
    scores: Tensor, rewards: Tensor, counts: Tensor | None, ids: Tensor | None, *_: object
) -> tuple[Tensor, ...]:
    number = torch.library.get_ctx().new_dynamic_size()
    device = scores.device

    def like(x: Tensor | None) -> Tensor:
        if x is None:
            return torch.empty(0, dtype=torch.int64, device=device)
        return torch.empty(number, dtype=x.dtype, device=device)

    places = torch.empty(scores.shape, dtype=torch.int64, device=device)
    return like(scores), like(rewards), like(counts), like(ids), places


def _setup_gather(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.factor = inputs[5]
    ctx.save_for_backward(output[4])
    ctx.mark_non_differentiable(*output[1:])


def _backward_gather(ctx: Any, grad_scores: Tensor, *_: object) -> tuple[Any, ...]:
    (places,) = ctx.saved_tensors
    return grad_scores.index_select(0, places) * ctx.factor, None, None, None, None, None


@op(_fake_gather, setup_context=_setup_gather, backward=_backward_gather)
def gather_rollouts(
    scores: Tensor, rewards: Tensor, counts: Tensor | None, ids: Tensor | None, group: str, factor: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """scores, rewards, counts and ids of all ranks in rank order (the last two empty if None), and the indices
    of this rank's rollouts among them.

    The host waits once, for the numbers of rollouts.  factor: of the gradient, as in `whole_scores`.
    """
    del factor
    gathered = groups.gather(scores, rewards, counts, ids, resolved(group))
    absent = [torch.empty(0, dtype=torch.int64, device=scores.device) for _ in range(2)]
    places = torch.arange(gathered.start, gathered.stop, device=scores.device)
    return (
        gathered.scores, gathered.rewards, absent[0] if gathered.counts is None else gathered.counts,
        absent[1] if gathered.groups is None else gathered.groups, places,
    )  # fmt: skip
