"""Group InfoNCE on scores, loss and weights: PyTorch. The equations are `objective.py`'s."""

from __future__ import annotations

import functools

from ...objective import ContrastSettings, GroupLoss, Rollouts, evaluate, group_infonce


def forward(rollouts: Rollouts, settings: ContrastSettings) -> GroupLoss:
    """Loss, weights and roles of scores [S]."""
    objective = functools.partial(group_infonce, tau=settings.tau, margin=settings.margin)
    return evaluate(objective, rollouts, settings)
