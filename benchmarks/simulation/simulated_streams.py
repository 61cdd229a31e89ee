"""The simulated GPU's clock, events and streams: what is queued is done when it was queued, but for the spins."""

from __future__ import annotations

import time

CLOCK = 1.5e9  # cycles per second
LAUNCH = 1e-6  # seconds that whatever lies between two events takes at least


class Clock:
    """The end of what is queued: the CPU has done it when it was queued, but for the spins."""

    def __init__(self) -> None:
        self.busy_until = 0.0

    def sleep(self, cycles: int) -> None:
        self.busy_until = max(time.perf_counter(), self.busy_until) + cycles / CLOCK

    def stamp(self) -> float:
        self.busy_until = max(time.perf_counter(), self.busy_until) + LAUNCH
        return self.busy_until


class Event:
    def __init__(self, clock: Clock, **_: object) -> None:
        self.clock, self.at = clock, 0.0

    def record(self, _stream: object = None) -> None:
        self.at = self.clock.stamp()

    def query(self) -> bool:
        return time.perf_counter() >= self.at

    def synchronize(self) -> None:
        time.sleep(max(self.at - time.perf_counter(), 0.0))

    def elapsed_time(self, other: Event) -> float:
        return (other.at - self.at) * 1000


class Stream:
    """All there is runs in order."""

    cuda_stream = 0

    def wait_stream(self, _other: object) -> None: ...

    def synchronize(self) -> None: ...
