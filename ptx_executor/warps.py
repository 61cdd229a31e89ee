"""What threads do together: barriers, shuffles, reductions of a warp, and memory."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from .arithmetic import F32, I64, U32, Array, maximum, minimum
from .decode import TYPES, Opcode, Run, Slots, get, instruction
from .memory import Fault
from .parse import Address, Instruction
from .threads import WARP, Threads

POLICY = 0x10F0000000000000  # any number
WITH_POLICY = "L2::cache_hint"
CACHE_HINTS = {"ca", "cg", "cs", "cv", "wb", "wt", "nc", "L1::evict_first", "L1::evict_last", "L1::no_allocate"}
CACHE_HINTS |= {WITH_POLICY}


@instruction("bar")
def decode_barrier(op: Opcode, item: Instruction, slots: Slots) -> Run:
    if op.kind != "sync" or op.modifiers not in ((), ("warp",)):
        raise NotImplementedError(item.op)
    (number,) = item.operands
    if op.modifiers:
        members = slots.source(number, U32)

        def warp_barrier(threads: Threads) -> None:
            threads.whole_warps(item.text, get(threads, members, U32))
            passed = threads.warp_barriers.copy()
            passed[np.unique(threads.active() // WARP)] += 1
            threads.warp_barriers = passed

        return warp_barrier
    if number != "0":
        raise NotImplementedError(f"barrier {number}")

    def barrier(threads: Threads) -> None:
        threads.whole_ctas(item.text)
        reached = 1 if threads.mask is None else threads.mask[:: threads.per_cta]
        threads.barriers = threads.barriers + reached

    return barrier


def _sources(mode: str, lanes: Array, b: Array, c: Array) -> tuple[Array, Array]:
    """Whose number each thread gets, and whether that thread is in range: the PTX ISA's rule."""
    lane = lanes % WARP
    segment, clamp = (c >> 8) & 31, c & 31
    last = (lane & segment) | (clamp & ~segment)
    first = lane & segment
    b = b & 31
    if mode == "bfly":
        source = lane ^ b
        valid = source <= last
    elif mode == "idx":
        source = first | (b & ~segment)
        valid = source <= last
    elif mode == "down":
        source = lane + b
        valid = source <= last
    elif mode == "up":
        source = lane - b
        valid = source >= last
    else:
        raise NotImplementedError(mode)
    return lanes - lane + np.where(valid, source, lane), np.broadcast_to(valid, lanes.shape)


@functools.lru_cache(maxsize=256)
def _same_for_all(mode: str, count: int, b: int, c: int) -> tuple[Array, Array]:
    """`_sources` of so many threads whose distance and clamp are one number: nearly every shuffle's."""
    return _sources(mode, np.arange(count), np.array([b]), np.array([c]))


@instruction("shfl")
def decode_shuffle(op: Opcode, item: Instruction, slots: Slots) -> Run:
    if op.kind != "b32" or op.modifiers[0] != "sync":
        raise NotImplementedError(item.op)
    mode = op.modifiers[1]
    to, value, distance, clamp, members = item.operands
    result, _, in_range = str(to).partition("|")
    d = slots.destination(result)
    p = slots.destination(in_range) if in_range else -1
    a, b, c, m = (slots.source(operand, U32) for operand in (value, distance, clamp, members))

    def shuffle(threads: Threads) -> None:
        threads.whole_warps(item.text, get(threads, m, U32))
        x = get(threads, a, U32)
        by, within = get(threads, b, U32), get(threads, c, U32)
        if by.size == within.size == 1:
            whose, valid = _same_for_all(mode, threads.count, int(by[0]), int(within[0]))
        else:
            whose, valid = _sources(mode, threads.lanes, by.astype(I64), within.astype(I64))
        if threads.mask is not None and not threads.mask[whose][threads.mask].all():
            raise Fault(f"{item.text}: reads a thread that does not take part")
        threads.registers[d] = x if x.size == 1 else x[whose]
        if p >= 0:
            threads.registers[p] = valid

    return shuffle


REDUCTIONS: dict[str, Any] = {
    "add": np.add, "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "min": np.minimum,
    "max": np.maximum,
}  # fmt: skip


@instruction("redux")
def decode_reduction(op: Opcode, item: Instruction, slots: Slots) -> Run:
    sync, name, *more = op.modifiers
    if sync != "sync" or more or op.kind not in ("u32", "s32", "b32", "f32"):
        raise NotImplementedError(item.op)
    to, value, members = item.operands
    d, dtype = slots.destination(to), op.dtype
    a, m = slots.source(value, dtype), slots.source(members, U32)
    floating = {"min": minimum, "max": maximum}

    def reduce(threads: Threads) -> None:
        mask = get(threads, m, U32)
        threads.whole_warps(item.text, mask)
        if not (mask == 0xFFFFFFFF).all():
            raise Fault(f"{item.text}: of a part of a warp, which is not executed here")
        rows = np.broadcast_to(get(threads, a, dtype), (threads.count,)).reshape(-1, WARP)
        if dtype is F32:
            result = rows[:, 0]
            for i in range(1, WARP):
                result = floating[name](result, rows[:, i])
        else:
            result = REDUCTIONS[name].reduce(rows, axis=1, dtype=dtype)
        threads.registers[d] = result.repeat(WARP)

    return reduce


def _addresses(threads: Threads, slot: int, offset: int, all_of_them: bool) -> Array:
    """Of the active threads, or one for all of them where they have the same."""
    register: Any = threads.registers[slot]
    x = register.astype(I64) + offset
    if x.size == 1:
        return np.broadcast_to(x, threads.active().shape) if all_of_them else x
    return x if threads.mask is None else x[threads.mask]


@instruction("createpolicy")
def decode_policy(op: Opcode, item: Instruction, slots: Slots) -> Run:
    """How long the L2 keeps what is loaded: a number that loads take, and that changes no result."""
    if op.modifiers[0] != "fractional" or op.kind != "b64" or len(item.operands) != 2:
        raise NotImplementedError(item.op)
    d = slots.destination(item.operands[0])

    def create(threads: Threads) -> None:
        threads.registers[d] = np.full(threads.count, POLICY, I64)

    return create


def _without_policy(op: Opcode, item: Instruction) -> tuple[Any, ...]:
    """The operands of a load or store but for the policy that `L2::cache_hint` announces."""
    return item.operands[:-1] if WITH_POLICY in op.modifiers else item.operands


@instruction("ld")
def decode_load(op: Opcode, item: Instruction, slots: Slots) -> Run:
    space, *rest = op.modifiers
    to, source = _without_policy(op, item)
    names: tuple[Any, ...] = to if isinstance(to, tuple) else (to,)
    if space == "param":
        return _load_parameter(op, names, source, slots)
    vector = [m for m in rest if m in ("v2", "v4", "v8")]
    if set(rest) - set(vector) - CACHE_HINTS or space not in ("global", "shared"):
        raise NotImplementedError(item.op)
    if len(names) != (int(vector[0][1]) if vector else 1):
        raise ValueError("the vector's size")
    dtype = TYPES[op.kind]
    size = dtype.itemsize * len(names)
    destinations = [slots.destination(name) for name in names]
    register = np.dtype(f"{dtype.kind}{max(dtype.itemsize, 2)}") if dtype.kind in "ui" else dtype
    slot, offset = slots.address(source)
    item_text = f"{item.text} ({item.line})"

    def load(threads: Threads) -> None:
        shared = space == "shared"
        memory = threads.shared if shared else threads.global_memory
        address = _addresses(threads, slot, offset, shared)
        if shared:
            address = threads.shared_address(address, size)
        items = memory.load(address, size, threads, item_text)
        parts = np.ascontiguousarray(items).view(f"u{dtype.itemsize}").reshape(len(address), len(names))
        for i, d in enumerate(destinations):
            part = np.ascontiguousarray(parts[:, i]).view(dtype)
            if part.dtype.itemsize < register.itemsize:
                part = part.astype(register)
            if threads.mask is None or part.size == 1:
                threads.registers[d] = part
            else:
                whole = np.zeros(threads.count, part.dtype)
                whole[threads.mask] = part
                threads.registers[d] = whole

    return load


def _load_parameter(op: Opcode, names: Any, source: Any, slots: Slots) -> Run:
    if len(names) != 1 or not isinstance(source, Address) or source.offset:
        raise NotImplementedError("a part of a parameter")
    d, a, dtype = slots.destination(names[0]), slots.parameter(source.base), op.dtype

    def load(threads: Threads) -> None:
        threads.registers[d] = get(threads, a, dtype)

    return load


@instruction("st")
def decode_store(op: Opcode, item: Instruction, slots: Slots) -> Run:
    space, *rest = op.modifiers
    target, source = _without_policy(op, item)
    names: tuple[Any, ...] = source if isinstance(source, tuple) else (source,)
    vector = [m for m in rest if m in ("v2", "v4", "v8")]
    if set(rest) - set(vector) - CACHE_HINTS or space not in ("global", "shared"):
        raise NotImplementedError(item.op)
    if len(names) != (int(vector[0][1]) if vector else 1):
        raise ValueError("the vector's size")
    dtype = np.dtype(f"u{TYPES[op.kind].itemsize}")
    register = np.dtype(f"u{max(dtype.itemsize, 2)}")
    size = dtype.itemsize * len(names)
    sources = [slots.source(name, register) for name in names]
    slot, offset = slots.address(target)
    item_text = f"{item.text} ({item.line})"
    packed = {16: "c16", 8: "u8", 4: "u4", 2: "u2", 1: "u1"}[min(size, 16)]

    def store(threads: Threads) -> None:
        shared = space == "shared"
        address = _addresses(threads, slot, offset, True)
        if shared:
            address = threads.shared_address(address, size)
        values = np.empty((len(address), len(names)), dtype)
        for i, a in enumerate(sources):
            x = get(threads, a, register)
            values[:, i] = x if x.size == 1 or threads.mask is None else x[threads.mask]
        memory = threads.shared if shared else threads.global_memory
        memory.store(address, values.view(packed), threads, item_text)

    return store


def _matrices(op: Opcode, item: Instruction, names: tuple[Any, ...]) -> None:
    """Raises unless these are matrices of 8 rows of 16 bytes, as many as there are names."""
    sync, aligned, shape, *count, space = op.modifiers
    if (sync, aligned, shape, space, op.kind) != ("sync", "aligned", "m8n8", "shared", "b16"):
        raise NotImplementedError(item.op)
    if len(names) != (int(count[0][1]) if count else 1):
        raise ValueError("the number of matrices")


def _matrix_addresses(threads: Threads, slot: int, offset: int, number: int, text: str) -> list[Array]:
    """Of each matrix, the 4 bytes of every active thread: threads 8j .. 8j + 7 hold the rows of matrix j."""
    threads.whole_warps(text, np.full(1, 0xFFFFFFFF, np.uint32))
    whole = np.zeros(threads.count, I64)
    active = threads.active()
    whole[active] = threads.shared_address(_addresses(threads, slot, offset, True), 16)
    lane = threads.lanes % WARP
    addresses = []
    for j in range(number):
        rows = whole[threads.lanes - lane + 8 * j + lane // 4]
        if (rows[active] % 16).any():
            raise Fault(f"{text}: a row's address is not a multiple of 16")
        addresses.append((rows + 4 * (lane % 4))[active])
    return addresses


@instruction("ldmatrix")
def decode_matrix_load(op: Opcode, item: Instruction, slots: Slots) -> Run:
    names: Any
    names, source = item.operands
    _matrices(op, item, names)
    destinations = [slots.destination(name) for name in names]
    slot, offset = slots.address(source)
    text = f"{item.text} ({item.line})"

    def load(threads: Threads) -> None:
        addresses = _matrix_addresses(threads, slot, offset, len(destinations), text)
        for d, address in zip(destinations, addresses, strict=True):
            result = np.zeros(threads.count, U32)
            result[threads.active()] = threads.shared.load(address, 4, threads, text)[:, 0]
            threads.registers[d] = result

    return load


@instruction("stmatrix")
def decode_matrix_store(op: Opcode, item: Instruction, slots: Slots) -> Run:
    names: Any
    target, names = item.operands
    _matrices(op, item, names)
    sources = [slots.source(name, U32) for name in names]
    slot, offset = slots.address(target)
    text = f"{item.text} ({item.line})"

    def store(threads: Threads) -> None:
        addresses = _matrix_addresses(threads, slot, offset, len(sources), text)
        for a, address in zip(sources, addresses, strict=True):
            values = np.broadcast_to(get(threads, a, U32), (threads.count,))[threads.active()]
            threads.shared.store(address, values[:, None].view("u4"), threads, text)

    return store
