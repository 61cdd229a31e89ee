"""Processes for the tests: forks of one that has imported what takes seconds to import."""

from __future__ import annotations

import os
import runpy
import sys
import tempfile
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from pathlib import Path
from unittest import mock

import torch.multiprocessing as mp

REPOSITORY = Path(__file__).resolve().parents[2]

# Of these, what the tests have imported already; the first, and with it Triton, comes with deterministic algorithms.
HEAVY = ("torch._inductor", "torch.distributed.fsdp", "transformers", "peft", "trl.trainer.grpo_trainer")


def forks() -> ForkServerContext:
    """Where to start them. Triton's interpreter, which the other tests want, is chosen once per process: not there."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["torch", *(name for name in HEAVY if name in sys.modules)])
    with mock.patch.dict(os.environ, TRITON_INTERPRET="0"):
        forkserver.ensure_running()
    return context


def _command(arguments: tuple[str, ...], environment: dict[str, str], outputs: tuple[str, str]) -> None:
    """What `python *arguments` does."""
    for stream, path in zip((sys.stdout, sys.stderr), outputs, strict=True):
        os.dup2(os.open(path, os.O_WRONLY), stream.fileno())
    for name in [name for name in os.environ if name.startswith("PYTEST_")]:
        del os.environ[name]  # of the pytest that asks: another one may be what is run
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


def python(*arguments: str, **environment: str) -> str:
    """What `python *arguments` prints, at the root of the repository. Triton compiles in it."""
    with tempfile.NamedTemporaryFile("r") as out, tempfile.NamedTemporaryFile("r") as err:
        process = forks().Process(target=_command, args=(arguments, environment, (out.name, err.name)))
        process.start()
        process.join()
        assert process.exitcode == 0, out.read() + err.read()
        return out.read()
