"""Group InfoNCE on scores, loss and weights: the PyTorch twin. The equations are `objective.py`'s."""

from __future__ import annotations

import torch
from torch import Tensor

from ..objective import Segments, equal_segments, group_infonce


def forward(
    scores: Tensor,
    rewards: Tensor,
    counts: Tensor | None,
    segments: Segments | None,
    group_size: int,
    margin: Tensor,
    num_groups: Tensor | None,
    tau: float,
    reward_threshold: float,
    reduction: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Scores [S] -> loss ([], or [K] for "none"), weights [S] and roles [S]: see `ops/group_infonce.py`."""
    scorable = ~rewards.isnan() & (scores == scores if counts is None else counts > 0)
    positive = scorable & (rewards > reward_threshold)
    negative = scorable & ~positive
    if segments is None:
        segments = equal_segments(scores.numel(), group_size, scores.device)
    terms = group_infonce(scores, positive, negative, segments, tau, margin)
    in_valid_group = terms.valid[segments.slots]
    sign = positive.to(torch.int8) - negative.to(torch.int8)
    roles = torch.where(in_valid_group, sign, 2 * sign)
    if reduction == "none":
        return terms.losses, terms.weights, roles

    denominator = scores.new_ones(())
    if reduction == "mean":
        denominator = terms.valid.sum().clamp(min=1) if num_groups is None else num_groups
    return terms.losses.sum() / denominator, terms.weights / denominator, roles
