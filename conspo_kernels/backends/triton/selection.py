"""Numbers of the tokens that take part, put together and back in their places: four tensors per launch, in Triton."""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024
MOST = 4  # tensors per launch
UNSPECIALIZED = ("number", "total", "steps")
UNALIGNED = ("places_ptr", "in_0", "in_1", "in_2", "in_3")  # a slice begins anywhere


@triton.jit
def _move(in_ptr, out_ptr, source, target, found, mask):
    if in_ptr is not None:
        tl.store(out_ptr + target, tl.load(in_ptr + source, mask=found & mask, other=0), mask=mask)


# Reads a place (to spread, log2(n) of them) and a number of each tensor per token; writes a number of each.
@triton.jit(do_not_specialize=UNSPECIALIZED, do_not_specialize_on_alignment=UNALIGNED)
def _kernel(
    places_ptr, in_0, in_1, in_2, in_3, out_0, out_1, out_2, out_3,
    number: tl.int64, total: tl.int64, steps: tl.int32, SPREAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    target = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = target < total
    if SPREAD:  # places rise: a binary search
        source = tl.zeros_like(target)
        high = tl.zeros_like(target) + number
        for _ in range(steps):
            searching = source < high
            middle = (source + high) // 2
            smaller = tl.load(places_ptr + middle, mask=searching, other=0) < target
            source = tl.where(searching & smaller, middle + 1, source)
            high = tl.where(searching & (smaller == 0), middle, high)
        found = tl.load(places_ptr + source, mask=source < number, other=-1) == target
    else:
        source = tl.load(places_ptr + target, mask=mask, other=0)
        found = mask
    _move(in_0, out_0, source, target, found, mask)
    _move(in_1, out_1, source, target, found, mask)
    _move(in_2, out_2, source, target, found, mask)
    _move(in_3, out_3, source, target, found, mask)


def _moved(tensors: list[Tensor], places: Tensor, total: int, spread: bool) -> list[Tensor]:
    out = [torch.empty(total, dtype=x.dtype, device=x.device) for x in tensors]
    number = places.shape[0]
    for start in range(0, len(tensors) if total else 0, MOST):
        ends: list[Tensor | None] = [None] * (MOST - len(tensors[start : start + MOST]))
        _kernel[(triton.cdiv(total, BLOCK),)](
            places, *tensors[start : start + MOST], *ends, *out[start : start + MOST], *ends, number, total,
            number.bit_length(), SPREAD=spread, BLOCK=BLOCK, num_warps=4,
        )  # fmt: skip
    return out


def gather(tensors: list[Tensor], places: Tensor) -> list[Tensor]:
    """[N] each -> [n] each, those at rising places [n]."""
    return _moved(tensors, places, places.shape[0], False)


def spread(tensors: list[Tensor], places: Tensor, total: int) -> list[Tensor]:
    """[n] each -> [N] each, at rising places [n], zero elsewhere."""
    return _moved(tensors, places, total, True)
