"""The threads that run in lockstep: those of one CTA or of several, side by side on one axis.

A register is an array of one number per thread, or of a single one where all threads have the same.
"""

from __future__ import annotations

import numpy as np

from .arithmetic import Array, Perturbation
from .memory import Fault, Memory, Region

WARP = 32
WHOLE_WARP = np.uint32(0xFFFFFFFF)


class Threads:
    """The state of `len(ctas)` CTAs of `per_cta` threads.

    registers   arrays of shape [1] or [n]; None before the first write
    mask        [n] which threads run the current instruction, or None for all
    ctas        linear numbers of the CTAs in the grid
    barriers    [CTAs] how many barriers each has passed;  warp_barriers: [warps]
    """

    def __init__(
        self, ctas: Array, per_cta: int, registers: list[Array | None],
        global_memory: Memory, shared_bytes: int, perturbation: Perturbation | None,
    ) -> None:  # fmt: skip
        self.ctas, self.per_cta = ctas, per_cta
        self.count = len(ctas) * per_cta
        self.registers = registers
        self.mask: Array | None = None
        self._mask: Array | None = None  # whose active threads these are
        self._active: Array = np.zeros(0, np.int64)
        self.barriers: Array = np.zeros(len(ctas), np.int64)
        self.warp_barriers: Array = np.zeros(self.count // WARP, np.int64)
        self.global_memory = global_memory
        self.shared_bytes, self.shared_stride = shared_bytes, -(-shared_bytes // 16) * 16
        poison = np.full(len(ctas) * self.shared_stride, 0xFF, np.uint8)  # NaN, until it is written
        self.shared = Memory("shared", [Region("shared memory", 0, poison)])
        self.perturbation = perturbation
        self.lanes: Array = np.arange(self.count)
        self.first_shared = (self.lanes // per_cta) * self.shared_stride  # of a thread's CTA

    def shared_address(self, address: Array, size: int) -> Array:
        """Addresses of the active threads in the shared memory of their CTAs -> in that of all CTAs, side by side."""
        if int(address.min()) < 0 or int(address.max()) + size > self.shared_bytes:
            i = int(((address < 0) | (address + size > self.shared_bytes)).argmax())
            raise Fault(
                f"shared memory access of {size} bytes at {int(address[i])}, outside of the {self.shared_bytes} bytes "
                f"that the kernel has, by {self.name(int(self.active()[i]))}"
            )
        return address + (self.first_shared if self.mask is None else self.first_shared[self.mask])

    def active(self) -> Array:
        """Numbers of the threads that run the current instruction."""
        if self.mask is None:
            return self.lanes
        if self._mask is not self.mask:
            self._mask, self._active = self.mask, self.mask.nonzero()[0]
        return self._active

    def name(self, lane: int) -> str:
        """A thread as a message has it."""
        return f"thread {lane % self.per_cta} of CTA {self.ctas[lane // self.per_cta]}"

    def whole_ctas(self, what: str) -> None:
        """Raise unless every CTA takes part with all of its threads or with none."""
        if self.mask is None:
            return
        present = self.mask.reshape(-1, self.per_cta)
        some = present.any(axis=1) & ~present.all(axis=1)
        if some.any():
            missing = int(np.flatnonzero(some.repeat(self.per_cta) & ~self.mask)[0])
            raise Fault(f"{what} that not all threads of a CTA reach: {self.name(missing)} does not")

    def whole_warps(self, what: str, members: Array) -> None:
        """Raise unless every warp that takes part has all of the threads in `members`, 32 bits, and no others."""
        if self.mask is None and (members == WHOLE_WARP).all():
            return
        bits = np.broadcast_to(members.view(np.uint32), (self.count,))
        lane = (self.lanes % WARP).astype(np.uint32)
        named = (bits >> lane & 1).astype(bool)
        mask = np.ones(self.count, bool) if self.mask is None else self.mask
        running = mask.reshape(-1, WARP).any(axis=1).repeat(WARP)
        wrong = (mask & ~named) | (running & named & ~mask)
        if wrong.any():
            raise Fault(f"{what} whose member mask is not the threads that run it: {self.name(int(wrong.argmax()))}")
