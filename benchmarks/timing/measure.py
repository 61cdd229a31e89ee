"""How time and memory are measured, on a CPU and on a GPU, and what the machine was."""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import random
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

FLUSH_BYTES = 256 * 2**20  # more than any GPU's L2
PATIENCE = {"cpu": 10.0, "cuda": 0.5}  # seconds: what takes longer is timed once
WALL_WARMUPS = 3
SPIN, LONGEST_SPIN = 1e-3, 20e-3  # seconds that the GPU waits while the host queues a call
CYCLES_PER_SECOND = 1.98e9  # of a spin, assumed beforehand; what it took says what the clock was


class Call(NamedTuple):
    """Something to time: `run` of what `prepare`, which is not timed, made anew for each repeat."""

    prepare: Callable[[], Any]
    run: Callable[[Any], object]


class Sample(NamedTuple):
    """One repeat: seconds of the device, and on a GPU what can mislead.

    host: seconds until everything was queued.  hidden: the GPU had not begun by then, so that it never waited for the
    host.  clock: cycles per second of the multiprocessors, just before.
    """

    seconds: float
    host: float | None = None
    hidden: bool = True
    clock: float | None = None


@dataclass(frozen=True)
class Timing:
    """Seconds: the median, the quartiles around it, and of how many repeats; the rest as in `Sample`, medians.

    outlasted: repeats whose queueing outlasted the spin: their time may be the host's.
    """

    median: float
    low: float
    high: float
    repeats: int
    host: float | None = None
    outlasted: int = 0
    clock: float | None = None

    @staticmethod
    def from_samples(samples: Sequence[Sample]) -> Timing:
        seconds = [sample.seconds for sample in samples]
        low, _, high = statistics.quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else seconds * 3

        def median(values: Iterable[float | None]) -> float | None:
            known = [value for value in values if value is not None]
            return statistics.median(known) if known else None

        return Timing(
            statistics.median(seconds), low, high, len(seconds), median(sample.host for sample in samples),
            sum(not sample.hidden for sample in samples), median(sample.clock for sample in samples),
        )  # fmt: skip

    def fields(self) -> dict[str, Any]:
        """Of a row."""
        row: dict[str, Any] = {
            "seconds": {"median": self.median, "low": self.low, "high": self.high, "repeats": self.repeats}
        }
        if self.host is not None and self.clock is not None:
            row |= {"host_seconds": self.host, "outlasted": self.outlasted, "sm_mhz": round(self.clock / 1e6)}
        return row


def interleaved(
    calls: Mapping[str, Call], device: torch.device, repeats: int, warmups: int = 2, seed: int = 0
) -> dict[str, Timing]:
    """Time every call once per round, each round in another order, so that drift and neighbours hit all alike.

    A call that takes longer than `PATIENCE` is left out once it has been timed; its `Timing.repeats` says so.
    """
    samples: dict[str, list[Sample]] = {name: [] for name in calls}
    spins = dict.fromkeys(calls, SPIN)
    shuffle = random.Random(seed).shuffle
    for i in range(warmups + repeats):
        order = list(calls)
        shuffle(order)
        for name in order:
            if any(sample.seconds > PATIENCE[device.type] for sample in samples[name]):
                continue
            sample = _once_cuda(calls[name], spins[name]) if device.type == "cuda" else _once_cpu(calls[name])
            if sample.host is not None:
                spins[name] = min(max(2 * sample.host, SPIN), LONGEST_SPIN)
            if i >= warmups:
                samples[name].append(sample)
    return {name: Timing.from_samples(taken) for name, taken in samples.items()}


def _once_cpu(call: Call) -> Sample:
    state = call.prepare()
    start = time.perf_counter()
    call.run(state)
    return Sample(time.perf_counter() - start)


def _once_cuda(call: Call, spin: float) -> Sample:
    """Device time with a cold L2, while the host's time is hidden behind a spin."""
    state = call.prepare()
    flush_cache()
    before, start, end = (torch.cuda.Event(enable_timing=True) for _ in range(3))
    cycles = int(spin * CYCLES_PER_SECOND)
    before.record()
    torch.cuda._sleep(cycles)
    start.record()
    began = time.perf_counter()
    call.run(state)
    host = time.perf_counter() - began
    end.record()
    hidden = not start.query()  # the GPU still spins
    end.synchronize()
    seconds, spun = start.elapsed_time(end) / 1000, before.elapsed_time(start) / 1000
    return Sample(seconds, host, hidden, cycles / spun)


@functools.lru_cache(maxsize=1)
def flush_buffer(size: int) -> torch.Tensor:
    return torch.zeros(size // 4, dtype=torch.int32, device="cuda")


def flush_cache() -> None:
    """Fill the L2 with unrelated data, by reading: lines that a write left there would be written back later, on
    the time of what is measured."""
    flush_buffer(FLUSH_BYTES).max()


def wall(call: Call, device: torch.device, repeats: int) -> Timing:
    """Host time from call to result, synchronised: what a small op costs its caller."""

    def synchronised(state: object) -> None:
        call.run(state)
        if device.type == "cuda":
            torch.cuda.synchronize()

    timed = Call(call.prepare, synchronised)
    for _ in range(WALL_WARMUPS):
        _once_cpu(timed)
    return Timing.from_samples([_once_cpu(timed) for _ in range(repeats)])


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
    root = Path(__file__).resolve().parents[1]
    described: dict[str, Any] = {
        "commit": output("git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"),
        "sources": digest(root.parent / "conspo_kernels"),
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
        query = "driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.draw,power.limit,temperature.gpu"
        smi = output("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader")
        described |= {
            "gpu": gpu.name,
            "gpu_memory_gib": gpu.total_memory / 2**30,
            "cuda": torch.version.cuda,
            "smi": smi,
        }
    return described


def output(*command: str) -> str | None:
    """What a command prints; None where it is missing, fails, says nothing or hangs."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return (done.returncode == 0 and done.stdout.strip()) or None


def digest(folder: Path) -> str:
    """Of a folder's Python files: what a figure was measured on, where there is no git."""
    hashed = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        hashed.update(str(path.relative_to(folder)).encode() + path.read_bytes())
    return hashed.hexdigest()[:12]


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
