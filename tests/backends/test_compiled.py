"""The kernels compiled for GPUs that this machine lacks: access widths, registers, stack, when Triton compiles anew."""

from __future__ import annotations

import json

import pytest
import triton
from processes import python

from benchmarks.compiled import ROW_KERNELS

# Bytes of logits that a multiprocessor has to wait for at a time, so that memory never does: 4.3 TB/s of an H200 times
# 0.6 to 0.8 us are 20 to 26 KB. A kernel that writes as much as it reads needs half; it shall have a margin.
READER, WRITER = 26 * 1024, 20 * 1024
IN_FLIGHT_TARGETS = ("sm_90", "sm_100")


def wide_loads(target: str, kernel: str, case: str) -> int:
    """How many instructions load 16 bytes: of whole tiles, and of the masked one behind them.

    Four for each tile, two where the tile is halved. With gfx942's 64 lanes a wave there are twice the threads, each
    with half the loads. There, from Triton 3.8 on, LLVM makes one of two trips of a loop as short as that of fp32, and
    keeps one trip for an odd number of tiles; not where a barrier is in the loop, as in that of a gradient over its
    logits: which trips wait must not depend on that number. Each of its loads is as wide.
    """
    series = "softcap of 1,000" in case or ("softcap" in case and case.startswith("fp32"))
    halved = series or "elsewhere" in case if kernel == "_backward_kernel" else "softcap of 1,000" in case
    wide = 4 if halved else 8
    if target != "gfx942":
        return wide
    release = tuple(map(int, triton.__version__.split(".")[:2]))
    waits = kernel == "_backward_kernel" and "over fp32" in case
    of_fp32 = (case.startswith("fp32") or "over fp32" in case) and not waits
    unrolled = release >= (3, 8) and of_fp32 and "softcap" not in case
    return wide if unrolled else wide // 2


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_compiled_kernels(target: str) -> None:
    """Of the compilers of Triton 3.6 to 3.9; a later one may count otherwise."""
    rows = json.loads(python("-m", "benchmarks.compiled", "--json", "--target", target))
    walks = {(row["case"], row["kernel"]): row for row in rows}
    assert len(walks) == len(rows) >= 25
    for row in rows:
        what = f"{row['kernel']}, {row['case']}"
        assert row["stack_bytes"] == 0, what
        assert row["registers"] <= 128, what
        warps, most, _limit = row["occupancy"]
        assert warps >= most // 4, what  # enough 16-byte loads in flight: 512 threads of 4 are 32 KB per multiprocessor
        if target in IN_FLIGHT_TARGETS and row["kernel"] in ROW_KERNELS and ", V " in row["case"]:
            needed = READER if row["kernel"] == "_statistics_kernel" else WRITER
            assert row["in_flight"] >= needed, (what, row["in_flight"])
    for (case, kernel), row in walks.items():
        if kernel in ("_statistics_kernel", "_backward_kernel") and case[:2] in ("bf", "fp"):
            assert row["loads"]["128"] == wide_loads(target, kernel, case), (case, kernel, row["loads"])
            # What is narrower are a label, a coefficient, and the edges of a row.
            assert sum(count for bits, count in row["loads"].items() if bits != "128") <= 7, (case, kernel)
        if kernel == "_backward_kernel" and case[:2] in ("bf", "fp") and "elsewhere" not in case:
            wide = "64" if "over" in case else "128"
            assert max(row["stores"], key=lambda bits: row["stores"][bits]) == wide, (case, row["stores"])
            assert sum(count for bits, count in row["stores"].items() if bits != wide) <= 2, (case, row["stores"])


def test_occupancy() -> None:
    """By hand: 63 registers are 64 by 32, 2,048 a warp, 8,192 a block of 4: eight blocks in 65,536."""
    from benchmarks.compiled_code.occupancy import occupancy

    assert occupancy("sm_90", 63, 0, 4) == (32, 64, "registers")
    assert occupancy("sm_90", 32, 0, 4) == (64, 64, "warps")
    assert occupancy("sm_90", 32, 100 * 1024, 4) == (8, 64, "shared memory")
    assert occupancy("sm_80", 32, 0, 1) == (32, 64, "blocks")
    assert occupancy("gfx942", 128, 0, 4) == (16, 32, "registers")


LENGTHS_AND_MARGINS = """
import torch
from benchmarks.compiled import TARGETS, call_group_infonce, call_sequence_score, call_token_logprob, offline

def kernels_of(step):
    with offline(TARGETS["sm_90"]) as kernels:
        for i in range(20):
            step(i)
    return len({id(kernel) for kernel in kernels}), len({kernel.metadata.name for kernel in kernels}), len(kernels)

def logits(i, vocab_size):
    # Lengths and rollouts around 1 and 16, which Triton would like to know; a view, so that strides change too.
    return torch.zeros(1 + i % 4, 2 + i, vocab_size, dtype=torch.bfloat16)[:, :-1]

for vocab_size in (4096, 257):
    print(*kernels_of(lambda i: call_token_logprob(logits(i, vocab_size))))
rewards = torch.zeros(40)  # and slices that begin anywhere
print(*kernels_of(lambda i: call_group_infonce(False, rewards=rewards[i : i + 8])))
for packed in (False, True):
    print(*kernels_of(lambda i: call_sequence_score(packed, num_tokens=1 + i)))
for ragged in (False, True):
    print(*kernels_of(lambda i: call_group_infonce(ragged, num_groups=1 + i, size=2 + i % 3, margin=0.1 * i)))
"""


def test_triton_compiles_once_for_all_lengths_rollouts_and_margins() -> None:
    """Triton's cache after 20 different steps, read without a GPU: what is launched is one binary per kernel."""
    counts = [tuple(map(int, line.split())) for line in python("-c", LENGTHS_AND_MARGINS).splitlines()]
    assert counts[:2] == [(3, 3, 60), (3, 3, 60)]
    assert counts[2] == (1, 1, 20)
    assert counts[3:] == [(2, 2, 40), (2, 2, 40), (1, 1, 20), (1, 1, 20)]
