"""The text of a PTX module with one kernel, as Triton and LLVM write it -> parameters, registers and instructions."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import NamedTuple


class Address(NamedTuple):
    """[base + offset]: the base a register, a parameter or a symbol."""

    base: str
    offset: int


Operand = str | Address | tuple[str, ...]


@dataclass(frozen=True)
class Instruction:
    """`@predicate op operands;`  predicate: "%p1", "!%p1" or "".  line: where Triton's source has it, if known."""

    op: str
    operands: tuple[Operand, ...]
    predicate: str
    text: str
    line: str

    @property
    def parts(self) -> list[str]:
        return self.op.split(".")


@dataclass
class Function:
    """A kernel.  parameters: name to type, in order.  registers: name to type.  undefined: registers that LLVM leaves
    without a value on purpose.  body: instructions, and labels as strings."""

    name: str
    parameters: dict[str, str]
    threads: int
    registers: dict[str, str] = field(default_factory=dict)
    families: dict[str, str] = field(default_factory=dict)  # "%r" of `.reg .b32 %r<9>;` to "b32"
    undefined: set[str] = field(default_factory=set)
    body: list[Instruction | str] = field(default_factory=list)

    def register_type(self, name: str) -> str | None:
        if name in self.registers:
            return self.registers[name]
        return self.families.get(name.rstrip("0123456789"))


_ENTRY = re.compile(r"\.entry\s+(\S+?)\s*\((.*?)\)(.*?)\n\{(.*?)\n\}", re.DOTALL)
_PARAMETER = re.compile(r"\.param\s+\.(\w+)\b[^,]*?(\w+)\s*$")
_STATEMENT = re.compile(r"(?:@(!?)(%\w+)\s+)?([a-z][\w.:]*)\s*(.*)$", re.DOTALL)
_OPERAND = re.compile(r"\{([^}]*)\}|\[([^\]]*)\]|([^,\s]+)")
_UNDEFINED = re.compile(r"implicit-def:\s*(%\w+)")
_LOCATION = re.compile(r"\.loc\s[^/]*//\s*(\S+)")


def parse(text: str) -> Function:
    """The one kernel of a module. Raises ValueError where the text is not understood."""
    entries = _ENTRY.findall(text)
    if len(entries) != 1:
        raise ValueError(f"expected one kernel in the PTX, got {len(entries)}")
    name, parameters, directives, body = entries[0]
    types = {}
    for parameter in filter(None, map(str.strip, parameters.split(","))):
        match = _PARAMETER.match(parameter)
        if match is None:
            raise ValueError(f"parameter not understood: {parameter}")
        types[match.group(2)] = match.group(1)
    threads = re.search(r"\.reqntid\s+(\d+)", directives)
    if threads is None:
        raise ValueError("no .reqntid: the number of threads is not known")
    function = Function(name, types, int(threads.group(1)))
    _Body(function).read(body)
    return function


class _Body:
    """The statements between a kernel's braces. Names declared in an inner `{ .reg ...; }` get a suffix."""

    def __init__(self, function: Function) -> None:
        self.function = function
        self.scopes: list[dict[str, str]] = []
        self.num_scopes = 0
        self.line = ""

    def read(self, body: str) -> None:
        pending = ""
        for line in body.splitlines():
            code, _, comment = line.partition("//")
            undefined = _UNDEFINED.search(comment)
            if undefined:
                self.function.undefined.add(undefined.group(1))
            code = code.strip()
            if code.startswith((".loc", ".file", ".pragma")):
                location = _LOCATION.search(line)
                # Line 0 is the compiler's own; the last known line is nearer to the truth.
                if location and ":0:" not in location.group(1):
                    self.line = location.group(1)
                continue
            label = re.fullmatch(r"(\$\w+):", code)
            if label:
                self.function.body.append(label.group(1))
                continue
            pending = self.statements(f"{pending} {code}")
        if pending.strip():
            raise ValueError(f"statement without an end: {pending.strip()}")

    def statements(self, text: str) -> str:
        """Take whole statements off the text; what is left is an unfinished one."""
        while True:
            text = text.strip()
            if text.startswith("{"):
                self.scopes.append({})
                text = text[1:]
            elif text.startswith("}"):
                self.scopes.pop()
                text = text[1:]
            elif ";" in text:
                statement, _, text = text.partition(";")
                self.statement(statement.strip())
            else:
                return text

    def statement(self, text: str) -> None:
        if text.startswith(".reg"):
            self.declare(text)
            return
        match = _STATEMENT.fullmatch(text)
        if match is None:
            raise ValueError(f"statement not understood: {text}")
        negated, predicate, op, operands = match.groups()
        self.function.body.append(
            Instruction(
                op,
                tuple(self.operand(*groups) for groups in _OPERAND.findall(operands)),
                (negated or "") + self.scoped(predicate) if predicate else "",
                " ".join(text.split()),
                self.line,
            )
        )

    def declare(self, text: str) -> None:
        _, kind, names = text.split(None, 2)
        for name in names.split(","):
            name, family, _ = name.strip().partition("<")
            if family:
                self.function.families[name] = kind[1:]
            elif self.scopes:
                self.num_scopes += 1
                own = f"{name}@{self.num_scopes}"
                self.scopes[-1][name] = own
                self.function.registers[own] = kind[1:]
            else:
                self.function.registers[name] = kind[1:]

    def scoped(self, name: str) -> str:
        return next((scope[name] for scope in reversed(self.scopes) if name in scope), name)

    def operand(self, vector: str, address: str, single: str) -> Operand:
        if vector:
            return tuple(self.scoped(name.strip()) for name in vector.split(","))
        if address:
            base, _, offset = address.replace(" ", "").partition("+")
            return Address(self.scoped(base), int(offset or "0", 0))
        # `%r1|%p1`, two results of one instruction.
        return "|".join(self.scoped(name) for name in single.split("|"))
