"""Tiles of logits for the fused-linear path: what fits the workspace, and which of that moves the fewest bytes.

A tile is rows x columns of the [N, V] logits. What is summed over tiles goes through memory again for every further
one: the gradient of weight [V, H] for tiles of rows, that of hidden [N, H] for tiles of columns. Names: n tokens, v
vocabulary, h hidden size.
"""

from __future__ import annotations

import math
from typing import NamedTuple

ALIGNMENT = 64  # columns: whole tiles of a GEMM, rows of logits on a cache line
FIXED_ROWS = 256  # of a tile that does not depend on the batch: enough for a GEMM, little to pad
ACCUMULATOR = 4  # bytes of an fp32 number
LEAST_WORKSPACE = 2**29
MEMORY_SHARE = 32  # of a GPU's memory: on 80 GB 8192 tokens of 151,936 logits are one tile


def workspace_of(memory: int) -> int:
    """Bytes for tiles of logits.  memory: of the GPU, in bytes; 0 if the device is not a GPU."""
    return max(LEAST_WORKSPACE, memory // MEMORY_SHARE)


class Problem(NamedTuple):
    """itemsize: of hidden and weight, bytes.  gathered: rows are copied together before each GEMM.

    logit_bytes: of a logit in the workspace, with its copy in the operands' dtype where it is wider; 0: itemsize.
    """

    num_tokens: int
    vocab_size: int
    hidden_size: int
    itemsize: int
    gathered: bool = False
    logit_bytes: int = 0

    def tile_bytes(self, rows: int, columns: int) -> int:
        row = columns * (self.logit_bytes or self.itemsize)
        return rows * (row + (self.hidden_size * self.itemsize if self.gathered else 0))


class Tile(NamedTuple):
    rows: int
    columns: int


def row_tile(problem: Problem, workspace: int) -> Tile:
    """Whole rows, as many as fit and at least one; tiles of one size."""
    fit = max(1, workspace // problem.tile_bytes(1, problem.vocab_size))
    tiles = math.ceil(problem.num_tokens / fit)
    return Tile(math.ceil(problem.num_tokens / max(1, tiles)), problem.vocab_size)


def fixed_tile(problem: Problem, workspace: int) -> Tile:
    """Whole rows, the same number whatever the number of tokens."""
    gathered = problem._replace(gathered=True)  # as its padding is
    return Tile(max(1, min(FIXED_ROWS, workspace // gathered.tile_bytes(1, problem.vocab_size))), problem.vocab_size)


def accumulator_bytes(problem: Problem, tile: Tile, needs_hidden: bool, needs_weight: bool) -> int:
    """Bytes that the gradients' sums move: written once, or, if summed over k tiles, k times and read as often.

    The first of k tiles writes its part, each other one reads the sum and writes it, and then it is read to be rounded.
    """

    def summed(elements: int, times: int) -> int:
        once = elements * problem.itemsize
        return once if times == 1 else once + 2 * times * elements * ACCUMULATOR

    row_tiles = math.ceil(problem.num_tokens / tile.rows)
    column_tiles = math.ceil(problem.vocab_size / tile.columns)
    hidden = summed(problem.num_tokens * problem.hidden_size, column_tiles) if needs_hidden else 0
    weight = summed(problem.vocab_size * problem.hidden_size, row_tiles) if needs_weight else 0
    return hidden + weight


def backward_tile(problem: Problem, workspace: int, needs_hidden: bool, needs_weight: bool) -> Tile:
    """The tile within the workspace that moves the fewest bytes, where a row's statistics are known beforehand."""
    best = row_tile(problem, workspace)
    if best.rows == problem.num_tokens:
        return best
    fewest = accumulator_bytes(problem, best, needs_hidden, needs_weight)
    most = math.ceil(problem.num_tokens / best.rows)
    for row_tiles in range(1, most):
        rows = math.ceil(problem.num_tokens / row_tiles)
        fit = (
            (workspace - problem.tile_bytes(rows, 0))
            // (rows * (problem.logit_bytes or problem.itemsize))
            // ALIGNMENT
            * ALIGNMENT
        )
        if fit < ALIGNMENT:
            continue
        column_tiles = math.ceil(problem.vocab_size / fit)
        columns = math.ceil(math.ceil(problem.vocab_size / column_tiles) / ALIGNMENT) * ALIGNMENT
        tile = Tile(rows, min(columns, problem.vocab_size))
        moved = accumulator_bytes(problem, tile, needs_hidden, needs_weight)
        if moved < fewest:
            best, fewest = tile, moved
    return best
