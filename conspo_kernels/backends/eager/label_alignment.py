"""Users' labels (masked, shifted, packed) in the form that the ops take: PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from ...values import ELSEWHERE, IGNORED


def align(labels: Tensor, response_mask: Tensor | None, offsets: Tensor | None, shift: bool, absent: int) -> Tensor:
    """[B, T] int64 labels of the rows that predict them."""
    given = labels.long()  # a narrower type may not hold `absent`: -100 is 156 in uint8
    active = given != absent
    if response_mask is not None:
        active &= response_mask != 0
    aligned = torch.where(active, torch.where(given < 0, ELSEWHERE, given), IGNORED)
    if shift:
        aligned = _next_labels(aligned, offsets)
    if offsets is not None:
        position = torch.arange(aligned.shape[1], device=aligned.device)
        aligned = torch.where((position >= offsets[0]) & (position < offsets[-1]), aligned, IGNORED)
    return aligned


def _next_labels(labels: Tensor, offsets: Tensor | None) -> Tensor:
    """Position t gets the label of t + 1; the last position of a sequence has none."""
    shifted = torch.full_like(labels, IGNORED)
    shifted[:, :-1] = labels[:, 1:]
    if offsets is None or labels.shape[1] == 0:
        return shifted
    # Where a later sequence begins, the position before ends one. An offset of 0 (nothing before it) or past the last
    # token lands on the last token, which has no successor anyway.
    ends = torch.where((offsets > 0) & (offsets < labels.shape[1]), offsets - 1, labels.shape[1] - 1)
    return shifted.index_fill(1, ends.long(), IGNORED)
