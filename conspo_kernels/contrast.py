"""The objective on scores with its arguments: what the losses and `conspo_weights` have in common."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from . import check
from .layout import GroupLayout
from .metrics import conspo_metrics
from .objective import Segments, equal_segments
from .ops.group_infonce import group_infonce
from .ops.ranks import gather_rollouts, gradient_factor, name_of


class Contrasted(NamedTuple):
    """loss: 0-d, or as reduction "none" has it, with a graph.  weights: [S] dloss/dscores, of all ranks; of this one
    those at `places` (None: all).  metrics: if asked for.
    """

    loss: Tensor
    weights: Tensor
    metrics: dict[str, Tensor] | None
    places: Tensor | None


class Contrast(NamedTuple):
    """The arguments of the objective, as the losses take them."""

    tau: float
    margin: float | Tensor
    reward_threshold: float
    reduction: str
    num_groups: float | Tensor | None
    implementation: str
    process_group: ProcessGroup | None = None
    grad_reduction: str = "mean"

    @property
    def factor(self) -> float:
        """What a rank's gradient is multiplied by, so that the trainer's mean over ranks is their sum."""
        return gradient_factor(self.process_group, self.grad_reduction)

    def check(self, return_metrics: bool) -> None:
        check.ranks(self.grad_reduction, process_group=self.process_group)
        check.flags(return_metrics=return_metrics)
        check.implementation(self.implementation)
        check.objective(self.tau, self.margin, self.reward_threshold, self.reduction, self.num_groups)

    def of(
        self, scores: Tensor, rewards: Tensor, groups: int | Tensor, counts: Tensor | None, return_metrics: bool
    ) -> Contrasted:
        """Of scores [S] and, where they are known, counts of response tokens."""
        num_rollouts = scores.shape[0]
        check.rewards(rewards, num_rollouts)
        check.devices(scores.device, rewards=rewards, groups=groups, margin=self.margin, num_groups=self.num_groups)
        places = None
        if self.process_group is not None:
            scores, rewards, groups, counts, places = self._gathered(scores, rewards, groups, counts)
            num_rollouts = scores.shape[0]
        layout = GroupLayout.of(groups, num_rollouts)
        margin = _constant(self.margin, scores)
        denominator = None if self.num_groups is None else _constant(self.num_groups, scores)
        loss, weights, roles = group_infonce(
            scores, rewards.detach(), counts, layout.order, layout.offsets, layout.slots, layout.size, margin,
            denominator, self.tau, self.reward_threshold, self.reduction, self.implementation,
        )  # fmt: skip
        if self.reduction == "none":
            loss = layout.first_rollouts(loss)
        if not return_metrics:
            return Contrasted(loss, weights, None, places)
        slots = _segments(layout, scores.device).slots.to(scores.device, non_blocking=True)
        if self.reduction != "mean":
            denominator = scores.new_ones(())
        metrics = conspo_metrics(loss, margin, scores.detach(), weights, roles, slots, denominator, counts)
        return Contrasted(loss, weights, metrics, places)

    def _gathered(
        self, scores: Tensor, rewards: Tensor, groups: int | Tensor, counts: Tensor | None
    ) -> tuple[Tensor, Tensor, int | Tensor, Tensor | None, Tensor]:
        """The arguments of all ranks, and the places of this one's rollouts."""
        check.groups(groups, scores.shape[0] if isinstance(groups, Tensor) else 0)  # an int divides those of all ranks
        ids = groups.detach().long() if isinstance(groups, Tensor) else None
        # Compared here, in their own type: the ranks' may differ, and their rounding with it.
        sign = torch.where(rewards > float(self.reward_threshold), torch.inf, -torch.inf)
        rewards = torch.where(rewards.isnan(), torch.nan, sign)
        found = gather_rollouts(scores, rewards, counts, ids, name_of(self.process_group), self.factor)
        everyone, rewards, all_counts, all_ids, places = found
        return everyone, rewards, groups if ids is None else all_ids, None if counts is None else all_counts, places

    def live_rollouts(self, rewards: Tensor, groups: int | Tensor, counts: Tensor) -> Tensor | None:
        """[S] bool on the CPU: rollouts that can have a gradient; None where rewards or ids are not on the CPU.

        counts: [S] response tokens; they are looked at where they are on the CPU.
        """
        num_rollouts = counts.shape[0]
        check.rewards(rewards, num_rollouts)
        if self.process_group is not None:  # a group may be valid by what another rank has
            return ~rewards.isnan() if rewards.device.type == "cpu" else None
        check.groups(groups, num_rollouts)
        if rewards.device.type != "cpu" or (isinstance(groups, Tensor) and groups.device.type != "cpu"):
            return None
        scorable = ~rewards.isnan()
        if counts.device.type == "cpu":
            scorable &= counts > 0
        positive = scorable & (rewards > float(self.reward_threshold))  # as the op compares them
        segments = _segments(GroupLayout.of(groups, num_rollouts), rewards.device)
        valid = (segments.max(positive.float()) > 0) & (segments.max((scorable & ~positive).float()) > 0)
        return scorable & valid[segments.slots]


def _segments(layout: GroupLayout, device: torch.device) -> Segments:
    if layout.order is None or layout.offsets is None or layout.slots is None:
        return equal_segments(layout.num_rollouts, layout.size, device)
    return Segments(layout.order, layout.offsets, layout.slots)


def _constant(value: float | Tensor, like: Tensor) -> Tensor:
    """A number as a 0-d tensor beside the scores, so that another value is not another program; tensors stay live."""
    if isinstance(value, Tensor):
        return value
    if torch.compiler.is_compiling():
        # Dynamo turns a float that is added to a tensor into an input of the graph, and one that fills it into a guard.
        return torch.zeros((), dtype=like.dtype, device=like.device) + value
    return torch.full((), value, dtype=like.dtype, device=like.device)
