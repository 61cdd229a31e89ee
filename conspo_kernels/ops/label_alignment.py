"""conspo::aligned_labels: labels as users have them (masked, shifted, packed) in the one form that every op takes."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from ..backends.registry import backend_for
from ..values import IGNORED
from .devices import to_device
from .registration import op

NOT_CHECKED = -1  # as a vocabulary's size: labels only say which tokens count
ON_ALL_RANKS = 2**62  # larger than any: the rest of the vocabulary is on other ranks


@op(lambda it: torch.empty(it.cu_seqlens.shape, dtype=torch.int64, device=it.device))
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


def _fake_labels(it: Any) -> Tensor:
    shape = it.labels.shape if it.labels.dim() == 2 else (1, *it.labels.shape)
    return it.labels.new_empty(shape, dtype=torch.int64)


@op(_fake_labels)
def aligned_labels(
    labels: Tensor,
    response_mask: Tensor | None,
    offsets: Tensor | None,
    shift: bool,
    absent: int,
    vocab_size: int,
    implementation: str,
) -> Tensor:
    """[B, T] int64 labels of the rows that predict them, `IGNORED` where there is no response token.

    Args:
        labels: [B, T], [N] or [1, N] integers, as the user passed them.
        response_mask: shaped like labels, zero = no response token, or None.
        offsets: [S + 1] int32 or int64, of packed labels, or None.
        shift: labels are the input ids: position t gets the label of t + 1.
        absent: the label that means "no response token".
        vocab_size: labels lie in [0, vocab_size): that is looked at where it costs no synchronisation, on the CPU.
            NOT_CHECKED or ON_ALL_RANKS. On an accelerator a label below 0 becomes ELSEWHERE.
    """
    if labels.dim() == 1:
        labels, response_mask = labels[None], None if response_mask is None else response_mask[None]
    aligned = backend_for(implementation, labels.device).align(labels, response_mask, offsets, shift, absent)
    aligned = aligned.contiguous()  # as compiled code expects it, whatever the strides of the user's labels
    if vocab_size != NOT_CHECKED and labels.device.type == "cpu" and aligned.numel():
        smallest, largest = torch.aminmax(aligned)
        if smallest < IGNORED or largest >= vocab_size:
            _raise_bad_label(labels, aligned, shift, absent, vocab_size)
    return aligned


def _raise_bad_label(labels: Tensor, aligned: Tensor, shift: bool, absent: int, vocab_size: int) -> None:
    b, t = ((aligned < IGNORED) | (aligned >= vocab_size)).nonzero()[0].tolist()
    where = "in the vocabulary of all ranks" if vocab_size == ON_ALL_RANKS else f"in [0, {vocab_size})"
    raise ValueError(
        f"labels must lie {where} or equal ignore_index ({absent}); got {labels[b, t + shift].item()} at token {(b, t)}"
    )
