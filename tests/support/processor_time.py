"""`pytest --processor-time`: what tests cost in processor seconds, which other work on the machine does not change.

User and system time of setup, call and teardown, with the processes that a test starts and waits for, and the ranks.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Generator
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import pytest

SHOWN = 20
NAME = "processor_seconds"


def _of_ranks() -> float:
    """Of the process whose forks are ranks, and of those that have ended: nobody here waits for it."""
    pid = getattr(forkserver._forkserver, "_forkserver_pid", None)  # type: ignore[attr-defined]
    stat = Path(f"/proc/{pid}/stat")
    if pid is None or not stat.exists():
        return 0.0
    fields = stat.read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


def seconds() -> float:
    return sum(os.times()[:4]) + _of_ranks()


class ProcessorTime:
    def __init__(self) -> None:
        self.start = 0.0
        self.tests: Counter[str] = Counter()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self) -> Generator[None, Any, Any]:
        self.start = seconds()
        return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, call: pytest.CallInfo[None]) -> Generator[None, Any, Any]:
        report = yield
        if call.when == "teardown":
            report.user_properties.append((NAME, seconds() - self.start))
        return report

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """In the process that reports, which with xdist runs no test."""
        if report.when == "teardown":
            self.tests[report.nodeid] += dict(report.user_properties).get(NAME, 0.0)

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        terminalreporter.section(f"processor seconds: {sum(self.tests.values()):.0f}")
        folders: Counter[str] = Counter()
        for name, spent in self.tests.items():
            folders[name.partition("::")[0].rpartition("/")[0]] += spent
        for table in (folders, self.tests):
            for name, spent in table.most_common(SHOWN):
                terminalreporter.write_line(f"{spent:8.1f} s  {name}")
