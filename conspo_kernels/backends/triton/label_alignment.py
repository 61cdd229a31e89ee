"""Users' labels (masked, shifted, packed) in the form that the other kernels take: one launch, in Triton.

Names: b sequences, t positions, token = b * T + t.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...values import ELSEWHERE as ELSEWHERE_LABEL
from ...values import IGNORED as IGNORED_LABEL
from .direct import kernel
from .launch import ceil_div

BLOCK = tl.constexpr(1024)
NUM_WARPS = 4
IGNORED = tl.constexpr(IGNORED_LABEL)
ELSEWHERE = tl.constexpr(ELSEWHERE_LABEL)
UNSPECIALIZED = (
    "absent", "stride_labels_b", "stride_labels_t", "stride_mask_b", "stride_mask_t", "num_positions", "num_tokens",
    "num_offsets", "steps",
)  # fmt: skip
UNALIGNED = ("labels_ptr", "mask_ptr", "offsets_ptr")  # a user's slice begins anywhere
MASK_DTYPES = frozenset(
    (
        torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float16, torch.bfloat16,
        torch.float32, torch.float64,
    )
)  # fmt: skip


@triton.jit
def _is_offset(x, offsets_ptr, num_offsets, steps):
    """Whether x is among the offsets, which do not fall: a binary search, that stays inside of them if they do."""
    low = tl.zeros_like(x)
    high = tl.zeros_like(x) + num_offsets
    for _ in range(steps):
        searching = low < high
        middle = (low + high) // 2
        smaller = tl.load(offsets_ptr + middle, mask=searching, other=0).to(tl.int64) < x
        low = tl.where(searching & smaller, middle + 1, low)
        high = tl.where(searching & (smaller == 0), middle, high)
    return tl.load(offsets_ptr + low, mask=low < num_offsets, other=-1).to(tl.int64) == x


# Reads a label and a mask's entry per token, of packed ones log2(S) offsets too; writes 8 bytes per token.
@kernel(do_not_specialize=UNSPECIALIZED, do_not_specialize_on_alignment=UNALIGNED)
def _kernel(
    labels_ptr, mask_ptr, offsets_ptr, aligned_ptr,
    absent: tl.int64, stride_labels_b: tl.int64, stride_labels_t: tl.int64, stride_mask_b: tl.int64,
    stride_mask_t: tl.int64, num_positions: tl.int64, num_tokens: tl.int64, num_offsets: tl.int64, steps: tl.int32,
    SHIFT: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    in_range = token < num_tokens
    b, t = token // num_positions, token % num_positions
    source = t + 1 if SHIFT else t  # the position of the label that position t predicts
    active = in_range & (source < num_positions)
    if offsets_ptr is not None:
        begin = tl.load(offsets_ptr).to(tl.int64)
        end = tl.load(offsets_ptr + num_offsets - 1).to(tl.int64)
        active = active & (t >= begin) & (t < end)
        if SHIFT:  # where a sequence begins, the position before ends one
            active = active & (_is_offset(source, offsets_ptr, num_offsets, steps) == 0)
    if mask_ptr is not None:
        entry = tl.load(mask_ptr + b * stride_mask_b + source * stride_mask_t, mask=active, other=0)
        active = active & (entry != 0)
    label = tl.load(labels_ptr + b * stride_labels_b + source * stride_labels_t, mask=active, other=0).to(tl.int64)
    active = active & (label != absent)
    label = tl.where(label < 0, ELSEWHERE, label)
    tl.store(aligned_ptr + token, tl.where(active, label, IGNORED), mask=in_range)


def align(labels: Tensor, response_mask: Tensor | None, offsets: Tensor | None, shift: bool, absent: int) -> Tensor:
    """[B, T] int64 labels of the rows that predict them."""
    aligned = torch.empty_like(labels, dtype=torch.int64, memory_format=torch.contiguous_format)
    if response_mask is not None and response_mask.dtype not in MASK_DTYPES:
        response_mask = response_mask != 0
    strides = (*labels.stride(), *((0, 0) if response_mask is None else response_mask.stride()))
    num_offsets = 0 if offsets is None else offsets.numel()
    sizes = (labels.shape[1], labels.numel(), num_offsets, num_offsets.bit_length())
    if labels.numel():
        _kernel[(ceil_div(labels.numel(), BLOCK.value),)](
            labels, response_mask, offsets, aligned, absent, *strides, *sizes, SHIFT=shift, num_warps=NUM_WARPS
        )
    return aligned
