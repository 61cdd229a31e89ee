"""What each mode of the fused-linear path moves and multiplies, and the time that predicts: calculated, not measured.

    python -m benchmarks.costs [--tokens 8192] [--vocab 151936]

Tiles, and the bytes of the sums over them, are those of the library's own model, `conspo_kernels/linear/tiling.py`.
Prints the page docs/costs.md.
"""

from __future__ import annotations

import argparse
from typing import NamedTuple

from benchmarks.counted import GPUS
from benchmarks.timing.tables import markdown
from conspo_kernels.backends.triton.launch import L2_SHARE
from conspo_kernels.linear.tiling import Problem, Tile, accumulator_bytes, backward_tile, row_tile, workspace_of

TOKENS, VOCAB, HIDDEN, ITEMSIZE, FP32 = 8192, 151_936, (2048, 4096, 7168), 2, 4
SMALL = 512 * 2**20  # the default workspace of a GPU with up to 16 GiB


class Device(NamedTuple):
    """flops: of a large bf16 GEMM, per second.  memory, l2: bytes, as a driver reports them."""

    flops: float
    memory: int
    l2: int


# GEMMs: what an H100 was measured to reach, 81 % of its data sheet's 989 TFLOP/s; the same share of a B200's 2,250.
DEVICES = {
    "H100": Device(798e12, int(79.2 * 2**30), 50 * 2**20),
    "H200": Device(798e12, int(139.8 * 2**30), 60 * 2**20),
    "B200": Device(0.807 * 2250e12, int(178.3 * 2**30), 126 * 2**20),
}


class Moved(NamedTuple):
    """Bytes beside what GEMMs read and write themselves.

    logits: by kernels, over tiles of logits and their gradients.  sums: of gradients, summed over tiles.  rows: hidden
    states copied together, and gradients of them scaled.
    """

    logits: int
    sums: int
    rows: int

    @property
    def total(self) -> int:
        return sum(self)


GEMMS = {"none": 1, "recompute": 4, "store": 3, "frozen": 2, "known": 3}  # of 2 * N * H * V operations


def moved_bytes(problem: Problem, mode: str, workspace: int, cached: bool = False) -> Moved:
    """What a mode of `modes.py` moves, forward and backward, all gradients needed but those of a frozen head.

    cached: kernels with known coefficients find a row in the cache when they read it again.
    """
    n, v, h, itemsize, gathered, *_ = problem
    logit = problem.logit_bytes or itemsize
    looks = 1 if mode == "none" or (cached and mode in ("known", "frozen")) else 2
    logits = n * v * (looks * logit + (0 if mode == "none" else itemsize))
    needs_weight = mode in ("store", "recompute", "known")
    tile = row_tile(problem, workspace, mode != "none", needs_weight)
    if mode == "recompute":
        tile = backward_tile(problem, workspace, True, True)
    elif mode == "store":
        tile = Tile(n, v)
    sums = 0
    if mode != "none":
        once = (n * h + (v * h if needs_weight else 0)) * itemsize
        sums = accumulator_bytes(problem, tile, True, needs_weight) - once
    copied = 2 * n * h * itemsize
    rows = copied * (gathered * (2 if mode in ("recompute", "store") else 1) + (mode == "frozen"))
    return Moved(logits, sums, rows)


def gemm_operations(problem: Problem, mode: str) -> int:
    return GEMMS[mode] * 2 * problem.num_tokens * problem.hidden_size * problem.vocab_size


class Cost(NamedTuple):
    """Seconds of the GEMMs, and of what is moved beside them.  gigabytes: of logits, sums, rows."""

    gemms: float
    moved: float
    gigabytes: tuple[float, float, float]

    @property
    def share(self) -> float:
        return self.moved / self.gemms


def cost(problem: Problem, mode: str, workspace: int, gpu: str) -> Cost:
    device, known = DEVICES[gpu], GPUS[gpu]
    problem = problem._replace(multiprocessors=known.multiprocessors)
    in_flight = known.multiprocessors * problem.vocab_size * (problem.logit_bytes or problem.itemsize)
    moved = moved_bytes(problem, mode, workspace, cached=in_flight <= L2_SHARE * device.l2)
    logits, sums, rows = (size / 1e9 for size in moved)
    return Cost(gemm_operations(problem, mode) / device.flops, moved.total / known.bandwidth, (logits, sums, rows))


def table(tokens: int, vocab: int, workspace: int | None) -> str:
    """A line per hidden size and mode.  workspace: bytes, None: each GPU's own."""
    headers = ["H, mode", "GEMMs", "TFLOP", "logits, GB", "sums, GB", "rows, GB", *(f"{gpu}, ms" for gpu in GPUS)]
    lines = []
    for hidden in HIDDEN:
        problem = Problem(tokens, vocab, hidden, ITEMSIZE)
        for mode, gemms in GEMMS.items():
            if mode == "store" and workspace is not None and tokens * vocab * ITEMSIZE > workspace:
                continue
            costs = {
                gpu: cost(problem, mode, workspace or workspace_of(device.memory), gpu)
                for gpu, device in DEVICES.items()
            }
            gigabytes = [f"{size:.2f}" for size in costs["H100"].gigabytes]
            times = [f"{it.gemms * 1e3:.1f} + {it.moved * 1e3:.1f} ({it.share:.1%})" for it in costs.values()]
            tera = gemm_operations(problem, mode) / 1e12
            lines.append((f"{hidden}, {mode}", gemms, f"{tera:.1f}", *gigabytes, *times))
    return markdown(headers, lines)


def wide_share(problem: Problem, mode: str, workspace: int, gpu: str) -> float:
    """By how much a mode's time grows with fp32 logits, gradients in 16 bits; what GEMMs write more of counts too."""
    before, after = (cost(it, mode, workspace, gpu) for it in (problem, problem._replace(logit_bytes=FP32)))
    products = 2 if mode == "recompute" else 1
    written = products * problem.num_tokens * problem.vocab_size * (FP32 - ITEMSIZE) / GPUS[gpu].bandwidth
    return (after.gemms + after.moved + written) / (before.gemms + before.moved) - 1


def wide_table(tokens: int, vocab: int, hidden: int = 4096) -> str:
    """A line per mode."""
    problem = Problem(tokens, vocab, hidden, ITEMSIZE)
    lines = [
        (mode, *(f"{wide_share(problem, mode, workspace_of(it.memory), gpu):.1%}" for gpu, it in DEVICES.items()))
        for mode in GEMMS
    ]
    return markdown(["mode", *DEVICES], lines)


PAGE = """\
# Calculated, not measured

What the modes of the fused-linear path cost, forward and backward, by counting. No GPU has run this: the page is
printed by `python -m benchmarks.costs`, from the model by which the library chooses its tiles
(`conspo_kernels/linear/tiling.py`).

N = {tokens:,} tokens, V = {vocab:,}, bf16, every token with a label. "GEMMs" are products of 2 * N * H * V operations.
What is moved beside them, in 10^9 bytes on an H100: "logits", by the kernels, over tiles of logits and their gradients;
"sums", of the gradients of weight and hidden in fp32, where they go through memory once more for every further tile;
"rows", of hidden states that are copied together or scaled. What GEMMs read and write themselves is in their rate. The
last columns are the time of the GEMMs, plus that of the moved bytes, one after the other, and the second over the
first.

{devices}

The modes: "none" is phase 1, without gradient; "recompute" the default where the logits do not fit the workspace, and
"store" where they do; "frozen" a head without gradient; "known" phase 2, whose weights are known beforehand. With known
coefficients (and a frozen head) a row of logits is read again as soon as it was read. Where the rows in flight take at
most {share:.0%} of the L2, that is counted as no memory traffic. No GPU has confirmed it; if it fails, one more read of
the logits is to be added, {look:.2f} GB.

## With the default workspace

A 32nd of the GPU's memory, at least 512 MiB: {workspaces}.

{default}

## With 512 MiB

"known" sums the gradient of weight over tiles of rows: that is why the default is larger. Modes that do not fit are
left out.

{small}

## fp32 logits

`logits_dtype=torch.float32` with 16-bit operands, H 4,096, the default workspace: by how much a mode's time grows. A
logit is written and read in 4 bytes, and its gradient, in 2, overwrites it; so half as many rows fit a tile, and rows
of an H100 or H200 no longer fit the L2.

{wide}
"""


def page(tokens: int = TOKENS, vocab: int = VOCAB) -> str:
    devices = "\n".join(
        f"- {gpu}: {device.flops / 1e12:,.0f} TFLOP/s, {GPUS[gpu].bandwidth / 1e12:g} TB/s, "
        f"{device.memory / 2**30:.0f} GiB, {device.l2 / 2**20:.0f} MiB of L2"
        for gpu, device in DEVICES.items()
    )
    workspaces = ", ".join(f"{gpu} {workspace_of(device.memory) / 2**20:,.0f} MiB" for gpu, device in DEVICES.items())
    return PAGE.format(
        tokens=tokens, vocab=vocab, look=tokens * vocab * ITEMSIZE / 1e9, devices=devices, workspaces=workspaces,
        share=L2_SHARE, wide=wide_table(tokens, vocab), default=table(tokens, vocab, None),
        small=table(tokens, vocab, SMALL),
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--vocab", type=int, default=VOCAB)
    arguments = parser.parse_args()
    print(page(arguments.tokens, arguments.vocab), end="")


if __name__ == "__main__":
    main()
