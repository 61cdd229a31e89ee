"""A Triton driver whose launches run the compiled PTX on CPU tensors."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import triton
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime.cache import get_cache_manager

from .arithmetic import Array, Perturbation
from .execute import Program
from .memory import Fault, Memory, Region, region_of

TARGETS = {name: GPUTarget("cuda", int(name[3:]), 32) for name in ("sm_80", "sm_90", "sm_100")}
SCALARS = {
    "i1": "u1", "i8": "i1", "i16": "i2", "i32": "i4", "i64": "i8", "u8": "u1", "u16": "u2", "u32": "u4", "u64": "u8",
    "fp32": "f4", "fp64": "f8",
}  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """How kernels are executed.  order: of CTAs.  races: look for them.  Others: as of `compiled`."""

    target: str
    perturbation: Perturbation | None
    order: np.random.Generator
    races: bool
    assembled: bool


_now: Settings | None = None  # within `executing`
CACHE = "executed"  # in Triton's: what 3.6 compiles for a hook has the name there of what it compiles without one


@contextlib.contextmanager
def executing(settings: Settings) -> Iterator[None]:
    """Within, launching a Triton kernel compiles it for the target and executes its PTX, on CPU tensors."""
    global _now
    outer, driver = _now, triton.runtime.driver
    active_driver, hook = driver._active, knobs.runtime.add_stages_inspection_hook
    _now = settings
    driver.set_active(_Driver(settings.target))
    try:
        with knobs.cache.scope():
            knobs.runtime.add_stages_inspection_hook = None if settings.assembled else _stop_at_ptx
            if not settings.assembled:
                folder = Path(knobs.cache.dir)
                knobs.cache.dir = str(folder if folder.name == CACHE else folder / CACHE)
            yield
    finally:
        _now = outer
        driver._active = active_driver
        knobs.runtime.add_stages_inspection_hook = hook


def _stop_at_ptx(*arguments: Any) -> tuple[str, str] | None:
    """Triton's hook into its stages of compilation: PTX stands in for machine code, which is not run.

    Without arguments it returns a key for Triton's cache, which must not mix PTX and machine code.
    """
    if not arguments:
        return "executed as PTX", "executed as PTX"
    stages = arguments[1]
    stages["cubin"] = lambda source, metadata: source.encode()
    return None


class _Utilities:
    """As much of a driver's as launching needs."""

    def get_device_properties(self, device: object) -> dict[str, int]:
        return {"max_shared_mem": 232_448, "multiprocessor_count": 132, "warpSize": 32}

    def load_binary(self, name: str, kernel: bytes, shared: int, device: object) -> tuple[bytes, None, int, int, int]:
        return kernel, None, 0, 0, 1024


class CompilingDriver:
    """As much of a Triton driver as compiling needs, on a machine without the target.

    purpose: of what is compiled. It is part of the key of Triton's per-device cache, which must not mix two purposes.
    """

    def __init__(self, target: GPUTarget, purpose: str) -> None:
        self.target = target
        self.purpose = purpose

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> str:
        return f"{self.purpose} {self.target.arch}"

    def get_current_stream(self, device: object) -> int:
        del device
        return 0


class _Driver(CompilingDriver):
    """And as much as launching needs."""

    def __init__(self, target: str) -> None:
        super().__init__(TARGETS[target], "executed")
        self.utils = _Utilities()
        self.launcher_cls = _Launcher


@functools.lru_cache(maxsize=256)
def program_of(text: str) -> Program:
    """A kernel's, read once: arguments that differ in what Triton specialises for may compile to one text."""
    return Program(text)


class _Launcher:
    """Launches one compiled kernel: its PTX is in Triton's cache, with machine code beside it or without."""

    def __init__(self, source: Any, metadata: Any) -> None:
        self.kinds = list(source.signature.values())
        self.names = list(source.signature)
        self.metadata = metadata
        path = get_cache_manager(metadata.hash).get_file(f"{metadata.name}.ptx")
        assert path is not None
        self.program = program_of(Path(path).read_text(encoding="utf-8"))

    def __call__(
        self, x: int, y: int, z: int, stream: int, function: None, packed: Any, launch: Any, enter: Any, leave: Any,
        *values: Any,
    ) -> None:  # fmt: skip
        settings = _now
        if settings is None:
            raise RuntimeError("a kernel that was compiled to be executed is launched outside of `executing`")
        if self.metadata.global_scratch_size or getattr(self.metadata, "num_ctas", 1) != 1:
            raise NotImplementedError("scratch memory and clusters of CTAs")
        arguments: list[Array] = []
        regions: dict[int, Region] = {}
        for name, kind, value in zip(self.names, self.kinds, values, strict=True):
            if kind == "constexpr":
                continue
            if kind.startswith("*"):
                arguments.append(np.array([value.data_ptr()], np.uint64))
                _add_region(regions, name, value)
            else:
                arguments.append(np.array([value], np.dtype(SCALARS[kind])))
        arguments += [np.zeros(1, np.uint64)] * 2  # global and profiling scratch memory: none
        memory = Memory("global", list(regions.values()))
        self.program.run(
            (x, y, z), arguments, memory, self.metadata.shared, settings.perturbation, settings.order, settings.races
        )


def _add_region(regions: dict[int, Region], name: str, tensor: Tensor) -> None:
    if tensor.device.type != "cpu":
        raise Fault(f"{name} must be a CPU tensor to be executed, got one on {tensor.device}")
    start = tensor.untyped_storage().data_ptr()
    if start in regions:
        regions[start].name += f" = {name}"
    elif start:
        regions[start] = region_of(name, tensor)
