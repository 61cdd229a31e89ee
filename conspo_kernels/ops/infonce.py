"""conspo::infonce: from log-probabilities to scores, and the loss and weights of `objective.py`, in one op.

Its backward is one launch: the incoming scalar is multiplied where the weights of rollouts go to their tokens. Scores
that are known already are rollouts of one token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..backends.registry import backend_for
from ..objective import Groups, Objective, Rollouts
from ..values import check_margin, factor
from .devices import moved, to_device
from .registration import op, saved_tensors
from .sequence_score import sequence_score_backward


def _fake(it: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    num_rollouts = it.labels.shape[0] if it.offsets is None else it.offsets.shape[0] - 1
    num_groups = num_rollouts // it.group_size if it.group_offsets is None else it.group_offsets.shape[0] - 1
    new = it.logprobs.new_empty
    loss = new((num_groups,) if it.reduction == "none" else ())
    return loss, new(num_rollouts), new(num_rollouts, dtype=torch.int32), new(num_rollouts)


def _save(ctx: Any, it: Any, output: tuple[Tensor, ...]) -> None:
    ctx.implementation = it.implementation
    _loss, scores, counts, weights = output
    index = None
    if it.reduction == "none":  # of losses that are not reduced
        index = it.group_ids
        if index is None:
            index = torch.arange(weights.shape[0], device=weights.device) // it.group_size
    ctx.save_for_backward(it.labels, it.offsets, counts, weights, index, it.logprobs)
    ctx.mark_non_differentiable(scores, counts, weights)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_loss: Tensor | None, *_: object) -> dict[str, Tensor | None]:
    if grad_loss is None:
        return {}
    labels, offsets, counts, weights, index, _logprobs = saved_tensors(ctx)  # on which the weights depend
    factor: Tensor | None = grad_loss
    if index is not None:
        of_rollouts = grad_loss[to_device(index, grad_loss.device)]
        # A weight of zero takes no part: an infinite or NaN gradient of another group must not reach it as NaN.
        weights, factor = torch.where(weights == 0, 0.0, weights * of_rollouts), None
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
def infonce(
    logprobs: Tensor,
    labels: Tensor,
    offsets: Tensor | None,
    rewards: Tensor,
    group_size: int,
    group_ids: Tensor | None,
    group_order: Tensor | None,
    group_offsets: Tensor | None,
    margin: Tensor,
    num_groups: Tensor | None,
    tau: float,
    reward_threshold: float,
    reduction: str,
    implementation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Scores, loss and weights. Arguments on the CPU are copied to the device of the log-probabilities without waiting.

    Args:
        logprobs, labels, offsets: as of `sequence_score`.
        rewards: [S], NaN = unscorable.
        group_size, group_ids, group_order, group_offsets: `Groups`.
        margin: 0-d.
        num_groups: 0-d denominator of "mean", or None: the number of valid groups.
        tau, reward_threshold, reduction, implementation: as `conspo_loss`.

    Returns:
        loss: 0-d, or the K losses of the groups for "none"; it alone has a graph.
        scores: [S], NaN where there is no response token.
        counts: [S] int32, response tokens, 0 = unscorable.
        weights: [S] dloss/dscores (for "none" of the rollout's own group).
    """
    device, dtype = logprobs.device, logprobs.dtype
    backend = backend_for(implementation, device)
    scores, counts = backend.sequence_score_forward(logprobs.contiguous(), labels.contiguous(), offsets)
    # Numbers on the CPU stay there: a kernel takes them as they are.
    if margin.is_cpu:
        check_margin(margin.item())
    if num_groups is not None and num_groups.is_cpu:
        factor("num_groups", num_groups.item())
    groups = Groups(group_size, group_ids, group_order, group_offsets)
    if group_ids is not None and group_ids.device != device:
        groups = _on_device(groups, device)
    rewards = rewards if rewards.device == device else to_device(rewards, device)
    margin = moved(margin, margin.device, dtype)
    num_groups = None if num_groups is None else moved(num_groups, num_groups.device, dtype)
    objective = Objective(tau, margin, reward_threshold, reduction, num_groups)
    loss, weights = backend.infonce(scores, counts, Rollouts(rewards.contiguous(), groups), objective)
    return loss, scores, counts, weights


def _on_device(groups: Groups, device: torch.device) -> Groups:
    """A copy on the device, by one transfer."""
    size, *tensors = groups
    parts = [x for x in tensors if x is not None]
    return Groups(size, *to_device(torch.cat(parts), device).split([len(part) for part in parts]))
