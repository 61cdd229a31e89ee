"""Kernels that Triton has compiled, launched without its search for them.

For every launch Triton binds the arguments, specialises each of them, writes the options out as a string and looks both
up: with launches stubbed 24 us of a processor, 7 times in a step of `conspo_loss`. A kernel made by `kernel` keeps what
Triton compiled, by all that Triton tells apart, and launches it as Triton's own `JITFunction.run` does, in one line
that is the same in the releases of `RELEASES`: 4 to 6 us. `python -m benchmarks.host_time --launches` counts it.

Triton itself launches, always, where a launch is not only a launch: on CPU tensors (interpreted, executed or only
compiled), on AMD GPUs, where somebody watches launches (a hook, a profiler, another `run`) or wants other code (debug,
instrumentation, stages of compilation), where the source or a global of the kernel is another one, and in other
releases.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.runtime import driver
from triton.runtime.jit import JITFunction

RELEASES = ("3.6", "3.7", "3.8", "3.9")  # of Triton, whose sources were read
ALIGNED = 16  # bytes that Triton specialises pointers on
MOST = 256  # binaries per kernel and form of its call; who has more begins anew
RUN = JITFunction.run


def kernel(**options: Any) -> Callable[[Any], Any]:
    """`triton.jit`, of a kernel that is launched directly once it is compiled."""
    known = triton.__version__.rpartition(".")[0] in RELEASES
    return triton.jit(**options) if knobs.runtime.interpret or not known else lambda fn: Kernel(fn, **options)


def on_nvidia(x: Tensor) -> bool:
    return x.is_cuda and torch.version.hip is None


class Compiled(NamedTuple):
    """What a launch needs, and what Triton compiled it of."""

    binary: Any
    source: str | None  # its hash
    globals: tuple[tuple[dict[str, Any], str, object], ...]

    def current(self, source: str | None) -> bool:
        """Whether Triton would take it too: it raises where a global that a kernel uses has changed."""
        if source is not self.source:
            return False
        for namespace, name, value in self.globals:  # noqa: SIM110 - a generator costs a microsecond
            if namespace.get(name) is not value:
                return False
        return True


class Form(NamedTuple):
    """Arguments as one place passes them: so many by position, then others by these names.

    What is compiled depends on the values of constants, options and integers (Triton looks whether one is 1, divisible
    by 16, or wide), on the dtypes of tensors, and on whether those that it may specialise on begin at 16 bytes. It does
    not on numbers of a type that the kernel declares and does not specialise on.
    """

    values: Callable[[tuple[Any, ...]], Any]
    unaligned: tuple[int, ...]
    aligned: tuple[int, ...]
    order: Callable[[tuple[Any, ...]], tuple[Any, ...]]  # the arguments as the kernel names them
    compiled: dict[tuple[Any, ...], Compiled]

    def key(self, driver: Any, device: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        key = [driver, device, self.values(arguments)]
        for i in self.unaligned:
            x = arguments[i]
            key.append(getattr(x, "dtype", x))
        for i in self.aligned:
            x = arguments[i]
            key.append((x.dtype, x.data_ptr() % ALIGNED == 0) if isinstance(x, Tensor) else x)
        return tuple(key)


def form_of(params: list[Any], by_position: int, names: tuple[str, ...]) -> Form:
    """Of a kernel's parameters, as Triton describes them."""
    places = {param.name: i for i, param in enumerate(params[:by_position])}
    places |= {name: by_position + i for i, name in enumerate(names)}
    values: list[int] = []
    unaligned: list[int] = []
    aligned: list[int] = []
    for param in params:
        declared = param.annotation_type
        if param.is_constexpr or (declared and not declared.startswith("fp") and not param.do_not_specialize):
            values.append(places[param.name])
        elif not declared:
            narrow = param.do_not_specialize or param.do_not_specialize_on_alignment
            (unaligned if narrow else aligned).append(places[param.name])
    known = {param.name for param in params}
    values += [places[name] for name in names if name not in known]  # options
    order = operator.itemgetter(*(places[param.name] for param in params))
    return Form(operator.itemgetter(*values), tuple(unaligned), tuple(aligned), order, {})


class Kernel(JITFunction):
    """A function of Triton with a table of what was compiled of it. `run` is Triton's own way to launch it."""

    def __init__(self, fn: Callable[..., None], **options: Any) -> None:
        super().__init__(fn, **options)
        self.forms: dict[tuple[Any, ...], Form] = {}

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        return lambda *args, **kwargs: self.launch(grid, args, kwargs)

    def launch(self, grid: tuple[int, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not on_nvidia(args[0]) or self.watched():
            return self.run(*args, grid=grid, warmup=False, **kwargs)
        spelled = (len(args), *kwargs)
        form = self.forms.get(spelled)
        if form is None:
            form = self.forms[spelled] = form_of(self.params, len(args), tuple(kwargs))
        arguments = (*args, *kwargs.values())
        active = driver.active
        device = active.get_current_device()
        key = form.key(active, device, arguments)
        compiled = form.compiled.get(key)
        if compiled is None or not compiled.current(self.hash):
            binary = self.run(*args, grid=grid, warmup=False, **kwargs)
            if binary is not None:  # unless a hook forbids to compile
                self._keep(form.compiled, key, binary)
            return binary
        binary = compiled.binary
        x, y, z = (*grid, 1, 1)[:3]
        stream = active.get_current_stream(device)
        binary.run(x, y, z, stream, binary.function, binary.packed_metadata, None, None, None, *form.order(arguments))
        return binary

    def watched(self) -> bool:
        """Whether somebody wants to see launches, or other code than usual."""
        runtime = knobs.runtime
        return bool(
            getattr(runtime.launch_enter_hook, "calls", runtime.launch_enter_hook)
            or getattr(runtime.launch_exit_hook, "calls", runtime.launch_exit_hook)
            or runtime.add_stages_inspection_hook is not None
            or runtime.debug
            or knobs.compilation.instrumentation_mode
            or self.pre_run_hooks
            or JITFunction.run is not RUN
            or "run" in self.__dict__
        )

    def _keep(self, compiled: dict[tuple[Any, ...], Compiled], key: tuple[Any, ...], binary: Any) -> None:
        if len(compiled) >= MOST:
            compiled.clear()
        used = ((namespace, name, namespace.get(name)) for (name, _), (_, namespace) in self.used_global_vals.items())
        compiled[key] = Compiled(binary, self.hash, tuple(used))
