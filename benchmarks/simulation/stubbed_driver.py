"""A Triton driver whose launches do nothing: what is left of a call is the host's time.

Kernels on CPU tensors are compiled for sm_90 and launched as on a GPU, but for the driver's last call.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple
from unittest import mock

import triton

from conspo_kernels.backends import registry
from conspo_kernels.backends import triton as backend
from conspo_kernels.backends.triton import direct
from ptx_executor.driver import TARGETS, CompilingDriver


class Launched(NamedTuple):
    """What a launcher of Triton's is called with."""

    grid: tuple[int, int, int]
    stream: int
    function: int
    metadata: Any
    hooks: tuple[Any, Any]
    values: tuple[Any, ...]


class Driver(CompilingDriver):
    """device, stream: the current ones.  launched: the launches; None: they are not even counted."""

    def __init__(self, launched: list[Launched] | None = None) -> None:
        super().__init__(TARGETS["sm_90"], "stubbed")
        self.device, self.stream, self.launched = 0, 0, launched
        self.utils, self.loaded = self, 0

    def get_current_device(self) -> Any:
        return self.device

    def get_current_stream(self, device: object) -> int:
        del device
        return self.stream

    def get_device_properties(self, device: object) -> dict[str, int]:
        del device
        return {"max_shared_mem": 232_448, "multiprocessor_count": 132, "warpSize": 32}

    def load_binary(self, *_: object) -> tuple[int, int, int, int, int]:
        self.loaded += 1
        return self.loaded, self.loaded, 0, 0, 1024

    def unload_module(self, *_: object) -> None: ...

    def launcher_cls(self, *_: object) -> Any:
        launched = self.launched
        return _nothing if launched is None else lambda *arguments: launched.append(_described(*arguments))


def _nothing(*_: object) -> None: ...


def _described(
    x: int, y: int, z: int, stream: int, function: int, packed: Any, _about: Any, enter: Any, leave: Any, *values: Any
) -> Launched:
    for hook in (enter, leave):
        if hook is not None:
            hook({})
    return Launched((x, y, z), stream, function, packed, (enter, leave), values)


@contextlib.contextmanager
def stubbed(driver: Driver, directly: bool = True) -> Iterator[None]:
    """Within, launches end in `driver`.  directly: as on an NVIDIA GPU; False: Triton launches everything by itself."""
    config = triton.runtime.driver
    before = config._active
    config.set_active(driver)  # type: ignore[arg-type]
    registry.forget_choices()
    try:
        with (
            mock.patch.object(backend, "executed", True),
            mock.patch.object(direct, "on_nvidia", (lambda _: True) if directly else (lambda _: False)),
        ):
            yield
    finally:
        config._active = before
        registry.forget_choices()
