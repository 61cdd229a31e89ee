"""conspo::group_infonce: the objective of `objective.py` and its gradient from scores, rewards and groups."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import check
from ..objective import Segments, equal_segments
from .implementation import twin


@torch.library.custom_op("conspo::group_infonce", mutates_args=())
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

    Returns:
        loss: 0-d, or the K losses of the slots for "none"; dtype of the scores.
        weights: [S] dloss/dscores (for "none" of the rollout's own group).
        roles: [S] int8; positive rollouts > 0, negative ones < 0, unscorable ones 0; 1 in a valid group, else 2.
    """
    device = scores.device

    def here(x: Tensor | None, dtype: torch.dtype | None = None) -> Tensor | None:
        return None if x is None else x.to(device, dtype or x.dtype, non_blocking=True)

    if margin.device.type == "cpu":
        check.margin_in_range(margin.item())
    if num_groups is not None and num_groups.device.type == "cpu":
        check.in_range("num_groups", num_groups.item())
    segments = None
    if order is not None:
        segments = Segments(here(order), here(offsets), here(slots))  # type: ignore[arg-type]
    with torch.cuda.device_of(scores):
        return twin("group_infonce", implementation, device).forward(
            scores.contiguous(), here(rewards).contiguous(), counts, segments, group_size, here(margin, scores.dtype),  # type: ignore[union-attr]
            here(num_groups, scores.dtype), tau, reward_threshold, reduction,
        )  # fmt: skip


@group_infonce.register_fake
def _(
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
    num_slots = scores.shape[0] // group_size if offsets is None else offsets.shape[0] - 1
    loss = scores.new_empty((num_slots,) if reduction == "none" else ())
    return loss, torch.empty_like(scores), torch.empty_like(scores, dtype=torch.int8)


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    scores, slots, group_size, reduction = inputs[0], inputs[5], inputs[6], inputs[11]
    _loss, weights, roles = output
    if reduction == "none" and slots is None:
        slots = equal_segments(scores.shape[0], group_size, scores.device).slots
    ctx.save_for_backward(weights, slots if reduction == "none" else None)
    ctx.mark_non_differentiable(weights, roles)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_loss, *_):  # type: ignore[no-untyped-def]
    if grad_loss is None:
        return (None,) * 13
    weights, slots = ctx.saved_tensors
    if slots is not None:
        grad_loss = grad_loss[slots.to(grad_loss.device, non_blocking=True)]
    # A weight of zero takes no part: an infinite or NaN incoming gradient of another group must not reach it as NaN.
    return torch.where(weights == 0, 0.0, weights * grad_loss), *(None,) * 12


group_infonce.register_autograd(_backward, setup_context=_setup_context)
