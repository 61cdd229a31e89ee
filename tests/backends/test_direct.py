"""Compiled kernels that are launched directly: the table takes what Triton would, and steps aside where it should."""

from __future__ import annotations

import json
from typing import Any

import triton
from processes import python

from conspo_kernels.backends.triton import direct, row_kernels


def result(function: str) -> Any:
    return json.loads(python("tests/support/direct_launches.py", function))


def test_every_part_of_the_key() -> None:
    """The dtype and the alignment of pointers, None, integers that are 1, divisible by 16 or wide, constants, options,
    the device: one or two of them changed, the binary is the one that Triton takes, and a known one costs no search."""
    it = result("keys")
    assert it["binaries"] > 20
    assert it["wrong"] == []
    assert it["again"] == 0


def test_what_is_no_part_of_the_key() -> None:
    """Numbers that change from step to step do not fill the table, and it is bounded."""
    assert result("free") == {"count": 1, "factor": 1, "anywhere": 1, "most": 3}


def test_arguments() -> None:
    """A step is launched on the current stream as Triton launches it."""
    launches = result("arguments")
    assert len(launches) == 7
    assert all(all(parts) for parts in launches), launches


def test_watchers() -> None:
    """Hooks, profilers, debuggers and CPU tensors: Triton launches by itself, the hooks see it; then directly again."""
    it = result("watchers")
    assert it.pop("nobody") == [0, [], 0]
    assert {name: noticed for name, (_, noticed, _) in it.items() if noticed} == {
        "enter hook": ["enter"], "exit hook": ["exit"], "a function as hook": ["plain"], "run hook": ["run"],
        "a run of all kernels": ["all"], "a run of one kernel": ["one"],
    }  # fmt: skip
    assert {name: (inside, after) for name, (inside, _, after) in it.items()} == dict.fromkeys(it, (3, 0))


def test_changes() -> None:
    """Triton raises where a global has changed; a changed source and another driver are compiled anew."""
    it = result("changes")
    assert "ADDED has changed since we compiled this kernel" in it.pop("global")
    assert it == {"source": False, "forbidden": [True, True], "allowed": True, "driver": 1}


def test_time() -> None:
    """A step of 7 and one of 5 launches take less of a processor than where Triton launches, in alternation."""
    for name, directly, by_triton in result("times"):
        assert directly < 0.95 * by_triton, name


def test_releases() -> None:
    """The releases whose sources were read, this one among them."""
    kinds = dict.fromkeys(("3.6.0", "3.7.1", "3.8.0", "3.9.0"), "Kernel")
    assert result("releases") == kinds | {"3.10.0": "JITFunction", "4.0.0": "JITFunction"}
    assert triton.__version__.rpartition(".")[0] in direct.RELEASES


def test_the_interpreter_is_not_concerned() -> None:
    kind = type(row_kernels._statistics_kernel).__name__
    assert kind == ("InterpretedFunction" if triton.knobs.runtime.interpret else "Kernel")
