"""Instructions -> steps: functions of the threads, with registers and constants looked up once.

The modules that give instructions their meaning register a decoder per opcode, by `@instruction`. A decoder accounts
for every part of the opcode; what it does not know, modifier or instruction, raises: nothing is guessed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from .arithmetic import F16, F32, F64, I16, I32, I64, U16, U32, U64, Array
from .parse import Address, Function, Instruction, Operand
from .threads import Threads

Run = Callable[[Threads], None]
DType = np.dtype[Any]

BOOL = np.dtype(bool)
WIDTHS: dict[str, DType] = {"pred": BOOL, "b16": U16, "b32": U32, "b64": U64}
TYPES: dict[str, DType] = {
    "b8": np.dtype("u1"), "u8": np.dtype("u1"), "s8": np.dtype("i1"), "b16": U16, "u16": U16, "s16": I16, "b32": U32,
    "u32": U32, "s32": I32, "b64": U64, "u64": U64, "s64": I64, "f16": F16, "f32": F32, "f64": F64, "pred": BOOL,
}  # fmt: skip
SHARED_SYMBOL = "global_smem"  # Triton's only one, at address 0 of a CTA's shared memory


class Step(NamedTuple):
    """run: writes `destinations`, for threads of the mask and perhaps others, whose numbers are put back.
    predicate: slot or -1."""

    run: Run
    destinations: tuple[int, ...]
    predicate: int
    negated: bool
    instruction: Instruction


@dataclass(frozen=True)
class Opcode:
    """`fma.rn.ftz.f32`: name "fma", modifiers {"rn", "ftz"}, kind "f32"."""

    name: str
    modifiers: tuple[str, ...]
    kind: str

    def expect(self, *known: str) -> None:
        unknown = set(self.modifiers) - set(known)
        if unknown:
            raise NotImplementedError(f"modifiers {sorted(unknown)}")

    @property
    def ftz(self) -> bool:
        return "ftz" in self.modifiers

    @property
    def dtype(self) -> DType:
        if self.kind not in TYPES:
            raise NotImplementedError(f"type {self.kind!r}")
        return TYPES[self.kind]


Decoder = Callable[[Opcode, Instruction, "Slots"], Run]
DECODERS: dict[str, Decoder] = {}


def instruction(*names: str) -> Callable[[Decoder], Decoder]:
    def register(decoder: Decoder) -> Decoder:
        for name in names:
            assert name not in DECODERS
            DECODERS[name] = decoder
        return decoder

    return register


class Slots:
    """Where registers, constants and special registers lie in `Threads.registers`."""

    def __init__(self, function: Function) -> None:
        self.function = function
        self.numbers: dict[tuple[str, str], int] = {}
        self.initial: list[Array | None] = []
        self.specials: dict[str, int] = {}
        self.written: list[int] = []  # destinations of the instruction that is being decoded
        self.ever_written: set[int] = set()

    def _new(self, key: tuple[str, str], value: Array | None) -> int:
        self.numbers[key] = len(self.initial)
        self.initial.append(value)
        return self.numbers[key]

    def register(self, name: str) -> int:
        key = ("register", name)
        if key in self.numbers:
            return self.numbers[key]
        kind = self.function.register_type(name)
        if kind not in WIDTHS:
            raise NotImplementedError(f"register {name} of type {kind!r}")
        return self._new(key, None)

    def poison_undefined(self) -> None:
        """LLVM's undef, a register that nobody writes or that a comment names, is all ones: NaN."""
        for (what, name), slot in self.numbers.items():
            if what == "register" and (slot not in self.ever_written or name in self.function.undefined):
                kind = WIDTHS[str(self.function.register_type(name))]
                self.initial[slot] = np.full(kind.itemsize, 0xFF, np.uint8).view(kind)

    def destination(self, operand: Operand) -> int:
        """The slot of a result; `_`, which nobody reads, has one too."""
        if not isinstance(operand, str):
            raise NotImplementedError(f"destination {operand}")
        slot = self._new(("sink", str(len(self.initial))), None) if operand == "_" else self.register(operand)
        self.written.append(slot)
        self.ever_written.add(slot)
        return slot

    def source(self, operand: Operand, dtype: DType) -> int:
        """The slot of a register, a special register, or a constant of that type."""
        if not isinstance(operand, str):
            raise NotImplementedError(f"operand {operand}")
        if operand.startswith("%"):
            if self.function.register_type(operand) is not None:
                return self.register(operand)
            if operand not in self.specials:
                self.specials[operand] = self._new(("special", operand), None)
            return self.specials[operand]
        key = (str(dtype), operand)
        return self.numbers[key] if key in self.numbers else self._new(key, constant(operand, dtype))

    def parameter(self, name: str) -> int:
        key = ("parameter", name)
        if name not in self.function.parameters:
            raise NotImplementedError(f"no such parameter: {name}")
        return self.numbers[key] if key in self.numbers else self._new(key, None)

    def address(self, operand: Operand) -> tuple[int, int]:
        """The slot and the offset of an address in memory."""
        if not isinstance(operand, Address):
            raise NotImplementedError(f"address {operand}")
        dtype = U64 if self.function.register_type(operand.base) == "b64" else U32
        return self.source(operand.base, dtype), operand.offset


def constant(text: str, dtype: DType) -> Array:
    """A literal as an array of one: 7, -1, 0x10U, 0f3F800000, 0d3FF0000000000000, or the start of shared memory."""
    if text == SHARED_SYMBOL:
        return np.zeros(1, dtype)
    if text[:2] in ("0f", "0F"):
        bits = np.array([int(text[2:], 16)], U32)
    elif text[:2] in ("0d", "0D"):
        bits = np.array([int(text[2:], 16)], U64)
    else:
        whole = int(text.removesuffix("U"), 0) % 2 ** (8 * dtype.itemsize)
        bits = np.array([whole], f"u{dtype.itemsize}")
    if bits.itemsize != dtype.itemsize:
        raise NotImplementedError(f"constant {text} as {dtype}")
    return bits.view(dtype)


def get(threads: Threads, slot: int, dtype: DType) -> Array:
    x: Any = threads.registers[slot]  # None, without a dtype, where nothing was written: `execute` tells of it
    return x if x.dtype is dtype else x.view(dtype)


def opcode_of(op: str) -> Opcode:
    # Two names of one thing; the other CTAs of a cluster, `shared::cluster`, are unknown.
    name, *rest = op.replace(".shared::cta", ".shared").split(".")
    kind = rest.pop() if rest else ""
    return Opcode(name, tuple(rest), kind)


def decode(item: Instruction, slots: Slots) -> Step:
    """Raises NotImplementedError for what is unknown."""
    opcode = opcode_of(item.op)
    if opcode.name not in DECODERS:
        raise NotImplementedError(f"unknown PTX instruction: {item.text}")
    slots.written = []
    try:
        run = DECODERS[opcode.name](opcode, item, slots)
    except (NotImplementedError, ValueError) as error:
        raise NotImplementedError(f"PTX instruction not understood: {item.text}: {error}") from error
    predicate = slots.source(item.predicate.lstrip("!"), BOOL) if item.predicate else -1
    return Step(run, tuple(slots.written), predicate, item.predicate.startswith("!"), item)
