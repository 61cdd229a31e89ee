"""Group InfoNCE on scores, loss and weights: PyTorch. The equations are `objective.py`'s."""

from __future__ import annotations

import functools

from ...objective import equal_segments, evaluate, group_infonce
from ..contract import ContrastSettings, GroupLoss, Rollouts


def forward(rollouts: Rollouts, settings: ContrastSettings) -> GroupLoss:
    """Loss, weights and roles of scores [S]."""
    scores, segments = rollouts.scores, rollouts.segments
    if segments is None:
        segments = equal_segments(scores.numel(), rollouts.group_size, scores.device)
    objective = functools.partial(group_infonce, tau=settings.tau, margin=settings.margin)
    found = evaluate(
        objective, scores, rollouts.rewards, rollouts.counts, segments, settings.reward_threshold, settings.reduction,
        settings.num_groups,
    )  # fmt: skip
    return GroupLoss(*found)
