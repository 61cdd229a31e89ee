"""Races between threads, read from the record of a launch's accesses.

Two threads race where they touch the same bytes, one of them stores, and nothing orders them: between CTAs nothing
does; in a CTA a barrier does, within a warp also a barrier of the warp. Two things are no race:

- stores of the same bits: Triton's layouts hold replicas of a number, and each may write it;
- in global memory, the load of a replica: a thread loads, by the same instruction as the thread that stores later, a
  number that it then does not use. What it reads there does not matter. In shared memory every load is used.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .arithmetic import Array
from .memory import Access, Fault, Memory, Region
from .threads import WARP

MOST_GROUPS = 1 << 22  # of which something is written down; more are sorted first


class Touches(NamedTuple):
    """One entry per granule (the narrowest access of the region) that a thread touched, in the order of time."""

    granule: Array  # counted from the first that was touched
    thread: Array  # in the grid
    cta: Array
    barriers: Array
    warp_barriers: Array
    stores: Array
    changed: Array
    access: Array  # which one

    def only(self, those: Array) -> Touches:
        return Touches(*(column[those] for column in self))


def check_races(memory: Memory, kernel: str) -> None:
    """Raise Fault where two threads race."""
    for region in memory.regions:
        if region.stored:
            _check(region, memory.name, kernel)


def _check(region: Region, space: str, kernel: str) -> None:
    touches = _touches(region.accesses)
    # Nearly everything is touched by one thread alone: that is sorted out first.
    touches = touches.only(_shared_with_a_store([touches.granule], touches.thread, touches))
    if not len(touches.granule):
        return
    across = _shared_with_a_store([touches.granule], touches.cta, touches)
    if across.any():
        _complain("CTAs, which nothing orders,", touches.only(across), region, space, kernel)
    warp = touches.thread // WARP
    between = _shared_with_a_store([touches.granule, touches.barriers], warp, touches)
    within = _shared_with_a_store(
        [touches.granule, touches.barriers, warp, touches.warp_barriers], touches.thread, touches
    )
    for key, those in (
        ([touches.granule, touches.barriers], between),
        ([touches.granule, touches.barriers, warp, touches.warp_barriers], within),
    ):
        if not those.any():
            continue
        candidates = touches.only(those)
        _, groups = np.unique(_groups([column[those] for column in key]), return_inverse=True)
        unsettled = _unsettled(groups, candidates)
        candidates, groups = candidates.only(unsettled), groups[unsettled]
        for group in np.split(np.argsort(groups, kind="stable"), np.cumsum(np.bincount(groups))[:-1]):
            if len(group) and _matters(candidates.only(group), replicas=space == "global"):
                _complain("threads, with no barrier between them,", candidates.only(group), region, space, kernel)


def _touches(accesses: list[Access]) -> Touches:
    size = min(access.size for access in accesses)
    columns: list[list[Array]] = [[] for _ in Touches._fields]
    for number, access in enumerate(accesses):
        per_cta = access.per_cta
        lanes = np.arange(len(access.ctas) * per_cta) if access.lanes is None else access.lanes
        cta = lanes // per_cta
        pieces = access.size // size
        stores = access.changed is not None
        values = (
            np.broadcast_to(access.address, lanes.shape) // size,
            access.ctas[cta] * per_cta + lanes % per_cta,
            access.ctas[cta],
            access.barriers[cta],
            access.warp_barriers[lanes // WARP],
            np.full(lanes.shape, stores),
            access.changed if access.changed is not None else np.zeros(lanes.shape, bool),
            np.full(lanes.shape, number),
        )
        for column, value in zip(columns, values, strict=True):
            column.append(value.repeat(pieces))
        if pieces > 1:
            columns[0][-1] = columns[0][-1] + np.tile(np.arange(pieces), len(lanes))
    touches = Touches(*map(np.concatenate, columns))
    return touches._replace(granule=touches.granule - touches.granule.min())


def _groups(key: list[Array]) -> Array:
    """A number per entry, the same for equal keys, below MOST_GROUPS or as many as there are. No column is negative."""
    groups = key[0]
    for column in key[1:]:
        column = column - column.min()
        groups = groups * (int(column.max()) + 1) + column
        if int(groups.max()) >= MOST_GROUPS:
            _, groups = np.unique(groups, return_inverse=True)
    return groups


def _shared_with_a_store(key: list[Array], who: Array, touches: Touches) -> Array:
    """Which entries have a key that is touched by two of `who`, and stored to."""
    if not len(who):
        return np.zeros(0, bool)
    groups = _groups(key)
    number = int(groups.max()) + 1
    one = np.empty(number, who.dtype)
    one[groups] = who
    several, stored = np.zeros(number, bool), np.zeros(number, bool)
    several[groups[who != one[groups]]] = True
    stored[groups[touches.stores]] = True
    return (several & stored)[groups]


def _unsettled(groups: Array, touches: Touches) -> Array:
    """Which entries are of groups with a load, or with a store that left other bits than the first one: all that
    `_matters` has to look at. Of most groups the rest is replicas' stores of one number.  groups: below their number.
    """
    first = np.zeros(int(groups.max()) + 1, touches.access.dtype)
    latest_first = np.flatnonzero(touches.stores)[::-1]
    first[groups[latest_first]] = touches.access[latest_first]  # of several the last one stays, which is the first
    unsettled = np.zeros(len(first), bool)
    unsettled[groups[~touches.stores | (touches.changed & (touches.access > first[groups]))]] = True
    return unsettled[groups]


def _matters(touches: Touches, replicas: bool) -> bool:
    """Whether the order of these accesses to one granule can change anything.  replicas: whether theirs are no race."""
    stores = touches.only(touches.stores)
    loads = touches.only(~touches.stores)
    # The first of several stores may change the bits; a later one by another thread must find its own there.
    later = stores.access > stores.access[0]
    if len(np.unique(stores.thread)) > 1 and stores.changed[later].any():
        return True
    for access, thread in zip(loads.access, loads.thread, strict=True):
        others = stores.thread != thread
        if not others.any():
            continue
        if (stores.access[others] < access).any():
            return True
        same_load = loads.thread[loads.access == access]
        if not (replicas and np.isin(stores.thread[others], same_load).all()):
            return True
    return False


def _complain(who: str, touches: Touches, region: Region, space: str, kernel: str) -> None:
    store = int(np.flatnonzero(touches.stores)[0])
    same = touches.granule == touches.granule[store]
    other = int(np.flatnonzero(same & (touches.thread != touches.thread[store]))[0])
    lines = []
    for i in (store, other):
        access = region.accesses[int(touches.access[i])]
        lines.append(f"thread {int(touches.thread[i]) % access.per_cta} of CTA {int(touches.cta[i])}: {access.text}")
    raise Fault(f"{space} memory race in {kernel}: two {who} touch {region.name}\n  " + "\n  ".join(lines))
