"""x *= factor by a factor that is most often 1, which the host does not know: then nothing is read or written."""

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096


@triton.jit
def _scaled(x_ptr, offsets, mask, factor):
    x = tl.load(x_ptr + offsets, mask=mask)
    tl.store(x_ptr + offsets, (x.to(factor.dtype) * factor).to(x.dtype), mask=mask)


# Reads one number; reads and writes x once unless it is 1.
@triton.jit(do_not_specialize=("count",), do_not_specialize_on_alignment=("factor_ptr",))
def _kernel(x_ptr, factor_ptr, count: tl.int64, BLOCK: tl.constexpr):
    factor = tl.load(factor_ptr)
    if factor != 1:
        start = tl.program_id(0).to(tl.int64) * BLOCK
        offsets = start + tl.arange(0, BLOCK)
        if start + BLOCK <= count:  # whole blocks without a mask, by 16 bytes
            _scaled(x_ptr, offsets, None, factor)
        else:
            _scaled(x_ptr, offsets, offsets < count, factor)


def scale_(gradient: Tensor, factor: Tensor) -> None:
    """gradient *= factor (0-d); one that is not contiguous is multiplied whole."""
    if not gradient.is_contiguous():
        gradient.mul_(factor)
    elif gradient.numel():
        _kernel[(triton.cdiv(gradient.numel(), BLOCK),)](
            gradient, factor, gradient.numel(), BLOCK=BLOCK, num_warps=8, enable_fp_fusion=True
        )
