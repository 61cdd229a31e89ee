"""How many warps of a compiled kernel a multiprocessor can hold, and what keeps it from holding more."""

from __future__ import annotations

from typing import NamedTuple


class Multiprocessor(NamedTuple):
    """registers: 32-bit, of all threads.  warp_registers: the unit in which a warp gets them.  warps: at most.

    reserved_bytes: of shared memory, taken by each block beside its own.
    """

    registers: int
    warp_registers: int
    warp_size: int
    warps: int
    blocks: int
    shared_bytes: int
    reserved_bytes: int


# CUDA C++ Programming Guide, technical specifications per compute capability; AMD CDNA3 ISA, 4 SIMDs of 8 waves and
# 512 registers for each of 64 lanes, in units of 8.
NVIDIA = Multiprocessor(65_536, 256, 32, 64, 32, 228 * 1024, 1024)
MULTIPROCESSORS = {
    "sm_80": NVIDIA._replace(shared_bytes=164 * 1024),
    "sm_90": NVIDIA,
    "sm_100": NVIDIA,
    "gfx942": Multiprocessor(4 * 512 * 64, 8 * 64, 64, 32, 16, 64 * 1024, 0),
}


class Occupancy(NamedTuple):
    """warps: resident ones, of `of` at most.  limit: what is used up first."""

    warps: int
    of: int
    limit: str


def occupancy(target: str, registers: int, shared_bytes: int, num_warps: int) -> Occupancy:
    """Of a kernel with so many registers per thread, and shared bytes and warps per block."""
    it = MULTIPROCESSORS[target]
    per_warp = -(-max(registers, 1) * it.warp_size // it.warp_registers) * it.warp_registers
    shared = shared_bytes + it.reserved_bytes
    blocks = {
        "warps": it.warps // num_warps,
        "registers": it.registers // per_warp // num_warps,
        "blocks": it.blocks,
        "shared memory": it.shared_bytes // shared if shared else it.blocks,
    }
    limit = min(blocks, key=blocks.__getitem__)
    return Occupancy(blocks[limit] * num_warps, it.warps, limit)
