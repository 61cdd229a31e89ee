"""Labels as the user passed them, padded or packed, shifted or not, masked or not: checked, and in the form of the ops.

Behind this module tokens are [B, T], packed ones one row of N. Labels are aligned with the rows that predict them, and
are an index or `IGNORED`, so nothing behind knows of masks, shifts or `ignore_index`.
"""

from __future__ import annotations

from torch import Tensor

from ..ops.label_alignment import aligned_labels, sequence_offsets
from ..sources import LabelledRows
from ..values import Tokens, integer
from . import check


def tokens_of(
    source: LabelledRows,
    labels: Tensor,
    response_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    shift: bool,
    ignore_index: int,
    needed_for: str | None = None,
) -> Tokens:
    """needed_for: the caller's name in the error "cu_seqlens is needed for ...". None: not needed."""
    ignore_index = integer("ignore_index", ignore_index)
    check.flags(shift=shift)
    if source.parallel.context is not None:
        check.no_shift_over_ranks(shift)
    check.tokens(labels, response_mask, source.name, source.shape, source.device)
    check.cu_seqlens(cu_seqlens, source.shape, needed_for or ("shift=True" if shift else None))
    check.devices(labels.device, cu_seqlens=cu_seqlens)
    labels = labels.resolve_neg()
    response_mask = None if response_mask is None else response_mask.resolve_neg()
    offsets = None if cu_seqlens is None else _offsets_on_device(labels, cu_seqlens.resolve_neg())
    aligned = aligned_labels(
        labels=labels,
        response_mask=response_mask,
        offsets=offsets,
        shift=shift,
        absent=ignore_index,
        vocab_size=source.vocab_size,
        implementation=source.implementation,
    )
    cpu_offsets = cu_seqlens.long() if cu_seqlens is not None and cu_seqlens.device.type == "cpu" else None
    return Tokens(aligned, offsets, cpu_offsets, labels.shape)


def _offsets_on_device(labels: Tensor, cu_seqlens: Tensor) -> Tensor:
    """cu_seqlens on the labels' device. On an accelerator they are taken as they are: that costs no launch."""
    if cu_seqlens.device == labels.device and labels.device.type != "cpu":
        return cu_seqlens.contiguous()
    return sequence_offsets(cu_seqlens=cu_seqlens, num_tokens=labels.numel(), device=labels.device)
