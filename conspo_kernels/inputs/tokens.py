"""Padded or packed, shifted or not, masked or not: brought to one form for the ops.

Tokens are always [B, T] behind this module: packed ones are one row of N. Labels are aligned with the rows that predict
them, and are an index or `IGNORED`, so nothing behind knows of masks, shifts or `ignore_index`.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
from torch import Tensor

from ..backends.registry import backend_for
from ..ops.devices import to_device
from ..ops.registration import device_guard, op
from ..values import IGNORED, python_number
from . import check

NOT_CHECKED = -1  # as a vocabulary's size: labels only say which tokens count
ON_ALL_RANKS = 2**62  # larger than any: the rest of the vocabulary is on other ranks


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
    offsets = to_device(cu_seqlens, device, torch.int64)
    return offsets.clone() if offsets is cu_seqlens else offsets  # an op returns none of its arguments


def _offsets_beside(labels: Tensor, cu_seqlens: Tensor) -> Tensor:
    """cu_seqlens beside the labels. On an accelerator they are taken as they are: that costs no launch."""
    if cu_seqlens.device == labels.device and labels.device.type != "cpu":
        return cu_seqlens.contiguous()
    return sequence_offsets(cu_seqlens, labels.numel(), labels.device)


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
    implementation: str,
) -> Tensor:
    """[B, T] int64 labels of the rows that predict them, `IGNORED` where there is no response token.

    Args:
        labels: [B, T], [N] or [1, N] integers, as the user passed them.
        response_mask: shaped like labels, zero = no response token, or None.
        offsets: [S + 1] int32 or int64, of packed labels, or None.
        shift: labels are the input ids: position t gets the label of t + 1.
        ignore_index: the label that means "no response token".
        vocab_size: labels lie in [0, vocab_size): that is looked at where it costs no synchronisation, on the CPU.
            NOT_CHECKED or ON_ALL_RANKS. On an accelerator a label below 0 becomes ELSEWHERE.
    """
    given, mask = labels, response_mask
    if labels.dim() == 1:
        given, mask = labels[None], None if response_mask is None else response_mask[None]
    with device_guard(labels):
        kernels = backend_for(implementation, labels.device).label_alignment
        aligned = kernels.align(given, mask, offsets, shift, ignore_index)
    if vocab_size != NOT_CHECKED and labels.device.type == "cpu" and aligned.numel():
        smallest, largest = torch.aminmax(aligned)
        if smallest < IGNORED or largest >= vocab_size:
            _raise_bad_label(given, aligned, shift, ignore_index, vocab_size)
    return aligned


def _raise_bad_label(given: Tensor, aligned: Tensor, shift: bool, ignore_index: int, vocab_size: int) -> None:
    b, t = ((aligned < IGNORED) | (aligned >= vocab_size)).nonzero()[0].tolist()
    where = "in the vocabulary of all ranks" if vocab_size == ON_ALL_RANKS else f"in [0, {vocab_size})"
    raise ValueError(
        f"labels must lie {where} or equal ignore_index ({ignore_index}); "
        f"got {given[b, t + shift].item()} at token {(b, t)}"
    )
