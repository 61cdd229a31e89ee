"""conspo::sequence_infonce: `sequence_score` and `group_infonce` in one op, where all is on one rank.

Its backward is one launch: the incoming scalar is multiplied where the weights of rollouts are spread over tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..backends.registry import backend_for
from ..objective import equal_segments
from .group_infonce import RolloutGroups, score_gradient, score_groups
from .registration import device_guard, op, without_derivative
from .sequence_score import sequence_score_backward


def _fake(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    logprobs, labels, offsets, _rewards, _counts, _order, group_offsets, _slots, group_size, *_, reduction, _ = args
    num_rollouts = labels.shape[0] if offsets is None else offsets.shape[0] - 1
    num_slots = num_rollouts // group_size if group_offsets is None else group_offsets.shape[0] - 1
    new = logprobs.new_empty
    return (
        new((num_slots,) if reduction == "none" else ()), new(num_rollouts), new(num_rollouts, dtype=torch.int32),
        new(num_rollouts), new(num_rollouts, dtype=torch.int8),
    )  # fmt: skip


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    (
        _logprobs,
        labels,
        offsets,
        _rewards,
        _counts,
        _order,
        _offsets,
        slots,
        group_size,
        *_,
        reduction,
        implementation,
    ) = inputs
    ctx.implementation = implementation
    _loss, scores, counts, weights, roles = output
    if reduction == "none" and slots is None:
        slots = equal_segments(scores.shape[0], group_size, scores.device).slots
    ctx.save_for_backward(labels, offsets, counts, weights, slots if reduction == "none" else None)
    ctx.mark_non_differentiable(scores, counts, weights, roles)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_loss: Tensor | None, *_: object) -> tuple[Any, ...]:
    others = (None,) * 14
    if grad_loss is None:
        return None, *others
    labels, offsets, counts, weights, slots = ctx.saved_tensors
    factor: Tensor | None = grad_loss
    if slots is not None:
        weights, factor = score_gradient(grad_loss, weights, slots), None
    gradient = sequence_score_backward(weights, counts, labels, offsets, ctx.implementation, factor)
    return without_derivative(gradient), *others


@op(_fake, setup_context=_setup_context, backward=_backward)
def sequence_infonce(
    logprobs: Tensor,
    labels: Tensor,
    offsets: Tensor | None,
    rewards: Tensor,
    counts: Tensor | None,
    order: Tensor | None,
    group_offsets: Tensor | None,
    slots: Tensor | None,
    group_size: int,
    margin: Tensor,
    num_groups: Tensor | None,
    tau: float,
    reward_threshold: float,
    reduction: str,
    implementation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss, and of rollouts their scores, counts, weights and roles: only the loss has a graph.

    Args:
        logprobs, labels, offsets: as of `sequence_score`.
        counts: [S] response tokens of the objective, where they are not those with a label.
        Others: as of `group_infonce`.
    """
    with device_guard(logprobs):
        kernels = backend_for(implementation, logprobs.device).sequence_score
        scores, own_counts = kernels.forward(logprobs.contiguous(), labels.contiguous(), offsets)
    loss, weights, roles = score_groups(
        scores, own_counts if counts is None else counts,
        RolloutGroups(rewards, order, group_offsets, slots, group_size), margin, num_groups, tau, reward_threshold,
        reduction, implementation,
    )  # fmt: skip
    return loss, scores, own_counts, weights, roles
