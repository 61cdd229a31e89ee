"""A simulated GPU: code for a GPU runs on the CPU, so that a machine without a GPU can test that it runs.

Within `simulated()` tensors that were made for "cuda" lie in the CPU's memory and say that they are on a GPU. What a
GPU would refuse is refused (operands on two devices, a launch while another device is current), what would make the
host wait is an error where the sync debug mode says so, a graph replays what the device did, and the allocator's
figures are those of the tensors. Triton's kernels run under its interpreter. There is one stream, `torch.compile`
returns what it is given, times mean nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

from benchmarks.simulation.simulated_streams import Clock, Event, Stream

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
DEVICE = Tensor.device.__get__  # type: ignore[attr-defined]
IS_CUDA, IS_CPU = Tensor.is_cuda.__get__, Tensor.is_cpu.__get__  # type: ignore[attr-defined]
aten = torch.ops.aten

# The result's size, or its value, has to be known to the host.
WAITING = {
    aten._local_scalar_dense.default, aten.is_nonzero.default, aten.equal.default, aten.nonzero.default,
    aten.masked_select.default, aten._unique2.default, aten.unique_consecutive.default, aten.bincount.default,
}  # fmt: skip
READING = {Tensor.tolist, Tensor.numpy, Tensor.__array__}  # of the memory itself, without an op
# Operands may lie on two devices: copies, and indices, which go where the indexed tensor is.
TWO_DEVICES = {
    aten.copy_.default, aten._to_copy.default, aten.index.Tensor, aten.index_put.default, aten.index_put_.default,
    aten._index_put_impl_.default, aten.set_.source_Storage_storage_offset,
}  # fmt: skip


class Memory:
    """Which storages are on the GPU, and how many bytes of them there were at most."""

    def __init__(self) -> None:
        self.sizes: dict[int, tuple[StorageWeakRef, int]] = {}  # a weak reference keeps the address from being reused
        self.peak = 0
        self.waiting_is_an_error = False
        self.bytes_read = 0  # by Triton's kernels
        self.current = 0  # index of the device that Triton launches on; tensors lie on 0

    def holds(self, x: Tensor) -> bool:
        return x.untyped_storage()._cdata in self.sizes

    def add(self, x: Tensor) -> None:
        storage = x.untyped_storage()
        self.sizes[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.peak = max(self.peak, self.allocated())

    def allocated(self) -> int:
        self.sizes = {key: value for key, value in self.sizes.items() if not value[0].expired()}
        return sum(size for _, size in self.sizes.values())

    @contextlib.contextmanager
    def device(self, index: int) -> Iterator[None]:
        """As `torch.cuda.device`: another device is the current one."""
        before, self.current = self.current, index
        try:
            yield
        finally:
            self.current = before

    def device_of(self, x: Tensor) -> contextlib.AbstractContextManager[None]:
        return self.device(CUDA.index if self.holds(x) else self.current)

    def wait(self, what: object) -> None:
        if self.waiting_is_an_error:
            raise RuntimeError(f"called a synchronizing CUDA operation: {what}")


class Recorded(NamedTuple):
    """Of a graph: an op or a launch of the device, and the tensors that it made."""

    run: Callable[[], Any]
    results: list[Tensor]


class Ops(TorchDispatchMode):
    """Every op: results are where their operands are, and operands in one place."""

    def __init__(self, memory: Memory) -> None:
        super().__init__()
        self.memory = memory
        self.factory_on_gpu = False
        self.recorded: list[Recorded] | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        memory, kwargs = self.memory, kwargs or {}
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        on_gpu = [memory.holds(x) for x in tensors]
        if any(on_gpu):
            self.check(func, tensors, on_gpu, args, kwargs)
        on_gpu_after = any(on_gpu) or (not tensors and self.factory_on_gpu)
        known = {x.untyped_storage()._cdata for x in tensors}
        captured = self.captured(func, args, kwargs) if self.recorded is not None and on_gpu_after else None
        result = func(*args, **kwargs)
        new = [x for x in tree_leaves(result) if isinstance(x, Tensor) and x.untyped_storage()._cdata not in known]
        for x in new if on_gpu_after else ():
            memory.add(x)
        if self.recorded is not None and captured is not None:
            self.recorded.append(Recorded(captured, new))
        return result

    def captured(self, func: Any, args: Any, kwargs: Any) -> Callable[[], Any]:
        """An op as a graph has it: a copy from the host reads its memory anew, any other number is a constant."""
        if func not in (aten.copy_.default, aten._to_copy.default):
            args, kwargs = tree_map(
                lambda x: x.clone() if isinstance(x, Tensor) and not self.memory.holds(x) else x, (args, kwargs)
            )
        return lambda: func(*args, **kwargs)

    def check(self, func: Any, tensors: list[Tensor], on_gpu: list[bool], args: Any, kwargs: Any) -> None:
        elsewhere = [x for x, there in zip(tensors, on_gpu, strict=True) if not there]
        if func is aten.copy_.default and elsewhere:
            if not (kwargs.get("non_blocking") or (len(args) > 2 and args[2])):
                self.memory.wait(func)
        elif func not in TWO_DEVICES and any(x.dim() for x in elsewhere):
            raise RuntimeError(f"Expected all tensors to be on the same device, found cuda:0 and cpu: {func}")
        elif func in WAITING:
            self.memory.wait(func)
        elif func in TWO_DEVICES and any(x is not None and x.dtype == torch.bool for x in tensors[1:]):
            self.memory.wait(f"{func} by a mask")


class Calls(TorchFunctionMode):
    """What Python asks for: tensors on "cuda" are made on the CPU, and say that they are there."""

    def __init__(self, ops: Ops) -> None:
        super().__init__()
        self.ops, self.memory = ops, ops.memory

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = {name: value for name, value in (kwargs or {}).items() if name != "pin_memory"}  # needs a real GPU
        if func == DEVICE:
            return self._device(args[0])
        if func in (IS_CUDA, IS_CPU):
            return self.memory.holds(args[0]) == (func == IS_CUDA)
        if func in (torch.mm, torch.addmm) and kwargs.get("out_dtype") is not None:
            return self._widened(func, args, **kwargs)
        if func in READING and self.memory.holds(args[0]):
            self.memory.wait(func.__name__)
        if func is torch.device:  # only a name
            return func(*args, **kwargs)
        wanted = [x for x in tree_leaves((args, kwargs)) if _is_device(x)]
        if func in (Tensor.to, Tensor.cuda, Tensor.cpu):
            like = next((x for x in args[1:] if isinstance(x, Tensor)), None)
            if like is not None:
                wanted, args = [self._device(like)], (args[0], like.dtype, *args[2:])
            wanted = {Tensor.cuda: [CUDA], Tensor.cpu: [CPU]}.get(func, wanted)
            return self._moved(args[0], wanted, args[1:], kwargs) if wanted else func(*args, **kwargs)
        args, kwargs = tree_map(lambda x: CPU if _is_device(x) else x, (args, kwargs))
        on_gpu = any(torch.device(x).type == "cuda" for x in wanted)
        if func in (torch.tensor, torch.as_tensor) and on_gpu:
            return self._moved(func(*args, **kwargs), [CUDA], (), {})
        before, self.ops.factory_on_gpu = self.ops.factory_on_gpu, on_gpu
        try:
            if wanted and not on_gpu and isinstance(next(iter(args), None), Tensor):  # x.new_empty(device="cpu")
                with _disable_current_modes():
                    return func(*args, **kwargs)
            return func(*args, **kwargs)
        finally:
            self.ops.factory_on_gpu = before

    def _device(self, x: Tensor) -> torch.device:
        return CUDA if self.memory.holds(x) else CPU

    def _widened(
        self, func: Any, args: tuple[Tensor, ...], out_dtype: torch.dtype, out: Tensor | None = None
    ) -> Tensor:
        """A GEMM whose result is wider than its operands: only GPUs have it."""
        tensors = [x for x in (*args, out) if x is not None]
        self.ops.check(func, tensors, [self.memory.holds(x) for x in tensors], args, {})
        with _disable_current_modes():  # the copies are none of the GPU's
            result = func(*(x.to(out_dtype) for x in args))
            result = result if out is None else out.copy_(result)
        if self.ops.recorded is not None:
            self.ops.recorded.append(Recorded(lambda: self._widened(func, args, out_dtype, out), [result]))
        if out is None:
            self.memory.add(result)
        return result

    def _moved(self, x: Tensor, wanted: list[Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """x.to(...) of another device: a copy there."""
        here, there = self.memory.holds(x), torch.device(wanted[0]).type == "cuda"
        kwargs = {name: value for name, value in kwargs.items() if name != "device"}
        flags = [value for value in args if isinstance(value, bool)]
        dtype = kwargs.get("dtype") or next((value for value in args if isinstance(value, torch.dtype)), x.dtype)
        if here == there:
            return Tensor.to(x, dtype) if dtype != x.dtype or kwargs.get("copy") else x
        if not (kwargs.get("non_blocking") or any(flags[:1])):
            self.memory.wait("a copy between host and device")
        moved = Tensor.to(x, dtype).clone()
        if there:
            self.memory.add(moved)
            if self.ops.recorded is not None:
                self.ops.recorded.append(Recorded(lambda: Tensor.to(x, dtype).clone(), [moved]))
        else:
            self.memory.sizes.pop(moved.untyped_storage()._cdata, None)
        return moved


def _is_device(x: object) -> bool:
    return isinstance(x, torch.device) or (isinstance(x, str) and x.partition(":")[0] in ("cuda", "cpu"))


class Graph:
    """Replays what the device did, into the same memory. What the host did in the capture is not done again."""

    def __init__(self) -> None:
        self.recorded: list[Recorded] = []

    def replay(self) -> None:
        with _disable_current_modes(), torch._C.DisableTorchFunction(), torch.no_grad():
            for run, results in self.recorded:
                again = run()
                for old, new in zip(results, filter(torch.is_tensor, tree_leaves(again)), strict=False):
                    old.copy_(new)


def _nothing(*_: object, **__: object) -> None: ...


def _replacements(ops: Ops) -> dict[str, Any]:
    """Of names in `torch.cuda`."""
    clock, memory = Clock(), ops.memory
    properties = SimpleNamespace(
        name="simulated", total_memory=80 * 2**30, major=9, minor=0, multi_processor_count=132, gcnArchName="",
        L2_cache_size=50 * 2**20,
    )  # fmt: skip

    def reset_peak() -> None:
        memory.peak = memory.allocated()

    def set_sync_debug_mode(mode: str | int) -> None:
        memory.waiting_is_an_error = mode in ("error", 2)

    @contextlib.contextmanager
    def graph(into: Graph, **_: object) -> Iterator[None]:
        ops.recorded, memory.waiting_is_an_error = into.recorded, True
        try:
            yield
        finally:
            ops.recorded, memory.waiting_is_an_error = None, False

    return {
        "is_available": lambda: True, "device_count": lambda: 1, "_lazy_init": _nothing,
        "is_bf16_supported": lambda *_: True, "get_device_properties": lambda *_: properties,
        "get_device_capability": lambda *_: (9, 0), "get_device_name": lambda *_: properties.name,
        "synchronize": lambda *_: memory.wait("synchronize"), "empty_cache": _nothing,
        "current_device": lambda: memory.current, "device_of": memory.device_of, "device": memory.device,
        "memory_allocated": lambda *_: memory.allocated(), "max_memory_allocated": lambda *_: memory.peak,
        "reset_peak_memory_stats": lambda *_: reset_peak(), "set_sync_debug_mode": set_sync_debug_mode,
        "mem_get_info": lambda *_: (properties.total_memory - memory.allocated(), properties.total_memory),
        "_sleep": clock.sleep, "Event": lambda **about: Event(clock, **about), "Stream": Stream,
        "current_stream": lambda *_: Stream(), "stream": lambda *_: contextlib.nullcontext(),
        "is_current_stream_capturing": lambda: ops.recorded is not None, "CUDAGraph": Graph, "graph": graph,
    }  # fmt: skip


@contextlib.contextmanager
def simulated() -> Iterator[Memory]:
    """Within, "cuda" is a device of this machine. Triton has to be interpreting: TRITON_INTERPRET=1 from the start."""
    from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

    from conspo_kernels.backends import registry
    from conspo_kernels.backends.triton import launch
    from conspo_kernels.ops import registration

    memory = Memory()
    ops = Ops(memory)
    run, load = GridExecutor.__call__, InterpreterBuilder.create_masked_load

    def loaded(self: Any, pointers: Any, mask: Any, *args: Any) -> Any:
        result = load(self, pointers, mask, *args)
        memory.bytes_read += int(mask.data.sum()) * result.data.itemsize
        return result

    def launched(self: Any, *args: Any, **kwargs: Any) -> None:
        pointers = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
        if any(memory.holds(x) for x in pointers) and not all(memory.holds(x) for x in pointers):
            raise ValueError("Pointer argument cannot be accessed from Triton (cpu tensor?)")
        if any(memory.holds(x) for x in pointers) and memory.current != CUDA.index:
            raise RuntimeError(f"an illegal memory access: a launch on cuda:{memory.current}, tensors on {CUDA}")

        def launch() -> None:
            with _disable_current_modes(), torch._C.DisableTorchFunction():
                run(self, *args, **kwargs)

        launch()
        if ops.recorded is not None:
            ops.recorded.append(Recorded(launch, []))

    engine = torch.autograd._engine_run_backward  # type: ignore[attr-defined]

    def backward(*args: Any, **kwargs: Any) -> Any:
        before, ops.factory_on_gpu = ops.factory_on_gpu, any(memory.holds(x) for x in args[0])
        try:  # what autograd makes by itself, zeros for instance, is where the roots are
            with Calls(ops):  # which is off while it handles the call of `backward` or `grad` itself
                return engine(*args, **kwargs)
        finally:
            ops.factory_on_gpu = before

    def forget() -> None:
        registry.forget_choices()
        launch.architecture.cache_clear()

    forget()
    with contextlib.ExitStack() as stack:
        for name, value in _replacements(ops).items():
            stack.enter_context(mock.patch.object(torch.cuda, name, value))
        # Eager mode's own way: the modes of this module do not have to see an op.
        stack.enter_context(mock.patch.object(registration, "_dispatch_modes", return_value=0))
        stack.enter_context(mock.patch.object(GridExecutor, "__call__", launched))
        stack.enter_context(mock.patch.object(InterpreterBuilder, "create_masked_load", loaded))
        stack.enter_context(mock.patch.object(torch.autograd, "_engine_run_backward", backward))
        stack.enter_context(mock.patch.object(torch, "compile", _as_it_is))
        stack.callback(forget)
        with ops, Calls(ops):
            yield memory


def _as_it_is(function: Callable[..., Any] | None = None, **_: object) -> Any:
    return function if function is not None else lambda it: it
