"""Logits sharded over the vocabulary: the token statistics travel, a few numbers per token."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

Rows = tuple[Tensor, Tensor | None, Tensor, Tensor]  # logprobs, entropy or None, row_max, log_sum: `values.Statistics`


def whole_statistics(
    part: Rows, mine: Tensor, ignored: Tensor, scale: float, group: ProcessGroup
) -> tuple[Rows, Tensor]:
    """Those of whole rows, from those of this rank's part of the vocabulary. Two collectives.

    scale: what a max is multiplied by to be a logit, as in `LogitTransform`.  mine: [..] bool, the label is
    in this part (else its log-probability is of no meaning).  ignored: [..] bool, no token.
    Also returns how many ranks have the label: 0 if it is outside of the vocabulary, 2 if their parts overlap.
    """
    logprobs, entropy, part_max, part_log_sum = part
    row_max = part_max.clone()
    dist.all_reduce(row_max, dist.ReduceOp.MAX, group=group)
    below = torch.where(part_max == row_max, 0.0, part_max - row_max) * scale  # -inf - -inf is no distance
    total = torch.exp(below + part_log_sum)
    label = torch.where(mine, logprobs + part_log_sum + below, 0.0)
    sums = [total, label, mine.to(total.dtype)]
    if entropy is not None:
        mean = part_log_sum - entropy + below  # of logits - row_max, over this part's distribution
        sums.append(torch.where(total > 0, total * mean, 0.0))
    stacked = torch.stack(sums)
    dist.all_reduce(stacked, group=group)
    total, label, owners, *moments = stacked.unbind()
    log_sum = total.log()
    zero = torch.zeros_like(label)
    entropy = torch.where(ignored, zero, log_sum - moments[0] / total) if moments else None
    logprobs = torch.where(owners == 1, label - log_sum, torch.nan)
    return (torch.where(ignored, zero, logprobs), entropy, row_max, log_sum), owners
