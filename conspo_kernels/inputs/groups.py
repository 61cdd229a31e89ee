"""Groups of one size or of any sizes, as segments of a sorted order; and which rollouts can have a gradient."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..ops.devices import to_device
from . import check


class GroupLayout(NamedTuple):
    """Groups of `size` consecutive rollouts, or, where size is 0, ragged ones as segments of a sorted order.

    order [S], offsets [S + 1] (as many slots as rollouts, the trailing ones empty, so that no count need be
    read back from a GPU), slots [S]: the fields of `objective.Segments`, on the device of the ids.
    """

    num_rollouts: int
    size: int
    order: Tensor | None = None
    offsets: Tensor | None = None
    slots: Tensor | None = None

    @classmethod
    def from_arguments(cls, groups: int | Tensor, num_rollouts: int) -> GroupLayout:
        check.groups(groups, num_rollouts)
        if not isinstance(groups, Tensor):
            return cls(num_rollouts, groups)
        ids, order = torch.sort(groups.detach(), stable=True)
        begins = torch.cat([torch.ones_like(ids[:1], dtype=torch.bool), ids[1:] != ids[:-1]])
        sorted_slots = begins.cumsum(0) - 1
        offsets = torch.searchsorted(sorted_slots, torch.arange(num_rollouts + 1, device=ids.device))
        return cls(num_rollouts, 0, order, offsets, torch.empty_like(order).scatter_(0, order, sorted_slots))

    def first_rollouts(self, losses: Tensor) -> Tensor:
        """Losses of slots [K] as "none" returns them: those of ragged groups at each group's first rollout, else 0."""
        if self.order is None or self.offsets is None or self.slots is None:
            return losses
        order, offsets, slots = (to_device(x, losses.device) for x in (self.order, self.offsets, self.slots))
        first = order[offsets[slots]] == torch.arange(self.num_rollouts, device=losses.device)
        return torch.where(first, losses[slots], 0.0)

    def in_group_with(self, members: Tensor) -> Tensor:
        """[S] bool: whether the group of a rollout has one of `members` [S] bool."""
        if self.slots is None:
            some = members.view(-1, self.size).any(1, keepdim=True)
            return some.expand(-1, self.size).reshape(members.shape)
        members_per_group = torch.zeros_like(members, dtype=torch.int32).index_add_(0, self.slots, members.int())
        return members_per_group[self.slots] > 0


def live_rollouts(
    rewards: Tensor,
    num_rollouts: int,
    counts: Tensor | None,
    reward_threshold: float,
    groups: int | Tensor,
    whole: bool,
) -> Tensor | None:
    """[S] bool on the CPU: rollouts that can have a gradient; None where rewards or ids are not on the CPU.

    counts: [S] response tokens, if known; they are looked at where they are on the CPU.  whole: every
    group lies on this rank.
    """
    check.rewards(rewards, num_rollouts)
    if not whole:  # a group may be valid by what another rank has
        return ~rewards.isnan() if rewards.device.type == "cpu" else None
    check.groups(groups, num_rollouts)
    if rewards.device.type != "cpu" or (isinstance(groups, Tensor) and groups.device.type != "cpu"):
        return None
    scorable = ~rewards.isnan()
    if counts is not None and counts.device.type == "cpu":
        scorable &= counts > 0
    positive = scorable & (rewards > float(reward_threshold))  # as the op compares them
    layout = GroupLayout.from_arguments(groups, num_rollouts)
    return scorable & layout.in_group_with(positive) & layout.in_group_with(scorable & ~positive)
