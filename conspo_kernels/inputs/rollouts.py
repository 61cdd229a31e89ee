"""Rewards, groups and the objective's numbers as the user passed them: checked, and in the form that ops take."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..objective import Groups, Objective, Rollouts
from ..ops.devices import constant, moved
from ..ops.ranks import name_of, sum_over_ranks
from ..sources import HiddenSource, LabelledRows
from ..values import Tokens, check_margin, factor, integer, number, python_number
from . import check


def rollouts_of(
    source: LabelledRows,
    num_rollouts: int,
    rewards: Tensor,
    groups: int | Tensor,
    tau: Any,
    margin: Any,
    reward_threshold: Any,
    reduction: Any,
    num_groups: Any,
) -> tuple[Rollouts, Objective]:
    """num_rollouts: of this rank."""
    objective = _objective(source, tau, margin, reward_threshold, reduction, num_groups)
    groups, over_ranks = python_number(groups), source.parallel.data is not None
    check.rewards(rewards, num_rollouts)
    check.groups(groups, 0 if over_ranks and not isinstance(groups, Tensor) else num_rollouts)
    check.devices(source.device, rewards=rewards, groups=groups, margin=margin, num_groups=num_groups)
    rewards = rewards.detach().resolve_neg()
    if not isinstance(groups, Tensor):
        return Rollouts(rewards, Groups(groups)), objective
    ids = groups.detach().resolve_neg()
    return Rollouts(rewards, Groups(0, ids.long()) if over_ranks else Groups.of_ids(ids)), objective


def _objective(
    source: LabelledRows, tau: Any, margin: Any, reward_threshold: Any, reduction: Any, num_groups: Any
) -> Objective:
    tau, reward_threshold = factor("tau", tau), number("reward_threshold", reward_threshold)
    if isinstance(reward_threshold, int):
        reward_threshold = integer("reward_threshold", reward_threshold)
    if not isinstance(margin, Tensor):
        margin = number("margin", margin)
        # Under torch.compile a comparison would tie the program to one margin: there the op checks the tensor.
        if not torch.compiler.is_compiling():
            check_margin(margin)
    if num_groups is not None and not isinstance(num_groups, Tensor):
        num_groups = factor("num_groups", num_groups)
    check.objective(margin, reward_threshold, reduction, num_groups)
    margin = constant(margin, source.device, source.dtype)
    if num_groups is not None:
        num_groups = constant(num_groups, source.device, source.dtype)
    return Objective(tau, margin, reward_threshold, reduction, num_groups)


def tokens_with_gradient(
    source: HiddenSource, tokens: Tokens, rollouts: Rollouts, objective: Objective, for_metrics: bool
) -> Tokens:
    """Drops the tokens of rollouts that cannot have a gradient, if the host knows these without waiting.

    Counts tokens before dropping rollouts: metrics report all of them.
    """
    on_cpu, counts = tokens.labels.device.type == "cpu", None
    if on_cpu or for_metrics:
        counts = tokens.response_counts()
        if source.parallel.context is not None:
            counts = sum_over_ranks(x=counts, group=name_of(source.parallel.context))
    if source.synchronize:
        rewards, (size, *tensors) = rollouts
        rollouts = Rollouts(rewards.cpu(), Groups(size, *(x if x is None else x.cpu() for x in tensors)))
    has_gradient = _have_gradient(rollouts, counts, objective.reward_threshold, source.parallel.data is None)
    num_dropped = torch.zeros((), dtype=torch.int64, device=tokens.labels.device) if for_metrics else None
    if has_gradient is None or (not on_cpu and not torch.compiler.is_compiling() and has_gradient.all()):
        return tokens._replace(counts=counts, num_dropped=num_dropped)
    mask = tokens.per_token(has_gradient)
    if not on_cpu and not for_metrics:  # labels may stay: a rollout without log-probabilities has no part in the loss
        return tokens._replace(mask=mask)
    local = moved(has_gradient, tokens.labels.device)
    local_mask = mask if mask is not None and on_cpu else tokens.per_token(local)
    assert local_mask is not None
    if for_metrics:
        assert counts is not None
        num_dropped = ((counts > 0) & ~local).sum()
    return tokens.only(local_mask)._replace(mask=mask, counts=counts, num_dropped=num_dropped)


def _have_gradient(rollouts: Rollouts, counts: Tensor | None, reward_threshold: float, local: bool) -> Tensor | None:
    """[S] bool on the CPU: rollouts that can have a gradient; None where rewards or ids are not on the CPU.

    counts: [S] response tokens, or None; used only if they are on the CPU.  local: every group lies on this rank. Where
    not, rollouts of other ranks may make a group valid.
    """
    rewards, groups = rollouts
    if rewards.device.type != "cpu":
        return None
    if not local:
        return ~rewards.isnan()
    if groups.ids is not None and groups.ids.device.type != "cpu":
        return None
    has_tokens = counts > 0 if counts is not None and counts.device.type == "cpu" else None
    positive, negative = rollouts.sides(has_tokens, reward_threshold)
    return (positive | negative) & groups.have(positive) & groups.have(negative)
