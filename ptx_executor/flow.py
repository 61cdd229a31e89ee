"""Basic blocks, and where the threads that a branch parts come together again."""

from __future__ import annotations

from dataclasses import dataclass

from .parse import Function, Instruction

RETURNS = ("ret", "exit")


@dataclass
class Block:
    """Straight code, then a jump.  branch: the last instruction if it is one.  taken, otherwise: numbers of the blocks
    that follow, the number of blocks meaning the end.  join: the immediate post-dominator."""

    instructions: list[Instruction]
    branch: Instruction | None
    taken: int
    otherwise: int
    join: int = -1

    @property
    def successors(self) -> set[int]:
        return {self.taken, self.otherwise}


def blocks_of(function: Function) -> list[Block]:
    """The blocks of a kernel in the order of its text."""
    pieces: list[list[Instruction]] = [[]]
    labels: dict[str, int] = {}
    for item in function.body:
        if isinstance(item, str):
            if pieces[-1]:
                pieces.append([])
            labels[item] = len(pieces) - 1
        else:
            pieces[-1].append(item)
            if item.parts[0] in ("bra", *RETURNS):
                pieces.append([])
    end = len(pieces)
    blocks = []
    for number, piece in enumerate(pieces):
        branch = piece.pop() if piece and piece[-1].parts[0] in ("bra", *RETURNS) else None
        following = number + 1
        if branch is None:
            taken = following
        elif branch.parts[0] in RETURNS:
            taken = end
        else:
            (label,) = branch.operands
            if label not in labels:
                raise ValueError(f"no such label: {branch.text}")
            taken = labels[str(label)]
        otherwise = following if branch is None or branch.predicate else taken
        blocks.append(Block(piece, branch, taken, otherwise))
    for block, join in zip(blocks, _post_dominators(blocks), strict=True):
        block.join = join
    return blocks


def _post_dominators(blocks: list[Block]) -> list[int]:
    """The immediate post-dominator of each block: the first block that all of its ways to the end have in common."""
    end = len(blocks)
    everything = (1 << (end + 1)) - 1
    sets = [everything] * end + [1 << end]  # bit j of entry i: every way from i to the end passes j
    changed = True
    while changed:
        changed = False
        for i in reversed(range(end)):
            common = everything
            for successor in blocks[i].successors:
                common &= sets[successor]
            if (common | 1 << i) != sets[i]:
                sets[i] = common | 1 << i
                changed = True
    joins = []
    for i in range(end):
        others = [j for j in range(end + 1) if j != i and sets[i] >> j & 1]
        # The nearest one is post-dominated by all the others.
        joins.append(max(others, key=lambda j: sets[j].bit_count(), default=end))
    return joins
