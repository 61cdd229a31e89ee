"""Integers, bits, predicates, moves and conversions between integers: every thread for itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .arithmetic import F16, I64, U16, U32, U64, Array, bf16_to_f32
from .decode import BOOL, TYPES, DType, Opcode, Run, Slots, get, instruction
from .parse import Instruction
from .threads import Threads

Function = Callable[..., Any]


def elementwise(function: Function, dtypes: list[DType], item: Instruction, slots: Slots) -> Run:
    """destination = function(sources), the sources seen as these types."""
    to, *operands = item.operands
    if len(operands) != len(dtypes):
        raise ValueError(f"expected {len(dtypes)} operands, got {len(operands)}")
    d = slots.destination(to)
    sources = [slots.source(operand, dtype) for operand, dtype in zip(operands, dtypes, strict=True)]
    if len(sources) == 1:
        (a,), (ta,) = sources, dtypes

        def unary(threads: Threads) -> None:
            r = threads.registers
            x: Any = r[a]
            r[d] = function(x if x.dtype is ta else x.view(ta))

        return unary
    if len(sources) == 2:
        (a, b), (ta, tb) = sources, dtypes

        def binary(threads: Threads) -> None:
            r = threads.registers
            x: Any = r[a]
            y: Any = r[b]
            r[d] = function(x if x.dtype is ta else x.view(ta), y if y.dtype is tb else y.view(tb))

        return binary

    (a, b, c), (ta, tb, tc) = sources, dtypes

    def ternary(threads: Threads) -> None:
        r = threads.registers
        x: Any = r[a]
        y: Any = r[b]
        z: Any = r[c]
        r[d] = function(
            x if x.dtype is ta else x.view(ta), y if y.dtype is tb else y.view(tb), z if z.dtype is tc else z.view(tc)
        )

    return ternary


def quotient(a: Array, b: Array) -> Array:
    """Integer division towards zero. By zero it gives anything."""
    if a.dtype.kind == "u":
        return a // b
    q = a // b
    return q + ((q * b != a) & ((a < 0) != (b < 0)))


def remainder(a: Array, b: Array) -> Array:
    return a - quotient(a, b) * b


def _wide(dtype: DType) -> DType:
    return np.dtype(f"{dtype.kind}{2 * dtype.itemsize}")


@instruction("div", "rem")
def decode_division(op: Opcode, item: Instruction, slots: Slots) -> Run:
    if op.kind.startswith("f"):
        from .floats import decode_float_division

        return decode_float_division(op, item, slots)
    op.expect()
    return elementwise(quotient if op.name == "div" else remainder, [op.dtype] * 2, item, slots)


@instruction("mul", "mad")
def decode_product(op: Opcode, item: Instruction, slots: Slots) -> Run:
    if "lo" not in op.modifiers and "wide" not in op.modifiers:
        from .floats import decode_float

        return decode_float(op, item, slots)
    op.expect("lo", "wide")
    dtype, add = op.dtype, op.name == "mad"
    if "lo" in op.modifiers:
        function: Function = (lambda a, b, c: a * b + c) if add else (lambda a, b: a * b)
        return elementwise(function, [dtype] * (3 if add else 2), item, slots)
    wide = _wide(dtype)
    if add:
        return elementwise(lambda a, b, c: a.astype(wide) * b + c, [dtype, dtype, wide], item, slots)
    return elementwise(lambda a, b: a.astype(wide) * b, [dtype] * 2, item, slots)


BITS: dict[str, Function] = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}


@instruction(*BITS)
def decode_bits(op: Opcode, item: Instruction, slots: Slots) -> Run:
    op.expect()
    return elementwise(BITS[op.name], [op.dtype] * 2, item, slots)


@instruction("not")
def decode_not(op: Opcode, item: Instruction, slots: Slots) -> Run:
    op.expect()
    return elementwise(np.invert, [op.dtype], item, slots)


@instruction("shl", "shr")
def decode_shift(op: Opcode, item: Instruction, slots: Slots) -> Run:
    """The amount is 32 bits; where it is the width or more everything is shifted out, and numpy does that too."""
    op.expect()
    dtype = op.dtype
    shift: Any = np.left_shift if op.name == "shl" else np.right_shift
    return elementwise(lambda a, b: shift(a, b.astype(dtype)), [dtype, U32], item, slots)


@instruction("bfe")
def decode_field(op: Opcode, item: Instruction, slots: Slots) -> Run:
    """Bits [b, b + c) of a, with their sign for s32."""
    op.expect()
    if op.kind not in ("u32", "s32"):
        raise NotImplementedError(f"type {op.kind}")
    wide = I64 if op.kind == "s32" else U64

    def field(a: Array, b: Array, c: Array) -> Array:
        start, length = (b & np.uint32(255)).astype(wide), (c & np.uint32(255)).astype(wide)
        unused = (wide.type(64) - length).astype(wide)
        return (((a.astype(wide) >> start) << unused) >> unused).astype(op.dtype)

    return elementwise(field, [op.dtype, U32, U32], item, slots)


@instruction("prmt")
def decode_permutation(op: Opcode, item: Instruction, slots: Slots) -> Run:
    """Each byte of the result is one of the 8 of (a, b) that 4 bits of c name; their highest: its sign, 8 times."""
    if op.modifiers or op.kind != "b32":
        raise NotImplementedError(f"mode {op.kind}")

    def permute(a: Array, b: Array, c: Array) -> Array:
        both = b.astype(U64) << np.uint64(32) | a
        result = np.zeros(np.broadcast_shapes(both.shape, c.shape), U32)
        for i in range(4):
            selector = c >> np.uint32(4 * i) & np.uint32(15)
            byte = (both >> (selector & np.uint32(7)).astype(U64) * np.uint64(8)).astype("u1")
            sign = (byte.view("i1") >> 7).view("u1")
            result |= np.where(selector & np.uint32(8), sign, byte).astype(U32) << np.uint32(8 * i)
        return result

    return elementwise(permute, [U32, U32, U32], item, slots)


@instruction("mov")
def decode_move(op: Opcode, item: Instruction, slots: Slots) -> Run:
    op.expect()
    to, source = item.operands
    if isinstance(source, tuple):
        return _pack(op, item, slots)
    if isinstance(to, tuple):
        return _unpack(op, item, slots)
    d, a, dtype = slots.destination(to), slots.source(source, op.dtype), op.dtype

    def move(threads: Threads) -> None:
        threads.registers[d] = get(threads, a, dtype)

    return move


def _half(op: Opcode, parts: int) -> DType:
    return np.dtype(f"u{op.dtype.itemsize // parts}")


def _pack(op: Opcode, item: Instruction, slots: Slots) -> Run:
    """One register of several, the first in the lowest bits."""
    parts: Any
    to, parts = item.operands
    half, whole = _half(op, len(parts)), np.dtype(f"u{op.dtype.itemsize}")
    d, sources = slots.destination(to), [slots.source(part, half) for part in parts]

    def pack(threads: Threads) -> None:
        values = np.broadcast_arrays(*(get(threads, slot, half) for slot in sources))
        threads.registers[d] = np.stack(values, axis=1).reshape(-1).view(whole)

    return pack


def _unpack(op: Opcode, item: Instruction, slots: Slots) -> Run:
    to: Any
    to, source = item.operands
    half, whole = _half(op, len(to)), np.dtype(f"u{op.dtype.itemsize}")
    destinations = [(i, slots.destination(part)) for i, part in enumerate(to) if part != "_"]
    a, count = slots.source(source, whole), len(to)

    def unpack(threads: Threads) -> None:
        parts = np.ascontiguousarray(get(threads, a, whole)).view(half).reshape(-1, count)
        for i, d in destinations:
            threads.registers[d] = parts[:, i].copy()

    return unpack


@instruction("selp")
def decode_select(op: Opcode, item: Instruction, slots: Slots) -> Run:
    op.expect()
    return elementwise(lambda a, b, p: np.where(p, a, b), [op.dtype, op.dtype, BOOL], item, slots)


ORDERED: dict[str, Function] = {
    "eq": np.equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "ne": lambda a, b: (a < b) | (a > b),
}  # fmt: skip
FLOAT_COMPARISONS: dict[str, Function] = {
    **ORDERED,
    # With a `u`, also where one of the two is NaN.
    "equ": lambda a, b: ~((a < b) | (a > b)),
    "neu": np.not_equal,
    "ltu": lambda a, b: ~(a >= b),
    "leu": lambda a, b: ~(a > b),
    "gtu": lambda a, b: ~(a <= b),
    "geu": lambda a, b: ~(a < b),
    "num": lambda a, b: (a == a) & (b == b),
    "nan": lambda a, b: (a != a) | (b != b),
}
INTEGER_COMPARISONS: dict[str, Function] = {
    **ORDERED, "ne": np.not_equal, "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal,
}  # fmt: skip


@instruction("setp")
def decode_comparison(op: Opcode, item: Instruction, slots: Slots) -> Run:
    (comparison,) = op.modifiers
    if op.kind in ("bf16x2", "f16x2"):
        widen: Function = bf16_to_f32 if op.kind == "bf16x2" else (lambda a: a.view(F16))
        return _compare_pairs(FLOAT_COMPARISONS[comparison], widen, item, slots)
    if op.kind == "bf16":
        compare = FLOAT_COMPARISONS[comparison]
        return elementwise(lambda a, b: compare(bf16_to_f32(a), bf16_to_f32(b)), [U16, U16], item, slots)
    table = FLOAT_COMPARISONS if op.kind.startswith("f") else INTEGER_COMPARISONS
    if comparison not in table:
        raise NotImplementedError(f"comparison {comparison}")
    return elementwise(table[comparison], [op.dtype] * 2, item, slots)


def _compare_pairs(compare: Function, widen: Function, item: Instruction, slots: Slots) -> Run:
    """`setp.eq.bf16x2 p|q, a, b`: p compares the lower halves, q the upper ones."""
    to, *operands = item.operands
    p, q = (slots.destination(name) for name in str(to).split("|"))
    a, b = (slots.source(operand, U32) for operand in operands)

    def run(threads: Threads) -> None:
        x, y = get(threads, a, U32), get(threads, b, U32)
        for destination, shift in ((p, 0), (q, 16)):
            halves = ((register >> np.uint32(shift)).astype(U16) for register in (x, y))
            threads.registers[destination] = compare(*map(widen, halves))

    return run


@instruction("cvt")
def decode_conversion(op: Opcode, item: Instruction, slots: Slots) -> Run:
    *modifiers, to = op.modifiers
    floating = ("f16", "bf16", "f32", "f64", "bf16x2", "f16x2")
    if to in floating or op.kind in floating:
        from .floats import decode_float_conversion

        return decode_float_conversion(modifiers, to, op.kind, item, slots)
    if modifiers:
        raise NotImplementedError(f"modifiers {modifiers}")
    source, target = TYPES[op.kind], TYPES[to]

    def convert(threads: Threads) -> None:
        x: Any = threads.registers[a]
        if x.itemsize > source.itemsize:  # the low bits of a wider register
            x = x.view(f"u{x.itemsize}").astype(f"u{source.itemsize}")
        x = x.view(source).astype(target)
        # A register wider than the type holds the number with its sign.
        threads.registers[d] = x if x.itemsize > 1 else x.astype(f"{target.kind}2")

    d, a = slots.destination(item.operands[0]), slots.source(item.operands[1], source)
    return convert


@instruction("cvta")
def decode_generic_address(op: Opcode, item: Instruction, slots: Slots) -> Run:
    if op.modifiers not in (("to", "global"), ("global",)):
        raise NotImplementedError("only global memory has generic addresses here")
    return elementwise(lambda a: a, [op.dtype], item, slots)
