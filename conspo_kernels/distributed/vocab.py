"""Logits sharded over the vocabulary: the token statistics travel, a few numbers per token."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset


class VocabParallel(NamedTuple):
    """The ranks that share a vocabulary, and where this rank's part of it begins. Parts may differ in size."""

    group: ProcessGroup
    start: int

    @classmethod
    def of(cls, x: Tensor, dim: int) -> tuple[Tensor, VocabParallel]:
        """The local part of a DTensor that is sharded along `dim` and replicated otherwise, and its place."""
        assert isinstance(x, DTensor)
        sharded = [i for i, p in enumerate(x.placements) if isinstance(p, Shard) and p.dim % x.dim() == dim % x.dim()]
        others = [p for i, p in enumerate(x.placements) if i not in sharded and not p.is_replicate()]
        if len(sharded) != 1 or others:
            raise ValueError(
                f"a DTensor must be sharded along dimension {dim % x.dim()} over one mesh dimension and replicated "
                f"over the others, got placements {x.placements}"
            )
        size, total = x.device_mesh.size(sharded[0]), x.shape[dim]
        if -(-total // size) * (size - 1) >= total:  # the same on every rank, or the others would wait for the last
            raise ValueError(f"a vocabulary of {total} entries leaves ranks without any when it is sharded over {size}")
        _shape, offset = compute_local_shape_and_global_offset(x.shape, x.device_mesh, x.placements)
        return x.to_local(), cls(x.device_mesh.get_group(sharded[0]), offset[dim])


class Statistics(NamedTuple):
    """Of rows of logits: log-probability of the label, entropy or None, max, log-sum of exp(logits - max)."""

    logprobs: Tensor
    entropy: Tensor | None
    row_max: Tensor
    log_sum: Tensor


def whole_statistics(
    part: Statistics, mine: Tensor, ignored: Tensor, scale: float, group: ProcessGroup
) -> tuple[Statistics, Tensor]:
    """Those of whole rows, from those of this rank's part of the vocabulary. Two collectives.

    scale: what a max is multiplied by to be a logit, as in `LogitTransform`.  mine: [..] bool, the label is
    in this part (else `part.logprobs` is of no meaning).  ignored: [..] bool, no token.
    Also returns how many ranks have the label: 0 if it is outside of the vocabulary, 2 if their parts overlap.
    """
    row_max = part.row_max.clone()
    dist.all_reduce(row_max, dist.ReduceOp.MAX, group=group)
    below = torch.where(part.row_max == row_max, 0.0, part.row_max - row_max) * scale  # -inf - -inf is no distance
    total = torch.exp(below + part.log_sum)
    label = torch.where(mine, part.logprobs + part.log_sum + below, 0.0)
    sums = [total, label, mine.to(total.dtype)]
    if part.entropy is not None:
        mean = part.log_sum - part.entropy + below  # of logits - row_max, over this part's distribution
        sums.append(torch.where(total > 0, total * mean, 0.0))
    stacked = torch.stack(sums)
    dist.all_reduce(stacked, group=group)
    total, label, owners, *moments = stacked.unbind()
    log_sum = total.log()
    nothing = torch.zeros_like(label)
    entropy = torch.where(ignored, nothing, log_sum - moments[0] / total) if moments else None
    logprobs = torch.where(owners == 1, label - log_sum, torch.nan)
    return Statistics(torch.where(ignored, nothing, logprobs), entropy, row_max, log_sum), owners
