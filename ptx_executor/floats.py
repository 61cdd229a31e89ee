"""Floating point, every thread for itself: arithmetic, approximate functions and conversions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .arithmetic import (
    F16,
    F32,
    F64,
    U16,
    U32,
    U64,
    Array,
    approximate,
    bf16_to_f32,
    f32_to_bf16,
    f64_to_bf16,
    flushed,
    fma32,
    fma64,
    maximum,
    minimum,
)
from .decode import TYPES, DType, Opcode, Run, Slots, get, instruction
from .integers import elementwise
from .parse import Instruction
from .threads import Threads

Function = Callable[..., Any]


FUNCTIONS: dict[str, Function] = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "min": minimum, "max": maximum, "neg": np.negative,
    "abs": np.abs,
}  # fmt: skip
MODIFIERS = {
    "add": {"rn", "ftz"}, "sub": {"rn", "ftz"}, "mul": {"rn", "ftz"}, "min": {"ftz"}, "max": {"ftz", "NaN"},
    "neg": {"ftz"}, "abs": {"ftz"}, "fma": {"rn", "ftz"},
}  # fmt: skip


def _flushing(function: Function) -> Function:
    return lambda *operands: flushed(function(*map(flushed, operands)))


def _mixed(kind: str, function: Function, item: Instruction, slots: Slots) -> Run:
    """`sub.rn.f32.bf16 d, a, c`: a is bf16, c and the result are fp32."""
    if kind not in ("bf16", "f16"):
        raise NotImplementedError(f"type {kind}")
    widen: Function = bf16_to_f32 if kind == "bf16" else (lambda a: a.view(F16).astype(F32))
    if len(item.operands) == 3:
        return elementwise(lambda a, c: function(widen(a), c), [U16, F32], item, slots)
    return elementwise(lambda a, b, c: function(widen(a), widen(b), c), [U16, U16, F32], item, slots)


def _pairs(function: Function, item: Instruction, slots: Slots) -> Run:
    """Two fp32 in a register of 64 bits."""

    def both(*operands: Array) -> Array:
        pairs = np.broadcast_arrays(*(np.ascontiguousarray(x).view(F32).reshape(-1, 2) for x in operands))
        return np.ascontiguousarray(function(*pairs)).reshape(-1).view(U64)

    return elementwise(both, [U64] * (len(item.operands) - 1), item, slots)


@instruction("add", "sub", "min", "max", "neg", "abs", "fma")
def decode_float(op: Opcode, item: Instruction, slots: Slots) -> Run:
    arity = len(item.operands) - 1
    if op.kind[0] in "sub" and op.kind != "bf16":  # integers
        op.expect()
        integer: Function = {"min": np.minimum, "max": np.maximum}.get(op.name) or FUNCTIONS[op.name]
        return elementwise(integer, [op.dtype] * arity, item, slots)
    mixed = op.modifiers[-1:] == ("f32",)
    modifiers = set(op.modifiers[:-1] if mixed else op.modifiers)
    if modifiers - MODIFIERS[op.name]:
        raise NotImplementedError(f"modifiers {sorted(modifiers)}")
    if op.name == "fma":
        function: Function = fma64 if op.kind == "f64" else fma32
    elif op.name in ("min", "max") and arity == 3:
        two = FUNCTIONS[op.name]
        function = lambda a, b, c: two(two(a, b), c)  # noqa: E731
    else:
        function = FUNCTIONS[op.name]
    if "NaN" in modifiers:
        function = np.maximum
    if "ftz" in modifiers:
        function = _flushing(function)
    if mixed:
        return _mixed(op.kind, function, item, slots)
    if op.kind == "f32x2":
        return _pairs(function, item, slots)
    if op.kind not in ("f32", "f64"):
        raise NotImplementedError(f"type {op.kind}")
    return elementwise(function, [op.dtype] * arity, item, slots)


APPROXIMATE: dict[str, Function] = {
    "ex2": np.exp2, "lg2": np.log2, "rcp": np.reciprocal, "sqrt": np.sqrt, "rsqrt": lambda x: 1 / np.sqrt(x),
    "tanh": np.tanh,
}  # fmt: skip


def _approximate(name: str, function: Function, ftz: bool, item: Instruction, slots: Slots) -> Run:
    d = slots.destination(item.operands[0])
    sources = [slots.source(operand, F32) for operand in item.operands[1:]]

    def run(threads: Threads) -> None:
        operands = [get(threads, slot, F32) for slot in sources]
        if ftz:
            operands = [flushed(x) for x in operands]
        result = approximate(name, function, threads.perturbation, *operands)
        threads.registers[d] = flushed(result) if ftz else result

    return run


def _gross_reciprocal(x: Array) -> Array:
    """rcp.approx.ftz.f64: of the upper 32 bits, 20 of the significand, into the upper 32 bits."""
    upper = np.uint64(0xFFFFFFFF00000000)
    operand = (x.view(U64) & upper).view(F64)
    operand = operand * (np.abs(operand) >= 2.0**-1022)
    result = ((1 / operand).view(U64) & upper).view(F64)
    return result * (np.abs(result) >= 2.0**-1022)


@instruction(*APPROXIMATE)
def decode_function(op: Opcode, item: Instruction, slots: Slots) -> Run:
    if op.name == "rcp" and op.kind == "f64" and op.modifiers == ("approx", "ftz"):
        return elementwise(_gross_reciprocal, [F64], item, slots)
    op.expect("approx", "ftz", "rn")
    if op.kind not in ("f32", "f64"):
        raise NotImplementedError(f"type {op.kind}")
    if "rn" in op.modifiers:
        if op.name not in ("rcp", "sqrt"):
            raise NotImplementedError("rn")
        function: Function = APPROXIMATE[op.name]
        return elementwise(_flushing(function) if op.ftz else function, [op.dtype], item, slots)
    if "approx" not in op.modifiers or op.kind != "f32":
        raise NotImplementedError("neither approx.f32 nor rn")
    return _approximate(op.name, APPROXIMATE[op.name], op.ftz, item, slots)


def decode_float_division(op: Opcode, item: Instruction, slots: Slots) -> Run:
    op.expect("full", "approx", "ftz", "rn")
    if op.name != "div":
        raise NotImplementedError(op.name)
    if "rn" in op.modifiers:
        return elementwise(_flushing(np.divide) if op.ftz else np.divide, [op.dtype] * 2, item, slots)
    if op.kind != "f32":
        raise NotImplementedError(f"type {op.kind}")

    def limited(a: Array, b: Array) -> Array:
        """div.approx: where 2^126 < |b| < 2^128 the quotient is 0, or NaN of an infinity."""
        big = (np.abs(b) > 2.0**126) & np.isfinite(b)
        return np.where(big, a * 0, a / b)

    return _approximate("div", np.divide if "full" in op.modifiers else limited, op.ftz, item, slots)


def _to_integer(modifiers: list[str], target: DType) -> Function:
    rounding = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
    (mode,) = [m for m in modifiers if m != "ftz"]
    limits = np.iinfo(target)

    def convert(x: Array) -> Array:
        """Beyond its range to the nearest end of it; NaN is 0."""
        whole = rounding[mode](x.astype(F64))
        inside = (whole >= limits.min) & (whole < float(limits.max) + (1 if target.itemsize < 8 else 0))
        result = np.where(inside, whole, 0).astype(target)
        result = np.where(whole > limits.max, limits.max, result)
        return np.where(whole < limits.min, limits.min, result).astype(target)

    return convert


def decode_float_conversion(modifiers: list[str], to: str, kind: str, item: Instruction, slots: Slots) -> Run:
    known = {"rn", "ftz", "rni", "rzi", "rmi", "rpi"}
    if set(modifiers) - known:
        raise NotImplementedError(f"modifiers {modifiers}")
    if to in ("bf16x2", "f16x2") and kind == "f32":
        narrow: Function = f32_to_bf16 if to == "bf16x2" else (lambda x: x.astype(F16).view(U16))

        def pack(high: Array, low: Array) -> Array:
            return (narrow(high).astype(U32) << np.uint32(16)) | narrow(low)

        return elementwise(pack, [F32, F32], item, slots)
    if (to, kind) == ("f32", "bf16"):
        return elementwise(bf16_to_f32, [U16], item, slots)
    if (to, kind) == ("bf16", "f32"):
        return elementwise(f32_to_bf16, [F32], item, slots)
    if (to, kind) == ("f64", "bf16"):
        return elementwise(lambda x: bf16_to_f32(x).astype(F64), [U16], item, slots)
    if (to, kind) == ("bf16", "f64"):
        return elementwise(f64_to_bf16, [F64], item, slots)
    if "bf16" in (to, kind):
        raise NotImplementedError("bf16")
    source, target = TYPES[kind], TYPES[to]
    flush = flushed if "ftz" in modifiers and kind == "f32" else None
    if target.kind != "f":
        convert = _to_integer(modifiers, target)
    elif {"rni", "rzi", "rmi", "rpi"} & set(modifiers):
        rounding = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
        (mode,) = [m for m in modifiers if m in rounding]
        convert = lambda x: rounding[mode](x).astype(target)  # noqa: E731
    else:
        convert = lambda x: x.astype(target)  # noqa: E731
    if flush is not None:
        return elementwise(lambda x: convert(flush(x)), [source], item, slots)
    return elementwise(convert, [source], item, slots)
