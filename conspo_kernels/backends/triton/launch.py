"""How the kernels that walk rows of logits are launched: a fixed table, or with CONSPO_AUTOTUNE=1 a search.

The table is the default, so that nothing is timed behind a user's back and the same inputs give the same bits on every
rank. A search times the candidates on scratch logits when a vocabulary, dtype and device are first seen, synchronises
while it does, and may choose another order of sums; do it before a CUDA graph is captured.
"""

import contextlib
import functools
import logging
import os
import statistics
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ...values import LogitRows, LogitTransform, Statistics, Upstream

logger = logging.getLogger("conspo_kernels")

SCRATCH_BYTES = 2**27  # logits of a search: more than a GPU's L2
REPEATS = 9


class Launch(NamedTuple):
    """lanes: vectors of 16 bytes per tile, `vectors_per_thread` of them in flight per thread."""

    lanes: int
    num_warps: int


# Forward and backward of a row in one program, whose second look at the row is to find it in the L2. 1,024 threads of
# more than 32 registers: one row per multiprocessor is in flight, for fp32 logits two. That is the point, and not
# searched for.
KNOWN = {"known": Launch(2048, 32), "heavy known": Launch(1024, 32)}
L2_SHARE = 0.85  # that the rows in flight may take: a row leaves as it is read again, half of them are half read
L2_BYTES, MULTIPROCESSORS = 50 * 2**20, 132  # of an H100, where no GPU says its own

# kernel: "forward", "backward", or "heavy", a backward whose slope or narrow stores double the registers per logit.
# Registers, and the warps that fit them, are those of `python -m benchmarks.compiled`, bf16. A multiprocessor has to
# keep bandwidth * latency / multiprocessors bytes in flight, about 600 ns on a GPU; every row has a margin of two.
# Nothing here is measured yet: where a GPU says otherwise, change its row.
TABLE: dict[str, dict[str, Launch]] = {
    # 2 TB/s over 108: 11 KB. Forward 56 registers, 36 warps, 72 KB; backward 64 registers, 32 warps, 64 KB; with 1024
    # lanes 72 and 128 registers, 28 and 16 warps: no more in flight, and fewer warps to hide the arithmetic.
    "sm_80": {"forward": Launch(512, 4), "backward": Launch(512, 4), "heavy": Launch(256, 4)},
    # 3.3 TB/s over 132: 15 KB. Forward 56 registers, 36 warps, 72 KB; backward 64 registers, 32 warps, 64 KB; with
    # 1024 lanes backward has 127 registers and 16 warps.
    "sm_90": {"forward": Launch(512, 4), "backward": Launch(512, 4), "heavy": Launch(256, 4)},
    # 8 TB/s over 148: 32 KB, of the 64 KB and more that the same tiles keep there.
    "sm_100": {"forward": Launch(512, 4), "backward": Launch(512, 4), "heavy": Launch(256, 4)},
    # 5.3 TB/s over 304: 11 KB. A wave is 64 lanes: two loads per thread instead of four, and all 32 waves fit: 64 KB.
    "gfx942": {"forward": Launch(512, 4), "backward": Launch(512, 4), "heavy": Launch(256, 4)},
}
DEFAULT = "sm_90"  # also of the interpreter, and of architectures that are not in the table
CANDIDATES = (Launch(256, 4), Launch(512, 4), Launch(1024, 4), Launch(256, 8), Launch(512, 8), Launch(1024, 8))

_forced: Launch | None = None


@functools.lru_cache(maxsize=16)
def architecture(device: torch.device) -> str:
    """The row of the table that a device gets."""
    if device.type != "cuda":
        return DEFAULT
    properties = torch.cuda.get_device_properties(device)
    name = getattr(properties, "gcnArchName", "").partition(":")[0] if torch.version.hip else f"sm_{properties.major}0"
    return name if name in TABLE else DEFAULT


def launch_of(kernel: str, logits: Tensor) -> Launch:
    """How to launch a kernel on these logits."""
    if kernel in KNOWN:
        launch = KNOWN[kernel]
        return launch._replace(num_warps=16) if architecture(logits.device).startswith("gfx") else launch
    if _forced is not None:
        return _forced
    if logits.is_cuda and os.environ.get("CONSPO_AUTOTUNE") == "1":
        return search(kernel, logits.shape[-1], logits.dtype, logits.device)
    return TABLE[architecture(logits.device)][kernel]


@functools.lru_cache(maxsize=16)
def _cached_row_bytes(device: torch.device) -> float:
    """The longest row of which one per multiprocessor fits the L2."""
    if device.type != "cuda":
        return L2_SHARE * L2_BYTES / MULTIPROCESSORS
    properties = torch.cuda.get_device_properties(device)
    return L2_SHARE * properties.L2_cache_size / properties.multi_processor_count


def caches_rows(logits: Tensor) -> bool:
    """Whether the L2 holds the rows in flight of kernel "known".

    It depends on V, the dtype and the device alone, as the order of every sum does.
    """
    rows = 2 if logits.element_size() == 4 else 1
    return rows * logits.shape[-1] * logits.element_size() <= _cached_row_bytes(logits.device)


FUSED = {"enable_fp_fusion": True}  # a * b + c as one instruction: from Triton 3.10 on only where asked


def registers(most: int, device: torch.device) -> dict[str, int]:
    """The option that lets a thread have so many registers; there is none on an AMD GPU."""
    amd = torch.version.hip is not None or architecture(device).startswith("gfx")
    return {} if amd else {"maxnreg": most}


def vectors_per_thread(launch: Launch, device: torch.device) -> int:
    """How many vectors of a tile one thread holds."""
    threads = launch.num_warps * (64 if architecture(device).startswith("gfx") else 32)
    return max(launch.lanes // threads, 1)


@contextlib.contextmanager
def forced(launch: Launch) -> Iterator[None]:
    """Within, every kernel is launched so."""
    global _forced
    before, _forced = _forced, launch
    try:
        yield
    finally:
        _forced = before


@functools.lru_cache(maxsize=256)
def search(kernel: str, vocab_size: int, dtype: torch.dtype, device: torch.device) -> Launch:
    """The fastest candidate on scratch logits, once per process."""
    run = scratch(kernel, vocab_size, dtype, device)
    times = {}
    for candidate in CANDIDATES:
        with forced(candidate):
            times[candidate] = seconds(run)
    best = min(times, key=times.__getitem__)
    logger.info("%s, V %d, %s on %s: %s of %s", kernel, vocab_size, dtype, device, best, times)
    return best


def scratch(kernel: str, vocab_size: int, dtype: torch.dtype, device: torch.device) -> Callable[[], object]:
    """A launch of the kernel that disturbs nothing of the caller's."""
    from . import token_logprob as kernels

    generator = torch.Generator(device).manual_seed(0)  # the caller's random numbers stay what they were
    num_rows = max(SCRATCH_BYTES // (vocab_size * dtype.itemsize), 1)
    logits = torch.empty(1, num_rows, vocab_size, dtype=dtype, device=device).normal_(generator=generator)
    labels = torch.zeros(1, num_rows, dtype=torch.int64, device=device)
    rows = LogitRows(logits, labels, LogitTransform(softcap=30.0 if kernel == "heavy" else None))

    def forward() -> Statistics:
        return kernels.forward(rows, with_entropy=False)

    if kernel == "forward":
        return forward
    with forced(TABLE[architecture(device)]["forward"]):
        statistics = forward()
    grad = torch.empty_like(logits)
    return lambda: kernels.backward(grad, rows, statistics, Upstream(statistics.logprobs))


def seconds(run: Callable[[], object]) -> float:
    """Device time, the median after a first call that compiles."""
    run()
    times = []
    for _ in range(REPEATS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1000)
    return statistics.median(times)
