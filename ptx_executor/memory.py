"""Global and shared memory: every access is checked for bounds and alignment, and written down for `races`."""

from __future__ import annotations

from bisect import bisect_right
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from .arithmetic import Array

# An access of so many bytes moves items of this type: bits are copied, never computed with.
ITEMS: dict[int, np.dtype[Any]] = {
    1: np.dtype("u1"),
    2: np.dtype("u2"),
    4: np.dtype("u4"),
    8: np.dtype("u8"),
    16: np.dtype("c16"),
}
WIDEST = 16


class Fault(RuntimeError):
    """Compiled code did what it must not: the message says what, which instruction, and which thread."""


class Accessing(Protocol):
    """The threads that run an access, as far as memory looks at them: `Threads` is one."""

    mask: Array | None
    ctas: Array
    per_cta: int
    barriers: Array
    warp_barriers: Array

    def active(self) -> Array: ...

    def name(self, lane: int) -> str: ...


class Access(NamedTuple):
    """One instruction's access, by all threads that ran it.

    address         [m] or [1], bytes
    lanes           [m] of the threads side by side, or None for all of them
    ctas            their CTAs in the grid, `per_cta` threads each
    barriers        [CTAs] and warp_barriers [warps]: how many each has passed, see Threads
    changed         [m] whether a store wrote other bits than were there; None for a load
    step            grows from access to access
    """

    address: Array
    size: int
    lanes: Array | None
    ctas: Array
    per_cta: int
    barriers: Array
    warp_barriers: Array
    changed: Array | None
    step: int
    text: str


class Region:
    """Bytes from `start` on that a kernel may touch."""

    def __init__(self, name: str, start: int, data: Array) -> None:
        self.name, self.start, self.end = name, start, start + len(data)
        self.data = data
        self.accesses: list[Access] = []
        self.stored = False
        self._views: dict[int, tuple[Array, int]] = {}

    def view(self, size: int) -> tuple[Array, int]:
        """The bytes as items of `size`, from the first address that is a multiple of it."""
        if size not in self._views:
            skipped = -self.start % size
            whole = max(len(self.data) - skipped, 0) // size * size
            self._views[size] = self.data[skipped : skipped + whole].view(ITEMS[size]), self.start + skipped
        return self._views[size]

    def load(self, address: Array, size: int) -> Array:
        """Items of `size` bytes, a multiple of which the addresses are -> [m, items]."""
        item = min(size, WIDEST)
        view, start = self.view(item)
        index = (address - start) >> item.bit_length() - 1
        if size == item:
            return view[index][:, None]
        return np.stack([view[index + i] for i in range(size // item)], axis=1)

    def store(self, address: Array, items: Array) -> tuple[Array, Array]:
        """Write items [m, k]; where that changed bits, and where another thread's bits were left: both [m]."""
        size = items.itemsize
        view, start = self.view(size)
        index = (address - start) >> size.bit_length() - 1
        changed, lost = np.zeros(len(items), bool), np.zeros(len(items), bool)
        for i in range(items.shape[1]):
            value = np.ascontiguousarray(items[:, i])
            before = view[index + i]
            view[index + i] = value
            changed |= _differ(before, value)
            lost |= _differ(view[index + i], value)
        return changed, lost


def _differ(a: Array, b: Array) -> Array:
    if a.itemsize == WIDEST:
        a, b = (x.view("u8").reshape(-1, 2) for x in (a, b))
        return (a != b).any(axis=1)
    return a != b


class Memory:
    """What the kernel's pointers may point into.  name: "global" or "shared"."""

    def __init__(self, name: str, regions: list[Region]) -> None:
        self.name = name
        self.regions = sorted(regions, key=lambda region: region.start)
        self.starts = [region.start for region in self.regions]
        self.steps = 0

    def at(self, address: int) -> Region | None:
        i = bisect_right(self.starts, address) - 1
        return self.regions[i] if i >= 0 and address < self.regions[i].end else None

    def parts(self, address: Array, size: int, threads: Accessing, what: str) -> list[tuple[Region, Array | None]]:
        """The regions that an access touches, and which of its addresses lie there (None: all).

        Raises Fault where an address is not a multiple of the size or the bytes are not all inside of a region.
        """
        if int(np.bitwise_or.reduce(address)) & (size - 1):
            self.complain(f"{what}: address not a multiple of {size}", address, (address & (size - 1)) != 0, threads)
        region = self.at(int(address.min()))
        if region is not None and int(address.max()) + size <= region.end:
            return [(region, None)]
        parts: list[tuple[Region, Array | None]] = []
        inside = np.zeros(address.shape, bool)
        for region in self.regions:
            in_region = (address >= region.start) & (address + size <= region.end)
            if in_region.any():
                parts.append((region, np.flatnonzero(in_region)))
                inside |= in_region
        if not inside.all():
            self.complain(f"{what}: outside of the memory that was passed", address, ~inside, threads)
        return parts

    def complain(self, problem: str, address: Array, wrong: Array, threads: Accessing) -> None:
        i = int(wrong.argmax())
        active = threads.active()
        lane = int(active[i] if len(address) == len(active) else active[0])
        where = int(address[i])
        near = min(self.regions, key=lambda r: max(r.start - where, where - r.end + 1, 0), default=None)
        place = "" if near is None else f", {where - near.start} bytes from the start of {near.name}"
        size = "" if near is None else f", which has {near.end - near.start}"
        raise Fault(f"{self.name} {problem}, by {threads.name(lane)} at {where:#x}{place}{size}")

    def load(self, address: Array, size: int, threads: Accessing, text: str) -> Array:
        """[m] addresses, of the active threads or one for all of them -> items [m, k]."""
        parts = self.parts(address, size, threads, "load")
        if parts[0][1] is None:
            region = parts[0][0]
            self._write_down(region, address, None, size, None, threads, text)
            return region.load(address, size)
        item = min(size, WIDEST)
        items = np.zeros((len(address), size // item), ITEMS[item])
        for region, those in parts:
            assert those is not None
            items[those] = region.load(address[those], size)
            self._write_down(region, address[those], those, size, None, threads, text)
        return items

    def store(self, address: Array, items: Array, threads: Accessing, text: str) -> None:
        """items: [m, k] to [m] addresses, one per active thread."""
        size = items.itemsize * items.shape[1]
        for region, those in self.parts(address, size, threads, "store"):
            at, values = (address, items) if those is None else (address[those], items[those])
            changed, lost = region.store(at, values)
            if lost.any():
                first = int(lost.argmax())
                same = np.flatnonzero(at == at[first])
                lanes = threads.active() if those is None else threads.active()[those]
                pair = " and ".join(threads.name(int(lanes[i])) for i in (same[0], same[-1]))
                raise Fault(
                    f"{self.name} store: {len(same)} threads write different bits to one address at once, "
                    f"{pair} among them, at {int(at[first] - region.start)} bytes from the start of {region.name}"
                )
            region.stored = True
            self._write_down(region, at, those, size, changed, threads, text)

    def _write_down(
        self, region: Region, address: Array, those: Array | None, size: int, changed: Array | None, threads: Accessing,
        text: str,
    ) -> None:  # fmt: skip
        """Keeps references only: `races` reads them if some access stores to the region."""
        if those is not None:
            lanes: Array | None = threads.active()[those]
        else:
            lanes = None if threads.mask is None else threads.active()
        self.steps += 1
        region.accesses.append(
            Access(
                address, size, lanes, threads.ctas, threads.per_cta, threads.barriers, threads.warp_barriers, changed,
                self.steps, text,
            )
        )  # fmt: skip


def region_of(name: str, tensor: Tensor) -> Region:
    """The storage of a CPU tensor: what a kernel that was handed a part of it can reach without a fault of its own."""
    storage = tensor.untyped_storage()
    data = torch.empty(0, dtype=torch.uint8).set_(storage).numpy()
    return Region(name, storage.data_ptr(), data)
