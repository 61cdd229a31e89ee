"""Communication between ranks: token statistics, sums over tokens, rollouts of groups; ops where torch.compile traces.

An op takes a process group by its name, so that torch.compile can trace it; "" is no group.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.distributed_c10d import _resolve_process_group  # type: ignore[attr-defined]

from ..values import IGNORED, Statistics
from .devices import to_device
from .registration import op, saved_tensors

# Sums of exponentials that are one, rounded: parts of one vocabulary may agree so in one row of 10^5, but not in four.
SAME, TELLING_ROWS = 1e-5, 4
NOT_FLAT = 0.999  # sum of exp(logit - max) over the size of the vocabulary, below which logits differ


def name_of(group: ProcessGroup | None) -> str:
    return "" if group is None else group.group_name


def resolved(name: str) -> ProcessGroup:
    return _resolve_process_group(name)  # type: ignore[arg-type]


def statistics_over_ranks(
    part: Statistics, labels: Tensor, local: Tensor, start: int, size: int, scale: float, group: str
) -> Statistics:
    """Statistics of rows whose logits are split over the ranks of a group, from those of this rank's part.

    labels: of whole rows.  local: in this part, or ELSEWHERE.
    """
    ignored = labels == IGNORED
    ranks = resolved(group)
    whole, owners, alike = _whole_statistics(part, local >= 0, ignored, size, scale, ranks)
    if labels.device.type == "cpu" and alike:
        raise ValueError(
            f"the {ranks.size()} ranks of parallel.vocab must have their own parts of the vocabulary, got the same "
            "logits on all: logits that were gathered, or a whole weight, need parallel.vocab=None"
        )
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
    return whole


def _whole_statistics(
    part: Statistics, mine: Tensor, ignored: Tensor, size: int, scale: float, group: ProcessGroup
) -> tuple[Statistics, Tensor, Tensor]:
    """Those of whole rows, from those of this rank's part of the vocabulary. Two collectives.

    scale: of `LogitTransform`, turns a max into a logit.  mine: [..] bool, the label is in this part (else its
    log-probability means nothing).  ignored: [..] bool, no token.  size: of this part.
    Also returns how many ranks have the label (0: it is outside of the vocabulary, 2: their parts overlap) and whether
    all ranks have the same logits (`_alike`). logprobs are NaN if they have, and where not exactly one has the label.
    """
    logprobs, entropy, part_max, part_log_sum = part
    row_max = part_max.clone()
    dist.all_reduce(row_max, dist.ReduceOp.MAX, group=group)
    below = torch.where(part_max == row_max, 0.0, part_max - row_max) * scale  # -inf - -inf is no distance
    total = own_total = torch.exp(below + part_log_sum)
    # Where all of a part is -inf its label is too, and its log-probability within the part is none.
    label = torch.where(part_max == -torch.inf, part_max, logprobs + part_log_sum + below)
    label = torch.where(mine, label, 0.0)
    sums = [total, label, mine.to(total.dtype)]
    if entropy is not None:
        mean = part_log_sum - entropy + below  # of logits - row_max, over this part's distribution
        sums.append(torch.where(total > 0, total * mean, 0.0))
    stacked = torch.stack(sums)
    dist.all_reduce(stacked, group=group)
    total, label, owners, *moments = stacked.unbind()
    log_sum = total.log()
    entropy = torch.where(ignored, 0.0, log_sum - moments[0] / total) if moments else None
    alike = _alike(part_max == row_max, own_total, total, ~ignored & (own_total < NOT_FLAT * size), group.size())
    logprobs = torch.where((owners == 1) & ~alike, label - log_sum, torch.nan)
    return Statistics(torch.where(ignored, 0.0, logprobs), entropy, row_max, log_sum), owners, alike


def _alike(same_max: Tensor, own_total: Tensor, total: Tensor, telling: Tensor, number: int) -> Tensor:
    """0-d bool: in every row that tells, maximum and sum are the same on all ranks.

    Then the logits are, and no parts of one vocabulary. It costs no collective; where they are the same, every rank
    comes to the same answer. telling: [..] bool; rows of equal logits, as a new head makes them, are alike in truth.
    """
    same = same_max & ((total - number * own_total).abs() <= SAME * total)
    return (same | ~telling).all() & (telling.sum() >= TELLING_ROWS) & (number > 1)


@op(lambda it: torch.empty_like(it.x))
def sum_over_ranks(x: Tensor, group: str) -> Tensor:
    """The sum over the ranks of a group."""
    total = x.clone()
    dist.all_reduce(total, group=resolved(group))
    return total


def _save_scores(ctx: Any, it: Any, output: tuple[Tensor, Tensor]) -> None:
    ctx.factor = it.factor
    ctx.save_for_backward(it.counts, output[1])
    ctx.mark_non_differentiable(output[1])


def _backward_scores(ctx: Any, grad_scores: Tensor, _grad_counts: object) -> dict[str, Tensor | None]:
    local, whole = saved_tensors(ctx)
    share = local.to(grad_scores.dtype) / whole.clamp(min=1)
    return {"scores": torch.where(local > 0, grad_scores * share * ctx.factor, 0.0)}


@op(lambda it: (torch.empty_like(it.scores), torch.empty_like(it.counts)), save=_save_scores, backward=_backward_scores)
def whole_scores(scores: Tensor, counts: Tensor, group: str, factor: float) -> tuple[Tensor, Tensor]:
    """Scores and counts [S] of rollouts whose tokens are spread over the ranks of a group, from those of this rank.

    One collective.  factor: of the gradient; the number of ranks where the trainer takes the mean of theirs.
    """
    del factor
    sums = torch.where(counts > 0, scores.double() * counts, 0.0)
    both = torch.stack([sums, counts.double()])
    dist.all_reduce(both, group=resolved(group))
    total, number = both.unbind()
    return (total / number).to(scores.dtype), number.to(counts.dtype)  # 0/0: NaN, a rollout without response tokens


def _fake_gather(it: Any) -> tuple[Tensor, ...]:
    number, device = torch.library.get_ctx().new_dynamic_size(), it.scores.device

    def like(x: Tensor | None) -> Tensor:
        if x is None:
            return torch.empty(0, dtype=torch.int64, device=device)
        return torch.empty(number, dtype=x.dtype, device=device)

    indices = torch.empty(it.scores.shape, dtype=torch.int64, device=device)
    return like(it.scores), like(it.rewards), like(it.counts), like(it.ids), indices


def _save_gather(ctx: Any, it: Any, output: tuple[Tensor, ...]) -> None:
    *others, indices = output
    ctx.factor = it.factor
    ctx.save_for_backward(indices)
    ctx.mark_non_differentiable(*others[1:], indices)


def _backward_gather(ctx: Any, grad_scores: Tensor, *_: object) -> dict[str, Tensor | None]:
    (indices,) = saved_tensors(ctx)
    return {"scores": grad_scores.index_select(0, indices) * ctx.factor}


@op(_fake_gather, save=_save_gather, backward=_backward_gather)
def gather_rollouts(
    scores: Tensor,
    rewards: Tensor,
    counts: Tensor | None,
    ids: Tensor | None,
    group_size: int,
    group: str,
    factor: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """scores, rewards, counts and ids of all ranks in rank order (the last two empty if None), on the device of the
    scores, the same bits on every rank; and the indices of this rank's rollouts among them.

    Two collectives. The host waits for the first, the ranks' numbers of rollouts, which may differ.

    group_size: that divides the number of all rollouts; 0 with ids.  factor: of the gradient, as in `whole_scores`.
    """
    del factor
    device, ranks = scores.device, resolved(group)
    number = torch.tensor([scores.shape[0], counts is not None, ids is not None], device=device)
    numbers = [torch.empty_like(number) for _ in range(ranks.size())]
    dist.all_gather(numbers, number, group=ranks)
    sizes, with_counts, with_ids = torch.stack(numbers).T.tolist()
    if len(set(with_ids)) > 1 or len(set(with_counts)) > 1:
        raise ValueError("groups must be prompt ids on all ranks of parallel.data or an int on all, got both")
    if group_size > 0 and sum(sizes) % group_size != 0:
        raise ValueError(
            f"groups={group_size} rollouts per prompt must divide the number of rollouts, got {sum(sizes)}"
        )

    # One buffer of 64 bits a number: floating point goes as its bits in fp64, which has those of every narrower type.
    columns = [x for x in (scores, rewards, counts, ids) if x is not None]
    packed = torch.zeros(len(columns), max(sizes), dtype=torch.int64, device=device)
    rank = ranks.rank()
    for row, column in zip(packed, columns, strict=True):
        row[: sizes[rank]] = to_device(_bits(column), device)
    of_all_ranks = [torch.empty_like(packed) for _ in sizes]
    dist.all_gather(of_all_ranks, packed, group=ranks)
    joined = torch.cat([part[:, :size] for part, size in zip(of_all_ranks, sizes, strict=True)], dim=1)
    gathered = iter([_from_bits(x, like.dtype) for x, like in zip(joined.unbind(), columns, strict=True)])

    def of_all(x: Tensor | None) -> Tensor:
        return torch.empty(0, dtype=torch.int64, device=device) if x is None else next(gathered)

    start = sum(sizes[:rank])
    indices = torch.arange(start, start + sizes[rank], device=device)
    return of_all(scores), of_all(rewards), of_all(counts), of_all(ids), indices


def _bits(x: Tensor) -> Tensor:
    return x.detach().double().view(torch.int64) if x.is_floating_point() else x.detach().long()


def _from_bits(x: Tensor, dtype: torch.dtype) -> Tensor:
    return (x.view(torch.float64) if dtype.is_floating_point else x).to(dtype, copy=True)
