"""What a call would launch on a GPU, counted without one.

Tensors on the device "meta" stand in for tensors on a GPU: no code of the library takes them for CPU tensors, their
values cannot be looked at (`item` and `nonzero` raise), and autograd runs on them. Triton's kernels are recorded in
place of being launched; what PyTorch would launch is seen by a dispatch mode. Views and allocations launch nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from conspo_kernels.backends import registry
from conspo_kernels.backends import triton as triton_backend
from conspo_kernels.linear import gemm
from conspo_kernels.ops import devices, registration

DEVICE = torch.device("meta")
ALLOCATIONS = {
    "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "_unsafe_view", "device",
    "sym_size", "sym_stride", "is_pinned", "lift_fresh", "resize_",
}  # fmt: skip
PRODUCTS = {"mm", "addmm", "bmm"}


class Launch(NamedTuple):
    """kind: "kernel" of Triton, "op" of PyTorch, "gemm", or "copy" from the host.  pinned: memory that a copy is from.

    dtypes: of the tensors that an op takes.  reduced: whether a GEMM may sum in 16 bits.
    """

    kind: str
    name: str
    pinned: bool = True
    dtypes: tuple[torch.dtype, ...] = ()
    reduced: bool = False


def _tensors(values: Any) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, list | tuple):
        for value in values:
            yield from _tensors(value)
    elif isinstance(values, dict):
        yield from _tensors(list(values.values()))


class Recorder(TorchDispatchMode):
    def __init__(self, launches: list[Launch], pinned: set[int]) -> None:
        super().__init__()
        self.launches, self.pinned = launches, pinned

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        taken, given = list(_tensors([args, kwargs])), list(_tensors(result))
        name = func.__name__.partition(".")[0]
        on_device = any(x.device == DEVICE for x in (*taken, *given))
        if not on_device or func.is_view or name in ALLOCATIONS:
            return result
        dtypes = tuple(x.dtype for x in taken)
        if name in PRODUCTS:
            reduced = torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
            self.launches.append(Launch("gemm", name, dtypes=dtypes, reduced=bool(reduced)))
            return result
        from_host = [x for x in taken if x.device.type == "cpu" and (x.dim() or "copy" in name)]
        pinned = all(x.untyped_storage().data_ptr() in self.pinned for x in from_host)
        self.launches.append(Launch("copy" if from_host else "op", name, pinned, dtypes))
        return result


@contextlib.contextmanager
def recorded(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Launch]]:
    """Within, the launches of calls on "meta" tensors with implementation="triton", in order."""
    from triton.runtime.interpreter import GridExecutor

    launches: list[Launch] = []
    pinned: set[int] = set()
    kept: list[Tensor] = []

    def staged(x: Tensor, dtype: torch.dtype) -> Tensor:
        kept.append(x.to(dtype, copy=True))
        pinned.add(kept[-1].untyped_storage().data_ptr())
        return kept[-1]

    def launch(self: Any, *args: Any, **kwargs: Any) -> None:
        del args, kwargs
        launches.append(Launch("kernel", self.fn.__name__))

    with monkeypatch.context() as patch:
        patch.setattr(GridExecutor, "__call__", launch)
        patch.setattr(triton_backend, "executed", True)
        patch.setattr(registration, "_dispatch_modes", lambda: 0)  # as in eager mode
        patch.setattr(devices, "staged", staged)
        patch.setitem(registry.PREFERRED, "meta", "triton")
        patch.setattr(devices, "PINNED", frozenset({"meta"}))
        patch.setattr(gemm, "WIDENS", frozenset({"meta"}))
        patch.setattr(torch, "is_autocast_enabled", lambda _device=None: False)  # which does not know "meta"
        torch.use_deterministic_algorithms(False)  # new memory is not filled
        registry.forget_choices()
        try:
            with Recorder(launches, pinned):
                yield launches
        finally:
            registry.forget_choices()


def launches_of(monkeypatch: pytest.MonkeyPatch, call: Callable[[], object]) -> list[Launch]:
    with recorded(monkeypatch) as launches:
        call()
    return launches


def other_than_gemms(launches: list[Launch]) -> list[Launch]:
    return [it for it in launches if it.kind != "gemm"]


def pageable(launches: list[Launch]) -> list[Launch]:
    return [it for it in launches if not it.pinned]
