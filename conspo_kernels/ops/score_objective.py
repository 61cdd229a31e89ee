"""Any objective on scores, in PyTorch: one pure function gives value and gradient, as `objective.group_infonce` does.

No op is registered: the function calls PyTorch's own ops, which torch.compile sees.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..objective import ContrastSettings, GroupLoss, Rollouts, ScoreObjective, Segments, evaluate
from ..transfer import to_device
from .derivative import without_derivative
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
        return without_derivative(score_gradient(grad_loss, *ctx.saved_tensors)), None, None, None


def score_objective(objective: ScoreObjective, rollouts: Rollouts, settings: ContrastSettings) -> GroupLoss:
    """Loss, weights and roles: as `objective.evaluate`, the loss with a graph. The settings' tau and margin are unused.

    What lies on another device than the scores is brought there, without waiting.
    """
    scores, rewards, counts, segments, _size = rollouts
    assert segments is not None
    local = Segments(*(to_device(x, scores.device) for x in segments))
    rewards = to_device(rewards, scores.device)
    with torch.no_grad():
        local_rollouts = Rollouts(scores, rewards, counts, local, 0)
        result = evaluate(objective, local_rollouts, settings)
    slots = local.slots if settings.reduction == "none" else None
    loss: Tensor = _Attached.apply(scores, result.loss, result.weights, slots)
    return result._replace(loss=loss)
