"""Groups of rollouts spread over data-parallel ranks: scores, rewards and ids travel, S numbers each."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from ..transfer import to_device


class Gathered(NamedTuple):
    """Of all ranks, in rank order; of this rank those from `start` to `stop`."""

    scores: Tensor
    rewards: Tensor
    counts: Tensor | None
    groups: Tensor | None
    start: int
    stop: int


def gather(
    scores: Tensor, rewards: Tensor, counts: Tensor | None, groups: Tensor | None, group: ProcessGroup
) -> Gathered:
    """The rollouts of every rank, on the device of the scores, the same bits on every rank.

    Two collectives. The host waits for the first, the ranks' numbers of rollouts, which may differ.
    """
    device = scores.device
    number = torch.tensor([scores.shape[0], counts is not None, groups is not None], device=device)
    numbers = [torch.empty_like(number) for _ in range(group.size())]
    dist.all_gather(numbers, number, group=group)
    sizes, with_counts, with_ids = torch.stack(numbers).T.tolist()
    if len(set(with_ids)) > 1 or len(set(with_counts)) > 1:
        raise ValueError("groups must be prompt ids on all ranks of parallel.data or an int on all, got both")
    most, rank = max(sizes), group.rank()

    # One buffer of 64 bits a number: floating point goes as its bits in fp64, which has those of every narrower type.
    columns = [_bits(scores), _bits(rewards), *(_bits(x) for x in (counts, groups) if x is not None)]
    packed = torch.zeros(len(columns), most, dtype=torch.int64, device=device)
    for row, column in zip(packed, columns, strict=True):
        row[: sizes[rank]] = to_device(column, device)
    of_all_ranks = [torch.empty_like(packed) for _ in range(group.size())]
    dist.all_gather(of_all_ranks, packed, group=group)
    joined = torch.cat([part[:, :size] for part, size in zip(of_all_ranks, sizes, strict=True)], dim=1)
    like = [scores, rewards, *(x for x in (counts, groups) if x is not None)]
    values = iter([_from_bits(x, of.dtype) for x, of in zip(joined.unbind(), like, strict=True)])
    start = sum(sizes[:rank])
    return Gathered(
        next(values), next(values), None if counts is None else next(values), None if groups is None else next(values),
        start, start + sizes[rank],
    )  # fmt: skip


def _bits(x: Tensor) -> Tensor:
    return x.detach().double().view(torch.int64) if x.is_floating_point() else x.detach().long()


def _from_bits(x: Tensor, dtype: torch.dtype) -> Tensor:
    return (x.view(torch.float64) if dtype.is_floating_point else x).to(dtype, copy=True)
