"""conspo::group_infonce: the objective of `objective.py` and its gradient from scores, rewards and groups."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends.registry import backend_for
from ..objective import ContrastSettings, GroupLoss, Rollouts, Segments, equal_segments
from ..values import check_factor, check_margin
from .devices import to_device
from .registration import op


def _fake(it: Any) -> tuple[Tensor, Tensor, Tensor]:
    num_slots = it.scores.shape[0] // it.group_size if it.offsets is None else it.offsets.shape[0] - 1
    loss = it.scores.new_empty((num_slots,) if it.reduction == "none" else ())
    return loss, torch.empty_like(it.scores), torch.empty_like(it.scores, dtype=torch.int8)


def _save(ctx: Any, it: Any, output: tuple[Tensor, ...]) -> None:
    _loss, weights, roles = output
    ctx.save_for_backward(weights, slots_of_losses(it.reduction, it.slots, it.group_size, weights))
    ctx.mark_non_differentiable(weights, roles)
    ctx.set_materialize_grads(False)


def slots_of_losses(reduction: str, slots: Tensor | None, group_size: int, weights: Tensor) -> Tensor | None:
    """[S], the loss that each rollout has a part in; None where all are one."""
    if reduction != "none":
        return None
    return equal_segments(weights.shape[0], group_size, weights.device).slots if slots is None else slots


def score_gradient(grad_loss: Tensor, weights: Tensor, slots: Tensor | None) -> Tensor:
    """The gradient of scores [S]; slots: of losses that are not reduced, which group each rollout is in."""
    if slots is not None:
        grad_loss = grad_loss[to_device(slots, grad_loss.device)]
    # A weight of zero takes no part: an infinite or NaN incoming gradient of another group must not reach it as NaN.
    return torch.where(weights == 0, 0.0, weights * grad_loss)


def _backward(ctx: Any, grad_loss: Tensor | None, *_: object) -> dict[str, Tensor | None]:
    return {} if grad_loss is None else {"scores": score_gradient(grad_loss, *ctx.saved_tensors)}


@op(_fake, save=_save, backward=_backward)
def group_infonce(
    scores: Tensor,
    rewards: Tensor,
    counts: Tensor | None,
    order: Tensor | None,
    offsets: Tensor | None,
    slots: Tensor | None,
    group_size: int,
    margin: Tensor,
    num_groups: Tensor | None,
    tau: float,
    reward_threshold: float,
    reduction: str,
    implementation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, weights and roles. What lies on another device than the scores (the CPU) is brought there, without waiting.

    Args:
        scores: [S] fp32 or fp64.
        rewards: [S], NaN = unscorable.
        counts: [S] response tokens, 0 = unscorable; None: a NaN score is unscorable.
        order, offsets, slots: `Segments` of ragged groups, or None each: groups of `group_size` consecutive rollouts.
        margin: 0-d.
        num_groups: 0-d denominator of "mean", or None: the number of valid groups.
        tau, reward_threshold, reduction, implementation: as `conspo_loss`.

    Returns:
        loss: 0-d, or the K losses of the slots for "none"; dtype of the scores.
        weights: [S] dloss/dscores (for "none" of the rollout's own group).
        roles: [S] int8, of `objective.Role`.
    """
    groups = RolloutGroups(rewards, order, offsets, slots, group_size)
    return score_groups(scores, counts, groups, margin, num_groups, tau, reward_threshold, reduction, implementation)


class RolloutGroups(NamedTuple):
    """Rewards and groups of rollouts [S] as the ops take them: on the device of the scores or on the CPU."""

    rewards: Tensor
    order: Tensor | None
    offsets: Tensor | None
    slots: Tensor | None
    size: int

    def segments(self, device: torch.device) -> Segments | None:
        """The segments of ragged groups on a device, brought there in one copy; None for equal groups."""
        if self.order is None or self.offsets is None or self.slots is None:
            return None
        parts = (self.order, self.offsets, self.slots)
        if self.order.device == device:
            return Segments(*parts)
        order, offsets, slots = to_device(torch.cat(parts), device).split([len(part) for part in parts])
        return Segments(order, offsets, slots)


def score_groups(
    scores: Tensor,
    counts: Tensor | None,
    groups: RolloutGroups,
    margin: Tensor,
    num_groups: Tensor | None,
    tau: float,
    reward_threshold: float,
    reduction: str,
    implementation: str,
) -> GroupLoss:
    """The objective by the kernels of a backend. Numbers on the CPU stay there: a kernel takes them as they are."""
    device, dtype = scores.device, scores.dtype
    if margin.device.type == "cpu":
        check_margin(margin.item())
    if num_groups is not None and num_groups.device.type == "cpu":
        check_factor("num_groups", num_groups.item())
    margin, num_groups = margin.to(dtype), None if num_groups is None else num_groups.to(dtype)
    rewards = to_device(groups.rewards, device).contiguous()
    return backend_for(implementation, device).group_infonce.forward(
        Rollouts(scores.contiguous(), rewards, counts, groups.segments(device), groups.size),
        ContrastSettings(tau, margin, reward_threshold, reduction, num_groups),
    )
