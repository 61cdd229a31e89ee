"""Padded or packed, shifted or not, masked or not: brought to one form for the ops.

Tokens are always [B, T] behind this module: packed ones are one row of N. Labels are aligned with the rows that predict
them, and are an index or `IGNORED`, so nothing behind knows of masks, shifts or `ignore_index`.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
from torch import Tensor

from ..registration import op
from ..values import ELSEWHERE, IGNORED
from . import check
from .scalars import plain

NOT_CHECKED = -1  # as a vocabulary's size: labels only say which tokens count
ON_ALL_RANKS = 2**62  # larger than any: the rest of the vocabulary is on other ranks


class Predictions(NamedTuple):
    """The argument whose rows labels belong to: its name, the tensor, the shape of its tokens, and its vocabulary.

    split: the tokens of each rollout are spread over ranks.
    """

    name: str
    tensor: Tensor
    shape: tuple[int, ...]
    vocab_size: int
    split: bool


class TokenLayout(NamedTuple):
    """labels: [B, T] int64, an index or `IGNORED`.  offsets: [S + 1] int64 on the labels' device, or None: the rows are
    the rollouts.  cpu_offsets: the same on the CPU, where they are known there.  shape: of the user's labels.
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
        """needed_for: what cannot be had of packed tokens without cu_seqlens."""
        name, tensor, shape, vocab_size, split = predictions
        check.flags(shift=shift)
        if split:
            check.no_shift_over_ranks(shift)
        ignore_index = plain(ignore_index)
        check.ignore_index(ignore_index)
        check.tokens(labels, response_mask, name, shape, tensor)
        check.cu_seqlens(cu_seqlens, shape, needed_for or ("shift=True" if shift else None))
        check.devices(labels.device, cu_seqlens=cu_seqlens)
        offsets = None if cu_seqlens is None else sequence_offsets(cu_seqlens, labels.numel(), labels.device)
        cpu_offsets = cu_seqlens.long() if cu_seqlens is not None and cu_seqlens.device.type == "cpu" else None
        aligned = aligned_labels(labels, response_mask, offsets, shift, ignore_index, vocab_size)
        return cls(aligned, offsets, cpu_offsets, labels.shape)

    @property
    def active(self) -> Tensor:
        """[B, T] bool: response tokens."""
        return self.labels != IGNORED

    def only(self, tokens: Tensor) -> TokenLayout:
        """The same with no response token but where `tokens` [B, T] is True."""
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
        position = torch.arange(self.labels.shape[1], device=offsets.device)
        rollout = torch.searchsorted(offsets[1:].contiguous(), position, right=True)
        return torch.cat([values, values.new_zeros(1)])[rollout][None]

    def counts(self) -> Tensor:
        """[S] int32 response tokens; those of this rank where rollouts are spread over several."""
        if self.offsets is None:
            return self.active.sum(1, dtype=torch.int32)
        total = torch.nn.functional.pad(self.active.flatten().cumsum(0), (1, 0))
        before = total[self.offsets.clamp(0, self.labels.numel())]  # on an accelerator offsets are not checked
        return (before[1:] - before[:-1]).clamp(min=0).int()


def _fake_offsets(cu_seqlens: Tensor, _num_tokens: int, device: torch.device) -> Tensor:
    return cu_seqlens.new_empty(cu_seqlens.shape, dtype=torch.int64, device=device)


@op(_fake_offsets)
def sequence_offsets(cu_seqlens: Tensor, num_tokens: int, device: torch.device) -> Tensor:
    """cu_seqlens [S+1] as int64 on `device`; values are checked where they are on the CPU."""
    if cu_seqlens.device.type == "cpu":
        values = cu_seqlens.tolist()
        if values[0] != 0:
            raise ValueError(f"cu_seqlens must begin with 0, got {values[0]}")
        for s, (start, stop) in enumerate(itertools.pairwise(values)):
            if stop < start:
                raise ValueError(f"cu_seqlens must not fall, got {start} then {stop} at index {s + 1}")
        if values[-1] > num_tokens:
            raise ValueError(f"cu_seqlens must end within the {num_tokens} packed tokens, got {values[-1]}")
    return cu_seqlens.to(device, torch.int64, non_blocking=True, copy=True)


def _fake_labels(labels: Tensor, *_: object) -> Tensor:
    return labels.new_empty(labels.shape if labels.dim() == 2 else (1, *labels.shape), dtype=torch.int64)


@op(_fake_labels)
def aligned_labels(
    labels: Tensor,
    response_mask: Tensor | None,
    offsets: Tensor | None,
    shift: bool,
    ignore_index: int,
    vocab_size: int,
) -> Tensor:
    """[B, T] int64 labels of the rows that predict them, `IGNORED` where there is no response token.

    Args:
        labels: [B, T], [N] or [1, N] integers, as the user passed them.
        response_mask: shaped like labels, zero = no response token, or None.
        offsets: [S + 1] int64, of packed labels, or None.
        shift: labels are the input ids: position t gets the label of t + 1.
        vocab_size: labels lie in [0, vocab_size): that is looked at where it costs no synchronisation, on the CPU.
            NOT_CHECKED or ON_ALL_RANKS. On an accelerator a label below 0 becomes ELSEWHERE.
    """
    given = labels.long()  # a narrower type may not hold ignore_index: -100 is 156 in uint8
    active = given != ignore_index
    if response_mask is not None:
        active &= response_mask != 0
    aligned = torch.where(active, torch.where(given < 0, ELSEWHERE, given), IGNORED)
    if aligned.dim() == 1:
        given, aligned = given[None], aligned[None]
    if shift:
        aligned = _next_labels(aligned, offsets)
    if offsets is not None:
        position = torch.arange(aligned.shape[1], device=aligned.device)
        aligned = torch.where((position >= offsets[0]) & (position < offsets[-1]), aligned, IGNORED)
    if vocab_size != NOT_CHECKED and labels.device.type == "cpu" and aligned.numel():
        smallest, largest = torch.aminmax(aligned)
        if smallest < IGNORED or largest >= vocab_size:
            _raise_bad_label(given, aligned, shift, ignore_index, vocab_size)
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
    return shifted.index_fill(1, ends, IGNORED)


def _raise_bad_label(given: Tensor, aligned: Tensor, shift: bool, ignore_index: int, vocab_size: int) -> None:
    b, t = ((aligned < IGNORED) | (aligned >= vocab_size)).nonzero()[0].tolist()
    where = "in the vocabulary of all ranks" if vocab_size == ON_ALL_RANKS else f"in [0, {vocab_size})"
    raise ValueError(
        f"labels must lie {where} or equal ignore_index ({ignore_index}); "
        f"found {given[b, t + shift].item()} at token {(b, t)}"
    )
