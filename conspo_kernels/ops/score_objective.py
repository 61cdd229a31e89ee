"""Any objective on scores, as PyTorch runs it: value and gradient from one pure function, as `objective.py` has one.

No op is registered: what it calls is PyTorch's own, which torch.compile sees.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..objective import Evaluated, ScoreObjective, Segments, evaluate
from .group_infonce import score_gradient


class _Attached(torch.autograd.Function):
    """A loss whose gradient by the scores is known."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, loss: Tensor, weights: Tensor, slots: Tensor | None) -> Tensor:
        del scores
        ctx.save_for_backward(weights, slots)
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Any, ...]:
        return score_gradient(grad_loss, *ctx.saved_tensors), None, None, None


def score_objective(
    objective: ScoreObjective,
    scores: Tensor,
    rewards: Tensor,
    counts: Tensor | None,
    segments: Segments,
    reward_threshold: float,
    reduction: str,
    num_groups: Tensor | None,
) -> Evaluated:
    """Loss, weights and roles: as `objective.evaluate`, the loss with a graph."""
    device = scores.device
    local = Segments(*(x.to(device, non_blocking=True) for x in segments))
    rewards = rewards.to(device, non_blocking=True)
    with torch.no_grad():
        found = evaluate(objective, scores, rewards, counts, local, reward_threshold, reduction, num_groups)
    slots = local.slots if reduction == "none" else None
    loss: Tensor = _Attached.apply(scores, found.loss, found.weights, slots)
    return found._replace(loss=loss)
