"""Which launch of each kernel that walks rows of logits is fastest on this GPU: the row to set in `launch.TABLE`.

    python -m benchmarks.autotune [--vocab 151936] [--dtype bfloat16]

Another launch may sum in another order. The table is in `conspo_kernels/backends/triton/launch.py`.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
from collections.abc import Callable, Iterator
from unittest import mock

import torch

from conspo_kernels.backends.triton import token_logprob as kernels
from conspo_kernels.backends.triton.launch import TABLE, Launch, family
from conspo_kernels.values import LogitRows, LogitTransform, Statistics

KERNELS = ("forward", "backward", "heavy")  # the others keep one row per multiprocessor, whatever is faster alone
CANDIDATES = (Launch(256, 4), Launch(512, 4), Launch(1024, 4), Launch(256, 8), Launch(512, 8), Launch(1024, 8))
SCRATCH_BYTES = 2**27  # logits of a search: more than a GPU's L2
REPEATS = 9


@contextlib.contextmanager
def forced(kernel: str, launch: Launch, device: torch.device) -> Iterator[None]:
    """Within, the kernel is launched so."""
    with mock.patch.dict(TABLE[family(device)], {kernel: launch}):
        yield


def search(kernel: str, vocab_size: int, dtype: torch.dtype, device: torch.device) -> dict[Launch, float]:
    """Seconds of each candidate on scratch logits."""
    run = scratch(kernel, vocab_size, dtype, device)
    times = {}
    for candidate in CANDIDATES:
        with forced(kernel, candidate, device):
            times[candidate] = seconds(run)
    return times


def scratch(kernel: str, vocab_size: int, dtype: torch.dtype, device: torch.device) -> Callable[[], object]:
    """A launch of the kernel."""
    num_rows = max(SCRATCH_BYTES // (vocab_size * dtype.itemsize), 1)
    logits = torch.randn(1, num_rows, vocab_size, dtype=dtype, device=device)
    labels = torch.zeros(1, num_rows, dtype=torch.int64, device=device)
    rows = LogitRows(logits, labels, LogitTransform(softcap=1000.0 if kernel == "heavy" else None))

    def forward() -> Statistics:
        return kernels.forward(rows, with_entropy=False)

    if kernel == "forward":
        return forward
    statistics, grad = forward(), torch.empty_like(logits)
    return lambda: kernels.backward(grad, rows, statistics.incoming(statistics.logprobs))


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


def row(vocab_size: int, dtype: torch.dtype, device: torch.device) -> Iterator[str]:
    """The lines to set, each with the milliseconds of all candidates."""
    for kernel in KERNELS:
        times = search(kernel, vocab_size, dtype, device)
        best = min(times, key=times.__getitem__)
        listed = ", ".join(f"({it.lanes}, {it.num_warps}) {time * 1e3:.3f}" for it, time in times.items())
        yield f'"{kernel}": Launch({best.lanes}, {best.num_warps}),  # ms: {listed}'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab", type=int, default=151_936)
    parser.add_argument("--dtype", default="bfloat16", choices=("float16", "bfloat16", "float32"))
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("a search needs a GPU, torch sees none")
    device = torch.device("cuda")
    print(f'launch.TABLE["{family(device)}"], on {torch.cuda.get_device_name(device)}:')
    for line in row(arguments.vocab, getattr(torch, arguments.dtype), device):
        print("    " + line, flush=True)


if __name__ == "__main__":
    main()
