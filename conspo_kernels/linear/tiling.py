"""Tiles of logits for the fused-linear path: what fits the workspace, and which of that costs least.

A tile is rows x columns of the [N, V] logits. Each further tile of rows reads and writes the sum of the gradient of
weight [V, H] once more, each further tile of columns that of the gradient of hidden [N, H]. On a GPU the last wave
of a GEMM counts too: its multiprocessors multiply a block of the result each, and those without one wait. Names: n
tokens, v vocabulary, h hidden size.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import NamedTuple

ALIGNMENT = 64  # columns: whole blocks of a GEMM, rows of logits on a cache line
BLOCK = (128, 256)  # of a GEMM's result, that a multiprocessor multiplies at a time: either way around
MORE_TILES = 8  # than the fewest that fit: so many are tried
OPERATIONS_PER_BYTE = 250  # of a GEMM, in the time of a byte: H100 266, H200 190, B200 252
FIXED_ROWS = 256  # of a tile that does not depend on the batch: enough for a GEMM, little to pad
ACCUMULATOR = 4  # bytes of an fp32 number
LEAST_WORKSPACE = 2**29
MEMORY_SHARE = 32  # of a GPU's memory: on 80 GB 8192 tokens of 151,936 logits are one tile


def workspace_of(memory: int) -> int:
    """Bytes for tiles of logits.  memory: of the GPU, in bytes; 0 if the device is not a GPU."""
    return max(LEAST_WORKSPACE, memory // MEMORY_SHARE)


class Problem(NamedTuple):
    """itemsize: of hidden and weight, bytes.  gathered: rows are copied together before each GEMM.

    logit_bytes: of a logit in the workspace, and its gradient, which overwrites it; 0: itemsize.
    multiprocessors: of a GPU; 0: a CPU, which has no waves, and whose rows of logits lie side by side.
    """

    num_tokens: int
    vocab_size: int
    hidden_size: int
    itemsize: int
    gathered: bool = False
    logit_bytes: int = 0
    multiprocessors: int = 0

    def tile_bytes(self, rows: int, columns: int) -> int:
        row = (_whole(columns, ALIGNMENT) if self.multiprocessors else columns) * (self.logit_bytes or self.itemsize)
        return rows * (row + (self.hidden_size * self.itemsize if self.gathered else 0))


class Tile(NamedTuple):
    rows: int
    columns: int


def _whole(size: int, unit: int) -> int:
    """The least multiple of `unit` that is not below `size`."""
    return -(-size // unit) * unit


@functools.lru_cache(maxsize=64)
def row_tile(problem: Problem, workspace: int, needs_hidden: bool = False, needs_weight: bool = False) -> Tile:
    """Whole rows, as many as fit and at least one; tiles of one size.

    On a GPU, where they are cut, a multiple of a block's rows: of a few numbers of tiles, the one that costs least.
    """
    number, columns = problem.num_tokens, problem.vocab_size
    fit = max(1, workspace // problem.tile_bytes(1, columns))
    fewest = math.ceil(number / fit)
    block = BLOCK[0]
    if fewest <= 1 or fit < block or not problem.multiprocessors:
        return Tile(math.ceil(number / max(1, fewest)), columns)
    most = fit // block * block
    fewest = math.ceil(number / most)
    sizes = {min(_whole(math.ceil(number / tiles), block), most) for tiles in range(fewest, fewest + MORE_TILES)}
    tiles = [Tile(rows, columns) for rows in sorted(sizes, reverse=True)]
    return min(tiles, key=lambda tile: cost_bytes(problem, tile, needs_hidden, needs_weight))


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


def idle_operations(problem: Problem, tile: Tile, needs_hidden: bool, needs_weight: bool) -> int:
    """What multiprocessors could have multiplied while they waited for the last wave of a GEMM. On a CPU none."""
    if not problem.multiprocessors:
        return 0
    h, total = problem.hidden_size, 0
    for rows, row_tiles in _sizes(problem.num_tokens, tile.rows):
        for columns, column_tiles in _sizes(problem.vocab_size, tile.columns):
            gemms = [(rows, columns, h)]
            gemms += [(rows, h, columns)] * needs_hidden + [(columns, h, rows)] * needs_weight
            total += row_tiles * column_tiles * sum(_idle(*gemm, problem.multiprocessors) for gemm in gemms)
    return total


def _sizes(total: int, size: int) -> Iterator[tuple[int, int]]:
    """Sizes of tiles along one side, and how many have each: the last may be shorter."""
    if total >= size:
        yield size, total // size
    if total % size:
        yield total % size, 1


def _idle(rows: int, columns: int, depth: int, multiprocessors: int) -> int:
    """Of a GEMM with a result [rows, columns] and sums of `depth` products."""
    blocks = min(math.ceil(rows / m) * math.ceil(columns / n) for m, n in (BLOCK, BLOCK[::-1]))
    paid = _whole(blocks, multiprocessors) * BLOCK[0] * BLOCK[1]
    return 2 * (paid - rows * columns) * depth


def cost_bytes(problem: Problem, tile: Tile, needs_hidden: bool, needs_weight: bool) -> float:
    """What depends on the tile: bytes moved by sums, and those that could have been moved in idle time."""
    idle = idle_operations(problem, tile, needs_hidden, needs_weight) / OPERATIONS_PER_BYTE
    return accumulator_bytes(problem, tile, needs_hidden, needs_weight) + idle


@functools.lru_cache(maxsize=64)
def backward_tile(problem: Problem, workspace: int, needs_hidden: bool, needs_weight: bool) -> Tile:
    """The tile within the workspace that costs least, where a row's statistics are known beforehand."""
    best = row_tile(problem, workspace, needs_hidden, needs_weight)
    if best.rows == problem.num_tokens:
        return best
    least = cost_bytes(problem, best, needs_hidden, needs_weight)
    most = math.ceil(problem.num_tokens / best.rows)
    for row_tiles in range(1, most):
        rows = math.ceil(problem.num_tokens / row_tiles)
        if problem.multiprocessors and row_tiles > 1:
            rows = _whole(rows, BLOCK[0])
        fit = (
            (workspace - problem.tile_bytes(rows, 0))
            // (rows * (problem.logit_bytes or problem.itemsize))
            // ALIGNMENT
            * ALIGNMENT
        )
        if fit < ALIGNMENT:
            continue
        column_tiles = math.ceil(problem.vocab_size / fit)
        columns = _whole(math.ceil(problem.vocab_size / column_tiles), ALIGNMENT)
        tile = Tile(rows, min(columns, problem.vocab_size))
        cost = cost_bytes(problem, tile, needs_hidden, needs_weight)
        if cost < least:
            best, least = tile, cost
    return best
