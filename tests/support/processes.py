"""Processes for the tests: forks of one that has imported what takes seconds to import."""

from __future__ import annotations

import gc
import os
import runpy
import sys
import tempfile
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from pathlib import Path
from subprocess import CompletedProcess
from unittest import mock

import torch.multiprocessing as mp

REPOSITORY = Path(__file__).resolve().parents[2]

# Of these, what the tests have imported already; the first, and with it Triton, comes with deterministic algorithms.
HEAVY = ("torch._inductor", "torch.distributed.fsdp", "transformers", "peft", "trl.trainer.grpo_trainer")


def collect_seldom() -> None:
    """Garbage in cycles is rare, and looking for it was a quarter of the executor's time and a tenth of dynamo's."""
    gc.freeze()  # what is imported stays
    gc.set_threshold(20_000, 10, 10)


def forks() -> ForkServerContext:
    """Where to start them. Triton's interpreter, which the other tests want, is chosen once per process: not there."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["torch", *(name for name in HEAVY if name in sys.modules)])
    with mock.patch.dict(os.environ, TRITON_INTERPRET="0"):
        forkserver.ensure_running()
    return context


def _command(arguments: tuple[str, ...], environment: dict[str, str], outputs: tuple[str, str]) -> None:
    """What `python *arguments` does."""
    collect_seldom()
    for stream, path in zip((sys.stdout, sys.stderr), outputs, strict=True):
        os.dup2(os.open(path, os.O_WRONLY), stream.fileno())
    os.environ.clear()
    os.environ |= environment
    os.chdir(REPOSITORY)
    kind, *rest = arguments
    if kind == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif kind == "-c":
        sys.argv = ["-c", *rest[1:]]
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = [*arguments]
        runpy.run_path(kind, run_name="__main__")


def run(*arguments: str, environment: dict[str, str]) -> CompletedProcess[str]:
    """`python *arguments` at the root of the repository."""
    with tempfile.NamedTemporaryFile("r") as out, tempfile.NamedTemporaryFile("r") as err:
        process = forks().Process(target=_command, args=(arguments, environment, (out.name, err.name)))
        process.start()
        process.join()
        assert process.exitcode is not None
        return CompletedProcess(arguments, process.exitcode, out.read(), err.read())


def python(*arguments: str, **variables: str) -> str:
    """What it prints, if it succeeds. A pytest in it takes nothing from the one that asks."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment |= {"TRITON_INTERPRET": "0", "PYTHONPATH": str(REPOSITORY)} | variables
    result = run(*arguments, environment=environment)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout
