"""How time and memory are measured, on a CPU and on a GPU, and what the machine was."""

from __future__ import annotations

import os
import platform
import random
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

FLUSH_BYTES = 256 * 2**20  # more than any GPU's L2
PATIENCE = 10.0  # seconds: what takes longer is timed once
SPIN_CYCLES = 2_000_000  # about a millisecond: the host queues the whole call while the GPU waits


class Call(NamedTuple):
    """Something to time: `run` of what `prepare`, which is not timed, made anew for each repeat."""

    prepare: Callable[[], Any]
    run: Callable[[Any], object]


@dataclass(frozen=True)
class Timing:
    """Seconds: the median, the quartiles around it, and of how many repeats."""

    median: float
    low: float
    high: float
    repeats: int

    @staticmethod
    def of(seconds: list[float]) -> Timing:
        low, _, high = statistics.quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else seconds * 3
        return Timing(statistics.median(seconds), low, high, len(seconds))


def interleaved(
    calls: Mapping[str, Call], device: torch.device, repeats: int, warmups: int = 2, seed: int = 0
) -> dict[str, Timing]:
    """Time every call once per round, each round in another order, so that drift and neighbours hit all alike.

    A call that takes longer than `PATIENCE` is left out once it has been timed; its `Timing.repeats` says so.
    """
    once = _once_cuda if device.type == "cuda" else _once_cpu
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    shuffle = random.Random(seed).shuffle
    for i in range(warmups + repeats):
        order = list(calls)
        shuffle(order)
        for name in order:
            if max(seconds[name], default=0.0) > PATIENCE:
                continue
            elapsed = once(calls[name])
            if i >= warmups:
                seconds[name].append(elapsed)
    return {name: Timing.of(values) for name, values in seconds.items()}


def _once_cpu(call: Call) -> float:
    state = call.prepare()
    start = time.perf_counter()
    call.run(state)
    return time.perf_counter() - start


def _once_cuda(call: Call) -> float:
    """Device time with a cold L2; the host's time is hidden as long as it is below that of the spin."""
    state = call.prepare()
    torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda").zero_()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(SPIN_CYCLES)
    start.record()
    call.run(state)
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000


def wall(call: Call, device: torch.device, repeats: int) -> Timing:
    """Host time from call to result, synchronised: what a small op costs its caller."""

    def synchronised(state: object) -> None:
        call.run(state)
        if device.type == "cuda":
            torch.cuda.synchronize()

    timed = Call(call.prepare, synchronised)
    for _ in range(3):
        _once_cpu(timed)
    return Timing.of([_once_cpu(timed) for _ in range(repeats)])


def peak_bytes(call: Call, device: torch.device) -> int:
    """The most memory that `run` held at once beyond what was there before it."""
    state = call.prepare()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call.run(state)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    held = peak = 0
    for size in allocations(lambda: call.run(state)):
        held += size
        peak = max(peak, held)
    return peak


def allocations(function: Callable[[], object]) -> list[int]:
    """Bytes of each allocation on the CPU during a call, negative where freed, in order of time."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler tells standard error of each start and stop
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = function()
    del result
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    return [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]


def environment(device: torch.device) -> dict[str, Any]:
    """Versions, commit and machine: what a figure depends on."""
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = None
    root = Path(__file__).resolve().parent
    git = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    found: dict[str, Any] = {
        "commit": commit or None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton_version,
        "triton_interpreted": os.environ.get("TRITON_INTERPRET") == "1",
        "cpu": _cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": device.type,
    }
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        query = ["nvidia-smi", "--query-gpu=driver_version,clocks.sm,clocks.mem,power.limit", "--format=csv,noheader"]
        smi = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()
        found |= {"gpu": gpu.name, "gpu_memory_gib": gpu.total_memory / 2**30, "cuda": torch.version.cuda, "smi": smi}
    return found


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
