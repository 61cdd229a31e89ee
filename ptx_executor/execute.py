"""A kernel, decoded once, and its execution: threads in lockstep, parted at branches, together at post-dominators."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from . import floats, integers, warps  # noqa: F401  they register what instructions mean
from .arithmetic import Array, Perturbation
from .decode import Slots, Step, decode
from .flow import Block, blocks_of
from .memory import Fault, Memory
from .parse import parse
from .races import check_races
from .threads import WARP, Threads

MOST_THREADS = 4096  # side by side: a register of theirs fits the first-level cache


class Piece(NamedTuple):
    """A basic block, decoded.  predicate: slot of the branch's, or -1."""

    steps: list[Step]
    predicate: int
    negated: bool
    block: Block


@dataclass
class Split:
    """Threads on their way through the blocks, until they come to `join`."""

    mask: Array | None
    at: int
    join: int


class Program:
    """A kernel's PTX, ready to run. Raises NotImplementedError for an instruction that is not known."""

    def __init__(self, text: str) -> None:
        self.function = parse(text)
        self.slots = Slots(self.function)
        self.pieces: list[Piece] = []
        for block in blocks_of(self.function):
            steps = [decode(item, self.slots) for item in block.instructions]
            condition = block.branch.predicate if block.branch else ""
            slot = self.slots.register(condition.lstrip("!")) if condition else -1
            self.pieces.append(Piece(steps, slot, condition.startswith("!"), block))
        self.slots.poison_undefined()
        self.end = len(self.pieces)

    def run(
        self, grid: tuple[int, int, int], arguments: list[Array], memory: Memory, shared_bytes: int,
        perturbation: Perturbation | None, order: np.random.Generator, races: bool,
    ) -> None:  # fmt: skip
        """Run all CTAs, some side by side, in the generator's order.  arguments: arrays of one number each."""
        per_cta = self.function.threads
        if per_cta % WARP:
            raise NotImplementedError(f"{per_cta} threads, which are not whole warps")
        ctas = order.permutation(int(np.prod(grid)))
        side_by_side = max(MOST_THREADS // per_cta, 1)
        for start in range(0, len(ctas), side_by_side):
            threads = Threads(
                ctas[start : start + side_by_side], per_cta, list(self.slots.initial), memory, shared_bytes,
                perturbation,
            )  # fmt: skip
            for name, argument in zip(self.function.parameters, arguments, strict=True):
                slot = self.slots.numbers.get(("parameter", name))
                if slot is not None:
                    threads.registers[slot] = argument
            for name, slot in self.slots.specials.items():
                threads.registers[slot] = _special(name, threads, grid)
            with np.errstate(all="ignore"):
                self._run(threads)
            if races:
                check_races(threads.shared, self.function.name)
        if races:
            check_races(memory, self.function.name)

    def _run(self, threads: Threads) -> None:
        stack = [Split(None, 0, self.end)]
        while stack:
            top = stack[-1]
            if top.at in (top.join, self.end):
                stack.pop()
                continue
            piece = self.pieces[top.at]
            threads.mask = top.mask
            self._run_steps(piece, threads)
            self._branch(piece, top, stack, threads)

    def _run_steps(self, piece: Piece, threads: Threads) -> None:
        step = None
        try:
            for step in piece.steps:
                if threads.mask is None and step.predicate < 0:
                    step.run(threads)
                else:
                    _run_masked(step, threads)
        except Fault as fault:
            assert step is not None
            where = f"\n  in {self.function.name}, {step.instruction.line}: {step.instruction.text}"
            raise Fault(f"{fault}{where}") from None
        except AttributeError as error:
            assert step is not None
            if "NoneType" not in str(error):
                raise
            text = f"{step.instruction.line}: {step.instruction.text}"
            raise Fault(f"a register is read before it is written\n  in {self.function.name}, {text}") from error

    def _branch(self, piece: Piece, top: Split, stack: list[Split], threads: Threads) -> None:
        block = piece.block
        if piece.predicate < 0:
            top.at = block.taken
            return
        condition = threads.registers[piece.predicate]
        if condition is None:
            raise Fault(f"a predicate is read before it is written: {block.branch}")
        if piece.negated:
            condition = ~condition
        if condition.size == 1:
            top.at = block.taken if condition[0] else block.otherwise
            return
        taken = condition if top.mask is None else condition & top.mask
        number = int(np.count_nonzero(taken))
        if number == 0:
            top.at = block.otherwise
        elif number == (threads.count if top.mask is None else int(np.count_nonzero(top.mask))):
            top.at = block.taken
        else:
            rest = ~condition if top.mask is None else ~condition & top.mask
            top.at = block.join
            if top.at in (top.join, self.end):
                stack.pop()  # threads that wait for them are further down the stack already
            for mask, at in ((rest, block.otherwise), (taken, block.taken)):
                if at not in (block.join, self.end):
                    stack.append(Split(mask, at, block.join))


def _run_masked(step: Step, threads: Threads) -> None:
    """A step of some threads: the others' results are put back."""
    registers, before = threads.registers, threads.mask
    mask = before
    if step.predicate >= 0:
        condition = registers[step.predicate]
        assert condition is not None
        if condition.size == 1:
            if bool(condition[0]) == step.negated:
                return
        else:
            if step.negated:
                condition = ~condition
            mask = condition if before is None else condition & before
            number = np.count_nonzero(mask)
            if number == 0:
                return
            if number == threads.count:
                mask = None
    old = [registers[d] for d in step.destinations]
    threads.mask = mask
    step.run(threads)
    threads.mask = before
    if mask is None:
        return
    for d, previous in zip(step.destinations, old, strict=True):
        if previous is not None:
            new = registers[d]
            assert new is not None
            registers[d] = np.where(mask, new, previous.view(new.dtype))


def _special(name: str, threads: Threads, grid: tuple[int, int, int]) -> Array:
    """%tid.x and the like, as 32 bits."""
    per_cta = threads.per_cta
    x, y, z = threads.ctas % grid[0], threads.ctas // grid[0] % grid[1], threads.ctas // grid[0] // grid[1]
    of_ctas = {"%ctaid.x": x, "%ctaid.y": y, "%ctaid.z": z}
    if name in of_ctas:
        return of_ctas[name].astype(np.uint32).repeat(per_cta)
    thread = (threads.lanes % per_cta).astype(np.uint32)
    values = {
        "%tid.x": thread, "%laneid": thread % WARP, "%warpid": thread // WARP,
        "%tid.y": np.zeros(1, np.uint32), "%tid.z": np.zeros(1, np.uint32), "%ntid.x": np.full(1, per_cta, np.uint32),
        **{f"%nctaid.{axis}": np.full(1, size, np.uint32) for axis, size in zip("xyz", grid, strict=True)},
    }  # fmt: skip
    if name not in values:
        raise NotImplementedError(f"special register {name}")
    return values[name].astype(np.uint32)
