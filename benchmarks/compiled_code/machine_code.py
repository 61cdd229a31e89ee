"""The machine code of a compiled kernel for an NVIDIA GPU: its main loop, and how many instructions it spends by pipe.

An instruction is one line of `nvdisasm`. It is counted whether or not its predicate holds, because it is issued either
way; so is what lies behind a branch inside of the loop.
"""

from __future__ import annotations

import functools
import hashlib
import re
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.runtime.cache import get_cache_manager

BINARIES = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

# The pipe that executes an instruction, by its name before the first dot. Packed instructions end in 2: they do two
# operations of fp32, and so does a vectorised HFMA2 of 16 bits in one lane. What is in none of these sets raises.
FMA = {"FADD", "FMUL", "FFMA", "FADD2", "FMUL2", "FFMA2", "FHADD", "FHFMA", "FSWZADD"}
HALF = {"HADD2", "HMUL2", "HFMA2", "HADD2_32I", "HFMA2_32I"}
IMAD = {"IMAD", "IMAD_X", "IDP", "UIMAD"}
ALU = {
    "BMSK", "CSEL", "F2FP", "FCHK", "FMNMX", "FMNMX3", "FSEL", "FSET", "FSETP", "HMNMX2", "HSET2", "HSETP2",
    "I2FP", "I2IP", "IABS", "IADD", "IADD3", "IADD_64", "IMNMX", "ISETP", "LEA", "LOP3", "MOV", "MOV64", "P2R",
    "PLOP3", "PRMT", "R2P", "SEL", "SEL64", "SGXT", "SHF", "SHL", "SHR", "VABSDIFF", "VHMNMX", "VIADD",
    "VIADDMNMX", "VIMNMX", "VIMNMX3", "VOTE",
}  # fmt: skip
SPECIAL = {"MUFU", "F2F", "F2I", "FRND", "I2F", "POPC", "FLO", "BREV"}
MEMORY = {
    "LDG",
    "LD",
    "LDS",
    "LDC",
    "LDL",
    "STG",
    "ST",
    "STS",
    "STL",
    "SHFL",
    "ATOMS",
    "ATOMG",
    "RED",
    "LDGSTS",
    "LDSM",
}
ISSUE_ONLY = {
    "ACQBULK", "BAR", "BMOV", "BRA", "BREAK", "BSSY", "BSYNC", "CALL", "CCTL", "CREDUX", "CS2R", "DEPBAR",
    "ERRBAR", "EXIT", "LDCU", "LDGDEPBAR", "MEMBAR", "NOP", "PREEXIT", "R2B", "R2UR", "REDUX", "RET", "S2R",
    "S2UR", "VOTEU", "WARPSYNC", "YIELD",
}  # fmt: skip


class Instruction(NamedTuple):
    """label: in front of it, or empty.  name: before the first dot.  text: without its predicate."""

    label: str
    name: str
    text: str


class Pipes(NamedTuple):
    """Slots that a piece of code takes, per thread.

    issue: instructions.  fma: fp32 operations, two of a packed instruction; an integer multiply-add, whose rate is
    half, takes two.  alu: comparisons, selections, integer and bit operations, conversions by packing.  mufu: ex2, rcp
    and conversions of the same pipe.  lsu: loads, stores and shuffles in units of 4 bytes.
    """

    issue: float
    fma: float
    alu: float
    mufu: float
    lsu: float

    def per(self, count: float) -> Pipes:
        return Pipes(*(slots / count for slots in self))

    def plus(self, other: Pipes) -> Pipes:
        return Pipes(*(a + b for a, b in zip(self, other, strict=True)))


class Walk(NamedTuple):
    """One trip of a main loop, or a whole kernel that has none, per thread.

    load_bytes: of logits, so of the widest loads.  store_bytes: all.  barriers: of a block.
    """

    pipes: Pipes
    load_bytes: int
    store_bytes: int
    barriers: int
    is_loop: bool


@functools.lru_cache
def disassembled(cubin: bytes) -> str:
    """The code alone, without following jumps through registers, of which there are none: a quarter less time.

    The program takes 0.3 s to start, so other processes find the text in Triton's cache.
    """
    key = hashlib.sha256(triton.__version__.encode() + cubin).hexdigest()
    cache, name = get_cache_manager(key), "code.sass"
    if known := cache.get_file(name):
        return Path(known).read_text(encoding="utf-8")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [BINARIES / "nvdisasm", "--print-code", "--no-dataflow", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    cache.put(text, name, binary=False)
    return text


def instructions(sass: str) -> list[Instruction]:
    """Of the kernel itself: functions that it calls, a 64-bit division for one, stand behind it under other names."""
    code: list[Instruction] = []
    label = ""
    for line in sass.splitlines():
        if match := re.match(r"(\.L_x_\d+|\$\S+):", line):
            if match.group(1).startswith("$"):
                break
            label = match.group(1)
        elif match := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(([A-Z]\w*)\S*.*?)\s*;", line):
            code.append(Instruction(label, match.group(2), match.group(1)))
            label = ""
    return code


def loops(code: Sequence[Instruction]) -> list[Sequence[Instruction]]:
    """The bodies of the innermost loops: from a label to the last branch back to it."""
    position = {it.label: i for i, it in enumerate(code) if it.label}
    ends: dict[int, int] = {}
    for i, it in enumerate(code):
        if it.name == "BRA" and (match := re.search(r"`\((\.L_x_\d+)\)", it.text)):
            target = position.get(match.group(1), len(code))
            if target < i:  # a branch to itself ends the kernel and is no loop
                ends[target] = i
    spans = list(ends.items())
    inner = [(a, b) for a, b in spans if not any((c, d) != (a, b) and a <= c and d <= b for c, d in spans)]
    return [code[a : b + 1] for a, b in inner]


def width(it: Instruction) -> int:
    """Bytes that one thread loads or stores."""
    flags = it.text.split()[0].split(".")
    wide = next((int(flag) // 8 for flag in flags if flag in ("64", "128", "256")), None)
    if wide is None:
        wide = 1 if {"U8", "S8"} & set(flags) else 2 if {"U16", "S16"} & set(flags) else 4
    return wide


def pipes(code: Sequence[Instruction]) -> Pipes:
    fma = alu = mufu = lsu = 0.0
    for it in code:
        if it.name in FMA:
            fma += 2 if it.name.endswith("2") else 1
        elif it.name in HALF:
            fma += 1
        elif it.name in IMAD:
            fma += 2
        elif it.name in ALU:
            alu += 1
        elif it.name in SPECIAL:
            mufu += 1
        elif it.name in MEMORY:
            lsu += max(width(it) / 4, 1)
        elif it.name not in ISSUE_ONLY and not it.name.startswith("U"):  # U: once per warp, on their own datapath
            raise ValueError(f"the pipe of {it.text!r} is not known")
    return Pipes(len(code), fma, alu, mufu, lsu)


def main_loops(code: Sequence[Instruction]) -> list[Sequence[Instruction]]:
    """The innermost loops that load the most bytes of global memory; none where none loads any.

    A kernel that goes over its rows twice has two of the kind. Loops that load less are tails.
    """
    bodies = loops(code)
    most = max((logit_bytes(body) for body in bodies), default=0)
    return [body for body in bodies if logit_bytes(body) == most] if most else []


def passes(kernel: Any) -> list[Walk]:
    """Of the main loops, or of the whole kernel where there is none."""
    code = instructions(disassembled(kernel.asm["cubin"]))
    return [_walk(body, is_loop=True) for body in main_loops(code)] or [_walk(code, is_loop=False)]


def logit_bytes(code: Sequence[Instruction]) -> int:
    """That are loaded: by the widest loads, as narrower ones are labels and coefficients."""
    loads = [width(it) for it in code if it.name == "LDG"]
    return sum(size for size in loads if size == max(loads))


def least_in_flight(cubin: bytes) -> int:
    """Bytes per thread, of the main loop that has fewest; of a kernel without one, of all of it."""
    code = instructions(disassembled(cubin))
    return min(
        in_flight(body, max(width(it) for it in body if it.name == "LDG")) for body in main_loops(code) or [code]
    )


def in_flight(code: Sequence[Instruction], size: int) -> int:
    """Bytes that loads of `size` bytes ask for before one of them is used, the most that there are at a time.

    A loop is gone through twice, so that a load at its end meets the beginning.
    """
    waiting: list[set[str]] = []
    most = 0
    for it in [*code, *code]:
        if it.name == "LDG" and width(it) == size:
            first = re.search(r"\bR(\d+),", it.text)
            assert first, it.text
            loaded = {f"R{int(first.group(1)) + i}" for i in range(max(1, size // 4))}
            waiting = [registers for registers in waiting if not registers & loaded] + [loaded]  # a register waits once
            most = max(most, size * len(waiting))
        else:
            operands = it.text if it.name in ("STG", "ST", "STS") else it.text.partition(",")[2]
            used = set(re.findall(r"\bR\d+\b", operands))
            waiting = [registers for registers in waiting if not registers & used]
    return most


def _walk(code: Sequence[Instruction], is_loop: bool) -> Walk:
    return Walk(
        pipes(code),
        load_bytes=logit_bytes(code),
        store_bytes=sum(width(it) for it in code if it.name == "STG"),
        barriers=sum(it.name == "BAR" for it in code),
        is_loop=is_loop,
    )
