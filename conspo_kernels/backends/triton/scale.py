"""x *= factor by a factor that is most often 1, which the host does not know: then nothing is read or written.

The grid is a few programs per multiprocessor, whatever the size of x: where the factor is 1 each reads one number and
is done, a few microseconds for all; one program per 4,096 numbers would be 151,936 of them for 4,096 rows of logits.
"""

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .direct import kernel
from .launch import FUSED, ceil_div

BLOCK = 4096
LAUNCH: dict[str, Any] = {"num_warps": 8, **FUSED}
PROGRAMS = 8  # per multiprocessor: 64 warps, twice what 51 registers leave room for, so that no program is the last
MULTIPROCESSORS = 132  # of an H100, where no GPU says its own number
UNSPECIALIZED = ("rows", "row_blocks", "width", "num_positions", "stride_b", "stride_t")


@triton.jit
def _scaled(x_ptr, offsets, mask, factor):
    x = tl.load(x_ptr + offsets, mask=mask)
    tl.store(x_ptr + offsets, (x.to(factor.dtype) * factor).to(x.dtype), mask=mask)


# Reads one number; reads and writes x once unless it is 1. x is rows of `width` numbers that follow one another.
@kernel(do_not_specialize=UNSPECIALIZED, do_not_specialize_on_alignment=("factor_ptr",))
def _kernel(
    x_ptr, factor_ptr, rows: tl.int64, row_blocks: tl.int64, width: tl.int64, num_positions: tl.int64,
    stride_b: tl.int64, stride_t: tl.int64, ONE_ROW: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    factor = tl.load(factor_ptr)
    if factor != 1:
        item = tl.program_id(0).to(tl.int64)
        while item < rows * row_blocks:
            start = item % row_blocks * BLOCK
            offsets = start + tl.arange(0, BLOCK)
            if not ONE_ROW:
                row = item // row_blocks
                offsets += (row // num_positions) * stride_b + (row % num_positions) * stride_t
            if start + BLOCK <= width:  # whole blocks without a mask: by 16 bytes where x is contiguous
                _scaled(x_ptr, offsets, None, factor)
            else:
                _scaled(x_ptr, offsets, start + tl.arange(0, BLOCK) < width, factor)
            item += tl.num_programs(0)


@functools.lru_cache(maxsize=16)
def num_programs(device: torch.device) -> int:
    """Of a grid that fills a device once."""
    if device.type != "cuda":
        return MULTIPROCESSORS * PROGRAMS
    return torch.cuda.get_device_properties(device).multi_processor_count * PROGRAMS


def scale_(gradient: Tensor, factor: Tensor) -> None:
    """gradient *= factor (0-d)."""
    if gradient.numel() == 0:
        return
    layout = _rows(gradient)
    if layout is None:  # no such gradient comes from here: every one has rows of numbers that follow one another
        gradient.mul_(factor)
        return
    rows, width, num_positions, stride_b, stride_t = layout
    row_blocks = ceil_div(width, BLOCK)
    grid = (min(rows * row_blocks, num_programs(gradient.device)),)
    _kernel[grid](
        gradient, factor, rows, row_blocks, width, num_positions, stride_b, stride_t,
        ONE_ROW=rows == 1, BLOCK=BLOCK, **LAUNCH,
    )  # fmt: skip


def _rows(x: Tensor) -> tuple[int, int, int, int, int] | None:
    """How many rows of which width x is, and positions per batch with their strides."""
    if x.is_contiguous():
        return 1, x.numel(), 1, 0, 0
    if x.dim() > 3 or x.stride(-1) != 1:
        return None
    (num_batches, num_positions, width), (stride_b, stride_t, _) = (
        ((1,) * (3 - x.dim()) + tuple(x.shape)), ((0,) * (3 - x.dim()) + x.stride())
    )  # fmt: skip
    return num_batches * num_positions, width, num_positions, stride_b, stride_t
