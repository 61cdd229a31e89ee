"""The gpu suite in this process, on a simulated GPU: that every line of it runs, not what it would show."""

from __future__ import annotations

import contextlib
import os
import runpy
import sys
import time
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO
from unittest import mock

from benchmarks.gpu_suite import suite
from benchmarks.simulation.interpreter import hasten
from benchmarks.simulation.simulated_gpu import simulated
from benchmarks.timing import ceilings, measure

FLUSH_BYTES = 2**12


def run_part(part: suite.Part, log: Path, seconds: float, environment: dict[str, str]) -> suite.Outcome:
    """As `suite.run_part`, in this process; a part has as much time as it takes."""
    del seconds, environment
    started = time.monotonic()
    with log.open("w", encoding="utf-8") as output, _written_to(output), _as_on_a_gpu():
        code = _run_module(part.arguments[1], part.arguments[2:])
    status = "done" if code == 0 else f"failed with exit code {code}"
    note = suite.last_line(log)
    return {"part": part.name, "status": status, "note": note, "seconds": round(time.monotonic() - started, 1)}


@contextlib.contextmanager
def _written_to(log: TextIO) -> Iterator[None]:
    with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log), warnings.catch_warnings():
        # numpy warns of what a GPU computes in silence: log 0
        warnings.filterwarnings("ignore", module=r"triton\.runtime\.interpreter")
        warnings.filterwarnings("ignore", "'benchmarks", RuntimeWarning)  # runpy's: the module is imported already
        yield


def _run_module(name: str, arguments: list[str]) -> int:
    """`python -m NAME ARGUMENTS`: its exit code."""
    with mock.patch.object(sys, "argv", [name, *arguments]):
        try:
            runpy.run_module(name, run_name="__main__")
        except SystemExit as end:
            return end.code if isinstance(end.code, int) else int(end.code is not None)
        except Exception:
            traceback.print_exc()
            return 1
    return 0


@contextlib.contextmanager
def _as_on_a_gpu() -> Iterator[None]:
    if os.environ.get("TRITON_INTERPRET") != "1":  # read when Triton defines the kernels
        raise RuntimeError("a simulated GPU needs TRITON_INTERPRET=1 from the start")
    hasten()
    measure.flush_buffer.cache_clear()
    with (
        mock.patch.object(measure, "FLUSH_BYTES", FLUSH_BYTES),
        mock.patch.dict(ceilings.SIZES, cuda=ceilings.TINY),
        simulated(),
    ):
        yield
    measure.flush_buffer.cache_clear()
