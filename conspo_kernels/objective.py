"""The ConSPO objective on scores: group-wise InfoNCE with a margin, its value and its gradient in closed form.

For a group with positives P and negatives N, both non-empty, temperature tau and margin m:

    A      = logsumexp_{j in N}(s_j / tau)
    x_i    = A - (s_i - m) / tau                                                for i in P
    loss   = (tau / |P|) * sum_{i in P} softplus(x_i)
    q_i    = sigmoid(x_i)                                                       how poorly positive i is separated
    d loss / d s_i = -q_i / |P|                                                 for i in P
    d loss / d s_j = (sum_{i in P} q_i / |P|) * softmax_N(s / tau)_j            for j in N

Everything is O(S) in the number of rollouts and runs in the dtype of the scores, sums over a group in fp64. Names: s
rollouts, k slots of groups.

Source: arXiv:2605.12969.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Segments(NamedTuple):
    """Groups as segments of a sorted order: group k is `order[offsets[k]:offsets[k + 1]]`; trailing slots may be empty.

    order: [S] int64, rollouts sorted by group.  offsets: [K + 1] int64.  slots: [S] int64, the group of each rollout.
    """

    order: Tensor
    offsets: Tensor
    slots: Tensor

    def sum(self, values_s: Tensor) -> Tensor:
        """[S] -> [K] sums in a fixed order: one after another, so in fp64."""
        wide = values_s[self.order].double()
        return torch.segment_reduce(wide, "sum", offsets=self.offsets, initial=0, unsafe=True).to(values_s.dtype)

    def max(self, values_s: Tensor) -> Tensor:
        """[S] -> [K] maxima, -inf where a slot is empty."""
        return torch.segment_reduce(values_s[self.order], "max", offsets=self.offsets, initial=-torch.inf, unsafe=True)


def equal_segments(num_rollouts: int, size: int, device: torch.device) -> Segments:
    """Segments for groups of `size` consecutive rollouts."""
    order = torch.arange(num_rollouts, device=device)
    offsets = torch.arange(num_rollouts // size + 1, device=device) * size
    return Segments(order, offsets, order // size)


class GroupLosses(NamedTuple):
    """losses: [K], 0 where a group is not valid.  weights: [S], d losses[k] / d scores.  valid: [K] bool."""

    losses: Tensor
    weights: Tensor
    valid: Tensor


class Role:
    """The role of a rollout in its group, an int8.  IDLE_...: the group is not valid."""

    UNSCORABLE = 0
    POSITIVE = 1
    NEGATIVE = -1
    IDLE_POSITIVE = 2
    IDLE_NEGATIVE = -2


def group_infonce(
    scores: Tensor, positive: Tensor, negative: Tensor, segments: Segments, tau: float, margin: Tensor
) -> GroupLosses:
    """Value and gradient of every group's loss.

    Args:
        scores: [S] floating point; those of rollouts that are neither positive nor negative are not used.
        positive: [S] bool.
        negative: [S] bool.
        segments: the groups.
        tau: temperature of the contrast, > 0.
        margin: 0-d, in units of the scores.

    Returns:
        `GroupLosses` of the K slots.
    """
    slots = segments.slots
    num_positive = segments.sum(positive.to(scores.dtype))
    valid = (num_positive > 0) & (segments.sum(negative.to(scores.dtype)) > 0)
    positive, negative = positive & valid[slots], negative & valid[slots]

    z = torch.where(positive | negative, scores, 0.0) / tau
    peak = segments.max(torch.where(negative, z, -torch.inf))
    peak = torch.where(peak == -torch.inf, 0.0, peak)
    odds = torch.where(negative, torch.exp(z - peak[slots]), 0.0)
    total = segments.sum(odds)

    x = (peak + total.log())[slots] - (z - margin / tau)
    softplus = torch.logaddexp(x, torch.zeros_like(x))  # F.softplus turns linear at 20 and loses 1e-9 in fp64
    per_positive = 1 / num_positive.clamp(min=1)
    losses = tau * per_positive * segments.sum(torch.where(positive, softplus, 0.0))

    q = torch.where(positive, torch.sigmoid(x), 0.0) * per_positive[slots]
    pull = segments.sum(q) / torch.where(total > 0, total, 1.0)
    weights = torch.where(negative, pull[slots] * odds, -q)
    return GroupLosses(torch.where(valid, losses, 0.0), torch.where(valid[slots], weights, 0.0), valid)


class Rollouts(NamedTuple):
    """scores: [S].  rewards: [S], NaN = unscorable.  counts: [S] response tokens, or None: a NaN score is unscorable.

    segments: of ragged groups; None: groups of `group_size` consecutive rollouts.
    """

    scores: Tensor
    rewards: Tensor
    counts: Tensor | None
    segments: Segments | None
    group_size: int


class ContrastSettings(NamedTuple):
    """margin: 0-d.  num_groups: 0-d denominator of reduction "mean", or None: the number of valid groups."""

    tau: float
    margin: Tensor
    reward_threshold: float
    reduction: str
    num_groups: Tensor | None


class GroupLoss(NamedTuple):
    """loss: 0-d, or [K] for "none".  weights: [S] dloss/dscores.  roles: [S] int8, of `Role`."""

    loss: Tensor
    weights: Tensor
    roles: Tensor


def evaluate(rollouts: Rollouts, settings: ContrastSettings) -> GroupLoss:
    """`group_infonce` by rewards [S] in place of positive and negative, reduced over the groups."""
    scores, rewards, counts, segments, group_size = rollouts
    if segments is None:
        segments = equal_segments(scores.numel(), group_size, scores.device)
    scorable = ~rewards.isnan() & (scores == scores if counts is None else counts > 0)
    positive = scorable & (rewards > float(settings.reward_threshold))  # torch compares uint16 with floats only
    negative = scorable & ~positive
    losses, weights, valid = group_infonce(scores, positive, negative, segments, settings.tau, settings.margin)
    sign = positive.to(torch.int8) - negative.to(torch.int8)  # Role.POSITIVE and Role.NEGATIVE, twice that if idle
    roles = torch.where(valid[segments.slots], sign, 2 * sign)
    if settings.reduction == "none":
        return GroupLoss(losses, weights, roles)
    denominator = scores.new_ones(())
    if settings.reduction == "mean":
        denominator = valid.sum().clamp(min=1) if settings.num_groups is None else settings.num_groups
    return GroupLoss(losses.sum() / denominator, weights / denominator, roles)
