"""Group InfoNCE on scores, loss and weights: PyTorch. The equations are `objective.py`'s."""

from __future__ import annotations

from ...objective import ContrastSettings, GroupLoss, Rollouts, evaluate


def forward(rollouts: Rollouts, settings: ContrastSettings) -> GroupLoss:
    """Loss, weights and roles of scores [S]."""
    return evaluate(rollouts, settings)
