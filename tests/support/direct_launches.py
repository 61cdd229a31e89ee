"""What is launched directly, and what is left to Triton, in a process of its own where Triton does not interpret:

    python tests/support/direct_launches.py FUNCTION

prints the function's result as JSON. The tests that read it are in `test_direct.py`.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import sys
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import triton
import triton.language as tl
from triton import knobs
from triton.runtime.jit import JITFunction

from benchmarks.host_time import measure_launches
from benchmarks.simulation.stubbed_driver import Driver, Launched, stubbed
from conspo_kernels import conspo_loss
from conspo_kernels.backends.triton import direct
from conspo_kernels.ops import label_alignment

ADDED = tl.constexpr(3)


@direct.kernel(do_not_specialize=("count", "free"), do_not_specialize_on_alignment=("anywhere_ptr",))
def _kernel(
    x_ptr, anywhere_ptr, optional_ptr, size, count: tl.int64, steps: tl.int64, free, factor: tl.float64,
    BLOCK: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    x = tl.load(x_ptr + tl.arange(0, BLOCK), mask=tl.arange(0, BLOCK) < size) + tl.load(anywhere_ptr) + count + steps
    if optional_ptr is not None:
        x += tl.load(optional_ptr)
    if KIND == "odd":
        x += ADDED
    tl.store(x_ptr + tl.arange(0, BLOCK), (x * factor + free).to(x_ptr.dtype.element_ty))


LONG = torch.zeros(64)
# What each part of the arguments may be; the first is the usual one.
PARTS: dict[str, tuple[Any, ...]] = {
    "x": (LONG, LONG[1:], LONG.double(), LONG.bfloat16()),
    "anywhere": (LONG, LONG[1:], LONG.half()),
    "optional": (None, LONG, LONG[1:]),
    "size": (17, 16, 1, 2**31, 32, 18),
    "count": (5, 1, 16, 2**40),
    "steps": (5, 1, 16),
    "free": (3, 1, 16, 2**31),
    "factor": (0.5, 1.0, 2),
    "BLOCK": (32, 64),
    "KIND": ("even", "odd", None),
    "num_warps": (1, 2),
    "device": (0, 1),
}


def launch(driver: Driver, parts: dict[str, Any], by_name: bool, run: Callable[..., Any] | None = None) -> Any:
    """By the kernel itself or by `run`."""
    driver.device = parts["device"]
    constants = {name: parts[name] for name in ("BLOCK", "KIND", "num_warps")}
    numbers = {name: parts[name] for name in ("size", "count", "steps", "free", "factor")}
    values: tuple[Any, ...] = (parts["x"], parts["anywhere"], parts["optional"])
    if by_name:
        constants |= numbers
    else:
        values += tuple(numbers.values())
    if run is not None:
        return run(*values, grid=(7, 2), warmup=False, **constants)
    return _kernel[(7, 2)](*values, **constants)


def usual(**other: Any) -> dict[str, Any]:
    return {name: choices[0] for name, choices in PARTS.items()} | other


@contextlib.contextmanager
def by_triton() -> Iterator[list[str]]:
    """The kernels that Triton launches by itself, within."""
    names: list[str] = []

    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        names.append(self.fn.__name__)
        return JITFunction.run(self, *args, **kwargs)

    with mock.patch.object(direct.Kernel, "run", run):
        yield names


def keys() -> dict[str, Any]:
    """Each part changed alone, and some with another one: whether the binary is the one that Triton takes, how many
    there are, and how often Triton launched in the last round, when each has been launched."""
    alone = [{name: choice} for name, choices in PARTS.items() for choice in choices[1:]]
    pairs = [a | b for a, b in itertools.combinations(alone, 2)]
    variants = [usual(), *(usual(**it) for it in alone), *(usual(**it) for it in pairs[:: len(pairs) // 20])]
    driver, wrong, binaries = Driver(), [], set()
    with stubbed(driver):
        for by_name in (False, True):
            for parts in (*variants, *reversed(variants)):
                binary = launch(driver, parts, by_name)
                binaries.add(id(binary))
                if binary is not launch(driver, parts, by_name, _kernel.run):
                    wrong.append(str(parts))
        with by_triton() as names:
            for parts in variants:
                launch(driver, parts, False)
    return {"binaries": len(binaries), "wrong": wrong, "again": len(names)}


def free() -> dict[str, int]:
    """Binaries in the table, after numbers that no binary depends on: those may change at every step."""
    driver, sizes = Driver(), {"most": 0}
    with stubbed(driver):
        for name in ("count", "factor", "anywhere"):
            _kernel.forms.clear()
            for i in range(1, 9):
                launch(driver, usual(**{name: LONG[i:] if name == "anywhere" else i}), False)
            sizes[name] = sum(len(form.compiled) for form in _kernel.forms.values())
        with mock.patch.object(direct, "MOST", 3):
            for size in range(20, 30):
                launch(driver, usual(size=size), False)
                sizes["most"] = max(sizes["most"], *(len(it.compiled) for it in _kernel.forms.values()))
    return sizes


def arguments() -> list[list[bool]]:
    """Of a step of `conspo_loss`: which parts of each launch are as Triton launches it, and that no hook is called."""
    logits, labels = torch.zeros(8, 16, 64, requires_grad=True), torch.zeros(8, 16, dtype=torch.int64)
    driver = Driver(launched=[])
    driver.stream = 11

    def step() -> list[Launched]:
        assert driver.launched is not None
        driver.launched.clear()
        conspo_loss(logits, labels, torch.ones(8), 4, implementation="triton").backward()
        return list(driver.launched)

    with mock.patch.object(label_alignment, "NOT_CHECKED", 64):  # nothing writes the labels
        with stubbed(driver, directly=False):
            expected = step()
        with stubbed(driver):
            step()
            with by_triton() as names:
                got = step()
    assert names == [], names
    assert len(got) == len(expected)
    return [
        [a.grid == b.grid, a.stream == b.stream == 11, a.function == b.function, a.metadata == b.metadata,
         a.hooks == (None, None), len(a.values) == len(b.values), all(map(_same, a.values, b.values))]
        for a, b in zip(got, expected, strict=True)
    ]  # fmt: skip


def _same(a: Any, b: Any) -> bool:
    return (a.shape, a.dtype) == (b.shape, b.dtype) if isinstance(a, torch.Tensor) else bool(a == b)


def watchers() -> dict[str, Any]:
    """What makes Triton launch by itself, each of them alone: its launches of three, and of three without it again."""
    seen: list[str] = []
    changes: dict[str, Any] = {
        "nobody": contextlib.nullcontext(),
        "enter hook": mock.patch.object(knobs.runtime.launch_enter_hook, "calls", [lambda _: seen.append("enter")]),
        "exit hook": mock.patch.object(knobs.runtime.launch_exit_hook, "calls", [lambda _: seen.append("exit")]),
        "a function as hook": mock.patch.object(knobs.runtime, "launch_enter_hook", new=_seen(seen, "plain")),
        "run hook": mock.patch.object(_kernel, "pre_run_hooks", [lambda *_, **__: seen.append("run")]),
        "debug": mock.patch.object(knobs.runtime, "debug", True),
        "instrumentation": mock.patch.object(knobs.compilation, "instrumentation_mode", "nothing"),
        "stages": mock.patch.object(knobs.runtime, "add_stages_inspection_hook", return_value=("key", "hash")),
        "a run of all kernels": mock.patch.object(JITFunction, "run", _run_of_all(seen)),
        "a run of one kernel": mock.patch.object(_kernel, "run", _run_of_one(seen)),
        "a CPU tensor": mock.patch.object(direct, "on_nvidia", lambda x: x.is_cuda),
    }
    driver, result = Driver(launched=[]), {}
    with stubbed(driver):
        for name, change in changes.items():
            launch(driver, usual(), False)
            seen.clear()
            with by_triton() as inside, change:
                for _ in range(3):
                    launch(driver, usual(), False)
            noticed = sorted(set(seen))
            with by_triton() as after:
                launch(driver, usual(), False)
            result[name] = [len(inside), noticed, len(after)]
    return result


def _seen(seen: list[str], name: str) -> Callable[..., None]:
    return lambda _: seen.append(name)


def _run_of_all(seen: list[str]) -> Callable[..., Any]:
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append("all")
        return direct.RUN(self, *args, **kwargs)

    return run


def _run_of_one(seen: list[str]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        seen.append("one")
        return direct.Kernel.run(_kernel, *args, **kwargs)

    return run


def changes() -> dict[str, Any]:
    """A global, a source and a driver that change under a compiled kernel; a compilation that a hook forbids."""
    driver, result = Driver(), {}
    namespace = globals()
    with stubbed(driver):
        launch(driver, usual(KIND="odd"), False)
        namespace["ADDED"] = tl.constexpr(4)
        try:
            launch(driver, usual(KIND="odd"), False)
        except RuntimeError as error:
            result["global"] = str(error)
        namespace["ADDED"] = tl.constexpr(3)
        first = launch(driver, usual(), False)
        source = _kernel.src
        _kernel._unsafe_update_src(source.replace("x += ADDED", "x -= ADDED"))
        _kernel.device_caches.clear()
        result["source"] = launch(driver, usual(), False) is first
        forbidden = mock.patch.object(knobs.runtime, "jit_cache_hook", return_value=True)
        with forbidden:
            result["forbidden"] = [launch(driver, usual(BLOCK=128), False) is None for _ in range(2)]
        result["allowed"] = launch(driver, usual(BLOCK=128), False) is not None
    another = Driver(launched=[])
    with stubbed(another), by_triton() as names:
        for _ in range(2):
            launch(another, usual(), False)
    result["driver"] = len(names)
    return result


def times() -> list[tuple[str, float, float]]:
    return list(measure_launches())


def releases() -> dict[str, str]:
    """What a kernel is, by the version of Triton."""
    result = {}
    for version in ("3.6.0", "3.7.1", "3.8.0", "3.9.0", "3.10.0", "4.0.0"):
        with mock.patch.object(triton, "__version__", version):
            result[version] = type(direct.kernel(do_not_specialize=("size",))(_kernel.fn)).__name__
    return result


if __name__ == "__main__":
    print(json.dumps(globals()[sys.argv[1]]()))
