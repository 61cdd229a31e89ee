"""Padded or packed, shifted or not, masked or not: brought to one form for the ops.

Tokens are always [B, T] behind this module: packed ones are one row of N. Labels are aligned with the rows that predict
them, and are an index or `IGNORED`, so nothing behind knows of masks, shifts or `ignore_index`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..ops.label_alignment import aligned_labels, sequence_offsets
from ..values import IGNORED, python_number
from . import check


class Predictions(NamedTuple):
    """The public argument that labels belong to, row by row: its name, the tensor, and the shape of its tokens.

    vocab_size: of its vocabulary, or NOT_CHECKED or ON_ALL_RANKS.  split: the tokens of each rollout are spread over
    ranks.  implementation: the backend that aligns the labels.
    """

    name: str
    tensor: Tensor
    shape: tuple[int, ...]
    vocab_size: int
    split: bool
    implementation: str


class TokenLayout(NamedTuple):
    """labels: [B, T] int64, an index or `IGNORED`.  offsets: [S + 1] integers on the labels' device, or None: the rows
    are the rollouts.  cpu_offsets: the same on the CPU, where they are known there.  shape: of the user's labels.
    """

    labels: Tensor
    offsets: Tensor | None
    cpu_offsets: Tensor | None
    shape: torch.Size

    @classmethod
    def from_arguments(
        cls,
        predictions: Predictions,
        labels: Tensor,
        response_mask: Tensor | None,
        cu_seqlens: Tensor | None,
        shift: bool,
        ignore_index: int,
        needed_for: str | None = None,
    ) -> TokenLayout:
        """Check labels and bring them to one form.

        needed_for: what packed tokens without cu_seqlens are refused for, as the error says; None: they are accepted.
        """
        name, tensor, shape, vocab_size, split, implementation = predictions
        check.flags(shift=shift)
        if split:
            check.no_shift_over_ranks(shift)
        ignore_index = python_number(ignore_index)
        check.ignore_index(ignore_index)
        check.tokens(labels, response_mask, name, shape, tensor)
        check.cu_seqlens(cu_seqlens, shape, needed_for or ("shift=True" if shift else None))
        check.devices(labels.device, cu_seqlens=cu_seqlens)
        labels = labels.resolve_neg()
        response_mask, cu_seqlens = (None if x is None else x.resolve_neg() for x in (response_mask, cu_seqlens))
        offsets = None if cu_seqlens is None else _offsets_beside(labels, cu_seqlens)
        cpu_offsets = cu_seqlens.long() if cu_seqlens is not None and cu_seqlens.device.type == "cpu" else None
        aligned = aligned_labels(labels, response_mask, offsets, shift, ignore_index, vocab_size, implementation)
        return cls(aligned, offsets, cpu_offsets, labels.shape)

    @property
    def num_rollouts(self) -> int:
        return self.labels.shape[0] if self.offsets is None else self.offsets.shape[0] - 1

    @property
    def active(self) -> Tensor:
        """[B, T] bool: response tokens."""
        return self.labels != IGNORED

    def only(self, tokens: Tensor) -> TokenLayout:
        """The same layout, with response tokens only where `tokens` [B, T] is True."""
        labels = torch.where(tokens, self.labels, IGNORED)
        return TokenLayout(labels, self.offsets, self.cpu_offsets, self.shape)

    def per_token(self, values: Tensor) -> Tensor | None:
        """Values of rollouts [S] at their tokens, [B, T]; zero at those of no rollout.

        On the device of the values, which is the labels' or the CPU; None where the offsets are not known there.
        """
        offsets = self.offsets if values.device == self.labels.device else self.cpu_offsets
        if self.offsets is None:
            return values[:, None].expand(self.labels.shape)
        if offsets is None:
            return None
        position = torch.arange(self.labels.shape[1], dtype=offsets.dtype, device=offsets.device)
        rollout = torch.searchsorted(offsets[1:].contiguous(), position, right=True)
        return torch.cat([values, values.new_zeros(1)])[rollout][None]

    def counts(self) -> Tensor:
        """[S] int32 response tokens; those of this rank where rollouts are spread over several."""
        if self.offsets is None:
            return self.active.sum(1, dtype=torch.int32)
        total = torch.nn.functional.pad(self.active.flatten().cumsum(0), (1, 0))
        before = total[self.offsets.clamp(0, self.labels.numel())]  # on an accelerator offsets are not checked
        return (before[1:] - before[:-1]).clamp(min=0).int()


def _offsets_beside(labels: Tensor, cu_seqlens: Tensor) -> Tensor:
    """cu_seqlens beside the labels. On an accelerator they are taken as they are: that costs no launch."""
    if cu_seqlens.device == labels.device and labels.device.type != "cpu":
        return cu_seqlens.contiguous()
    return sequence_offsets(cu_seqlens, labels.numel(), labels.device)
