"""Padded or packed, shifted or not, masked or not; groups of one size or of any: brought to one form for the ops.

Tokens are always [B, T] here: packed ones are one row of N. The labels that the ops see are aligned with the rows that
predict them and hold `ignore_index` wherever there is no response token, so no op knows of masks or shifts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from . import check


@dataclass(frozen=True)
class TokenLayout:
    """labels: [B, T] int64.  offsets: [S + 1] int64 on the labels' device, or None: the rows are the rollouts."""

    labels: Tensor
    offsets: Tensor | None

    @classmethod
    def of(
        cls, labels: Tensor, mask: Tensor | None, offsets: Tensor | None, shift: bool, ignore_index: int
    ) -> TokenLayout:
        """From labels shaped [B, T], [N] or [1, N]; `offsets` are the checked cu_seqlens of packed ones."""
        labels = labels.long()  # a narrower type may not hold ignore_index: -100 is 156 in uint8
        if labels.dim() == 1:
            labels = labels[None]
            mask = None if mask is None else mask[None]
        if mask is not None:
            labels = torch.where(mask != 0, labels, ignore_index)
        if shift:
            labels = _next_labels(labels, offsets, ignore_index)
        if offsets is not None:
            position = torch.arange(labels.shape[1], device=labels.device)
            inside = (position >= offsets[0]) & (position < offsets[-1])
            labels = torch.where(inside, labels, ignore_index)
        return cls(labels, offsets)

    def only(self, tokens: Tensor, ignore_index: int) -> TokenLayout:
        """The same with no response token but where `tokens` [B, T] is True."""
        return TokenLayout(torch.where(tokens, self.labels, ignore_index), self.offsets)


def over_tokens(values: Tensor, shape: torch.Size, offsets: Tensor | None) -> Tensor:
    """Values of rollouts [S] at their tokens, [B, T]; zero at those of no rollout."""
    if offsets is None:
        return values[:, None].expand(shape)
    position = torch.arange(shape[1], device=offsets.device)
    rollout = torch.searchsorted(offsets[1:].contiguous(), position, right=True)
    return torch.cat([values, values.new_zeros(1)])[rollout][None]


def _next_labels(labels: Tensor, offsets: Tensor | None, ignore_index: int) -> Tensor:
    """Position t gets the label of t + 1; the last position of a sequence has none."""
    shifted = torch.full_like(labels, ignore_index)
    shifted[:, :-1] = labels[:, 1:]
    if offsets is None or labels.shape[1] == 0:
        return shifted
    # Where a later sequence begins, the position before ends one. An offset of 0 (nothing before it) or past the last
    # token lands on the last token, which has no successor anyway.
    ends = torch.where((offsets > 0) & (offsets < labels.shape[1]), offsets - 1, labels.shape[1] - 1)
    return shifted.index_fill(1, ends, ignore_index)


def rows(logits: Tensor) -> Tensor:
    """[B, T, V], a view."""
    return logits if logits.dim() == 3 else logits[None]


@dataclass(frozen=True)
class GroupLayout:
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
    def of(cls, groups: int | Tensor, num_rollouts: int) -> GroupLayout:
        check.groups(groups, num_rollouts)
        if not isinstance(groups, Tensor):
            return cls(num_rollouts, groups)
        ids, order = torch.sort(groups.detach(), stable=True)
        begins = torch.ones_like(ids, dtype=torch.bool)
        begins[1:] = ids[1:] != ids[:-1]
        sorted_slots = begins.cumsum(0) - 1
        offsets = torch.searchsorted(sorted_slots, torch.arange(num_rollouts + 1, device=ids.device))
        return cls(num_rollouts, 0, order, offsets, torch.empty_like(order).scatter_(0, order, sorted_slots))

    def first_rollouts(self, losses: Tensor) -> Tensor:
        """Losses of slots [K] as "none" returns them: those of ragged groups at each group's first rollout, else 0."""
        if self.order is None or self.offsets is None or self.slots is None:
            return losses
        order, offsets, slots = (x.to(losses.device, non_blocking=True) for x in (self.order, self.offsets, self.slots))
        first = order[offsets[slots]] == torch.arange(self.num_rollouts, device=losses.device)
        return torch.where(first, losses[slots], 0.0)
