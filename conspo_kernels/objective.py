"""The ConSPO objective on scores: group-wise InfoNCE with a margin, its value and its gradient in closed form.

For a group with positives P and negatives N, both non-empty, temperature tau and margin m:

    A      = logsumexp_{j in N}(s_j / tau)
    x_i    = A - (s_i - m) / tau                                                for i in P
    loss   = (tau / |P|) * sum_{i in P} softplus(x_i)
    q_i    = sigmoid(x_i)                                                       how poorly positive i is separated
    d loss / d s_i = -q_i / |P|                                                 for i in P
    d loss / d s_j = (sum_{i in P} q_i / |P|) * softmax_N(s / tau)_j            for j in N

Everything is O(S) in the number of rollouts and runs in the dtype of the scores, sums over a group in fp64. Names: s
rollouts, k groups.

Source: arXiv:2605.12969.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Groups(NamedTuple):
    """Groups of `size` consecutive rollouts; or, where size is 0, of any sizes: rollouts sorted by group.

    Group k is `order[offsets[k]:offsets[k + 1]]`. There are as many as rollouts, the last ones empty, so that no count
    need be read back from a GPU.  ids: [S] int64, k of each rollout.  order: [S] int64.  offsets: [K + 1]
    int64. Of rollouts that are still to be gathered from ranks only the ids are known, those of prompts.
    """

    size: int
    ids: Tensor | None = None
    order: Tensor | None = None
    offsets: Tensor | None = None

    @classmethod
    def of_ids(cls, ids: Tensor) -> Groups:
        """By prompt ids [S]."""
        sorted_ids, order = torch.sort(ids, stable=True)
        begins = torch.cat([torch.ones_like(sorted_ids[:1], dtype=torch.bool), sorted_ids[1:] != sorted_ids[:-1]])
        sorted_index = begins.cumsum(0) - 1
        offsets = torch.searchsorted(sorted_index, torch.arange(len(ids) + 1, device=ids.device))
        return cls(0, torch.empty_like(order).scatter_(0, order, sorted_index), order, offsets)

    def sorted(self, num_rollouts: int, device: torch.device) -> Groups:
        """The same with ids, order and offsets where `size` stands for all of them."""
        if self.size == 0:
            return self
        order = torch.arange(num_rollouts, device=device)
        offsets = torch.arange(num_rollouts // self.size + 1, device=device) * self.size
        return Groups(0, order // self.size, order, offsets)

    def sum(self, values_s: Tensor) -> Tensor:
        """[S] -> [K] sums over sorted groups in a fixed order: one after another, so in fp64."""
        assert self.order is not None
        wide = values_s[self.order].double()
        return torch.segment_reduce(wide, "sum", offsets=self.offsets, initial=0, unsafe=True).to(values_s.dtype)

    def max(self, values_s: Tensor) -> Tensor:
        """[S] -> [K] maxima, -inf where a group is empty, of sorted groups."""
        assert self.order is not None
        return torch.segment_reduce(values_s[self.order], "max", offsets=self.offsets, initial=-torch.inf, unsafe=True)

    def have(self, members: Tensor) -> Tensor:
        """[S] bool: whether the group of a rollout has one of `members` [S] bool."""
        if self.ids is None:
            some = members.view(-1, self.size).any(1, keepdim=True)
            return some.expand(-1, self.size).reshape(members.shape)
        members_per_group = torch.zeros_like(members, dtype=torch.int32).index_add_(0, self.ids, members.int())
        return members_per_group[self.ids] > 0


class Rollouts(NamedTuple):
    """rewards: [S], NaN = unscorable.  groups: those of all of them."""

    rewards: Tensor
    groups: Groups

    def sides(self, has_tokens: Tensor | None, reward_threshold: float) -> tuple[Tensor, Tensor]:
        """[S] bool each: the positive rollouts and the negative ones. A rollout that is neither is not scorable.

        has_tokens: [S] bool, whether a rollout has response tokens; None: all have.
        """
        scorable = ~self.rewards.isnan()
        if has_tokens is not None:
            scorable &= has_tokens
        positive = scorable & (self.rewards > float(reward_threshold))  # torch compares uint16 with floats only
        return positive, scorable & ~positive


class Objective(NamedTuple):
    """margin: 0-d.  num_groups: 0-d denominator of reduction "mean", or None: the number of valid groups."""

    tau: float
    margin: Tensor
    reward_threshold: float
    reduction: str
    num_groups: Tensor | None


def infonce(scores: Tensor, counts: Tensor, rollouts: Rollouts, objective: Objective) -> tuple[Tensor, Tensor]:
    """Value and gradient of every group's loss, reduced over the groups.

    Args:
        scores: [S] floating point; those of rollouts that are neither positive nor negative are not used.
        counts: [S] response tokens; a rollout without is unscorable.

    Returns:
        loss: 0-d, or [K] for "none", 0 where a group is not valid.
        weights: [S] dloss/dscores.
    """
    tau, margin, reward_threshold, reduction, num_groups = objective
    groups = rollouts.groups.sorted(scores.shape[0], scores.device)
    ids = groups.ids
    assert ids is not None
    positive, negative = rollouts.sides(counts > 0, reward_threshold)
    num_positive = groups.sum(positive.to(scores.dtype))
    valid = (num_positive > 0) & (groups.sum(negative.to(scores.dtype)) > 0)
    positive, negative = positive & valid[ids], negative & valid[ids]

    z = torch.where(positive | negative, scores, 0.0) / tau
    peak = groups.max(torch.where(negative, z, -torch.inf))
    peak = torch.where(peak == -torch.inf, 0.0, peak)
    odds = torch.where(negative, torch.exp(z - peak[ids]), 0.0)
    total = groups.sum(odds)

    x = (peak + total.log())[ids] - (z - margin / tau)
    softplus = torch.logaddexp(x, torch.zeros_like(x))  # F.softplus turns linear at 20 and loses 1e-9 in fp64
    per_positive = 1 / num_positive.clamp(min=1)
    losses = tau * per_positive * groups.sum(torch.where(positive, softplus, 0.0))
    losses = torch.where(valid, losses, 0.0)

    q = torch.where(positive, torch.sigmoid(x), 0.0) * per_positive[ids]
    pull = groups.sum(q) / torch.where(total > 0, total, 1.0)
    weights = torch.where(negative, pull[ids] * odds, -q)
    weights = torch.where(valid[ids], weights, 0.0)

    if reduction == "none":
        return losses, weights
    denominator = scores.new_ones(())
    if reduction == "mean":
        denominator = valid.sum().clamp(min=1) if num_groups is None else num_groups
    return losses.sum() / denominator, weights / denominator
