"""Rollouts cut across sequence-parallel ranks: sums of log-probabilities and counts travel, S numbers each."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


def whole_scores(scores: Tensor, counts: Tensor, group: ProcessGroup) -> tuple[Tensor, Tensor]:
    """Scores [S] and counts [S] of whole rollouts, from those of the tokens that this rank has. One collective."""
    sums = torch.where(counts > 0, scores.double() * counts, 0.0)
    both = torch.stack([sums, counts.double()])
    dist.all_reduce(both, group=group)
    total, number = both.unbind()
    return (total / number).to(scores.dtype), number.to(counts.dtype)  # 0/0: NaN, a rollout without response tokens
