"""How a row of logits is cut into chunks, aligned vectors and edges.

A row of V logits is cut into chunks of 64 KiB, one program each, so few rows fill a GPU as well as many do, and the
order of every sum depends on V alone, never on the batch around the row. A chunk is walked in tiles of `LANES` x
`VECTOR` logits; a vector is 16 bytes, begins at a 16-byte boundary and belongs to one thread, so the loop needs no
mask, no shared memory and no barrier. The few logits before a row's first boundary and after its last one (none where
rows are aligned) are its edges. Where rows are not aligned, the cut moves with the address of the row, and so may the
last bit of a sum.

All offsets are in elements and 64 bits: 8 x 4k x 150k logits overflow 32.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import FUSED, TABLE, Launch, ceil_div, family, registers, vectors_per_thread

VECTOR_BYTES = 16  # the widest load of one thread
CHUNK_BYTES = 65536  # of one row per program: 5 programs for a bf16 row of 151,936 logits

# Sizes that change from step to step: Triton would compile anew where one becomes 1 or divisible by 16.
UNSPECIALIZED = (
    "num_tokens",
    "num_positions",
    "logits_misalignment",
    "stride_logits_b",
    "stride_logits_t",
    "grad_misalignment",
    "stride_grad_b",
    "stride_grad_t",
    "vocab_start",
)

# Read a number at a time, from wherever a slice begins, a user's or a tile's: knowing the alignment would only make for
# more binaries, some of them in the middle of training.
UNALIGNED = (
    "labels_ptr",
    "coefficients_ptr",
    "grad_logprobs_ptr",
    "grad_entropy_ptr",
    "logprobs_ptr",
    "row_max_ptr",
    "log_sum_ptr",
    "entropy_ptr",
)


@triton.jit
def row_offset(token, num_positions, misalignment, stride_b, stride_t):
    """Offset of a token's first logit from the aligned base pointer."""
    return misalignment + (token // num_positions) * stride_b + (token % num_positions) * stride_t


@triton.jit
def interior(row, vocab_size, VECTOR: tl.constexpr):
    """The aligned vectors [first, last) of a row; written as a product so that the compiler sees the alignment."""
    first = tl.cdiv(row, VECTOR)
    count = tl.maximum((row + vocab_size) // VECTOR - first, 0)
    return first * VECTOR, (first + count) * VECTOR


@triton.jit
def edges(row, vocab_size, first, last, VECTOR: tl.constexpr):
    """Offsets and mask of the logits before the first and after the last aligned vector of the row [first, last)."""
    i = tl.arange(0, 2 * VECTOR)
    head = i < VECTOR
    # How many there are at each end, fewer than a vector: 32 bits, so that nothing wider has to last.
    before = tl.minimum(first - row, vocab_size).to(tl.int32)
    behind = (row + vocab_size - last).to(tl.int32)
    offsets = tl.where(head, row + i, last + (i - VECTOR))
    return offsets, tl.where(head, i < before, i - VECTOR < behind)


def tiles(logits: Tensor, kernel: str, most_registers: int | None) -> dict[str, int]:
    """Constexprs, warps and registers of a kernel that walks rows.  kernel: of `launch.TABLE`."""
    row = family(logits.device)
    return _tiles(kernel, TABLE[row][kernel], row, logits.element_size(), most_registers)


@functools.lru_cache(maxsize=64)  # building it takes 2 us, at every launch
def _tiles(kernel: str, launch: Launch, row: str, size: int, most_registers: int | None) -> dict[str, int]:
    cut = {"VECTOR": VECTOR_BYTES // size, "LANES": launch.lanes}
    if kernel != "forward_backward":  # a whole row per program
        cut["CHUNK"] = CHUNK_BYTES // size
    if kernel not in ("backward", "heavy"):
        cut["PARTS"] = vectors_per_thread(launch, row)
    return cut | FUSED | registers(most_registers, row) | {"num_warps": launch.num_warps}


def num_chunks_of(vocab_size: int, dtype: torch.dtype) -> int:
    return ceil_div(vocab_size * dtype.itemsize, CHUNK_BYTES)


def aligned_base(x: Tensor) -> tuple[Tensor, int]:
    """`x` from the 16-byte boundary at or before its first element, and how many elements earlier that is.

    Triton compiles 16-byte accesses only where it knows the pointer to be aligned, and only the pointer: kernels
    take care of rows that begin elsewhere. Where the storage itself begins past that boundary (memory wrapped from
    elsewhere) `x` is used as it is, and accesses are narrow.
    """
    misalignment = x.data_ptr() % VECTOR_BYTES // x.element_size()
    if misalignment == 0 or misalignment > x.storage_offset():
        return x, 0
    return x.as_strided((1,), (1,), x.storage_offset() - misalignment), misalignment
