"""conspo::sequence_infonce: `sequence_score` and `group_infonce` in one op, where all is on one rank.

Its backward is one launch: the incoming scalar is multiplied where the weights of rollouts are spread over tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..backends.registry import backend_for
from .group_infonce import RolloutGroups, score_gradient, score_groups, slots_of_losses
from .registration import op
from .sequence_score import sequence_score_backward


def _fake(it: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    num_rollouts = it.labels.shape[0] if it.offsets is None else it.offsets.shape[0] - 1
    num_slots = num_rollouts // it.group_size if it.group_offsets is None else it.group_offsets.shape[0] - 1
    new = it.logprobs.new_empty
    scores, weights = new(num_rollouts), new(num_rollouts)
    counts, roles = new(num_rollouts, dtype=torch.int32), new(num_rollouts, dtype=torch.int8)
    return new((num_slots,) if it.reduction == "none" else ()), scores, counts, weights, roles


def _save(ctx: Any, it: Any, output: tuple[Tensor, ...]) -> None:
    ctx.implementation = it.implementation
    _loss, scores, counts, weights, roles = output
    slots = slots_of_losses(it.reduction, it.slots, it.group_size, weights)
    ctx.save_for_backward(it.labels, it.offsets, counts, weights, slots)
    ctx.mark_non_differentiable(scores, counts, weights, roles)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_loss: Tensor | None, *_: object) -> dict[str, Tensor | None]:
    if grad_loss is None:
        return {}
    labels, offsets, counts, weights, slots = ctx.saved_tensors
    factor: Tensor | None = grad_loss
    if slots is not None:
        weights, factor = score_gradient(grad_loss, weights, slots), None
    gradient = sequence_score_backward(
        weights=weights,
        counts=counts,
        labels=labels,
        offsets=offsets,
        implementation=ctx.implementation,
        factor=factor,
    )
    return {"logprobs": gradient}


@op(_fake, save=_save, backward=_backward)
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
    kernels = backend_for(implementation, logprobs.device).sequence_score
    scores, own_counts = kernels.forward(logprobs.contiguous(), labels.contiguous(), offsets)
    loss, weights, roles = score_groups(
        scores, own_counts if counts is None else counts,
        RolloutGroups(rewards, order, group_offsets, slots, group_size), margin, num_groups, tau, reward_threshold,
        reduction, implementation,
    )  # fmt: skip
    return loss, scores, own_counts, weights, roles
