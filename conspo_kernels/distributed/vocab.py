"""Logits sharded over the vocabulary: the token statistics travel, a few numbers per token."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from ..values import Statistics


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
    zero = torch.zeros_like(label)
    entropy = torch.where(ignored, zero, log_sum - moments[0] / total) if moments else None
    logprobs = torch.where(owners == 1, label - log_sum, torch.nan)
    return Statistics(torch.where(ignored, zero, logprobs), entropy, row_max, log_sum), owners
