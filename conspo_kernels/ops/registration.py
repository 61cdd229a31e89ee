"""How an op is registered, and how it is called: eager mode goes straight to its autograd Function.

torch.compile, fake tensors and dispatch modes see `torch.ops.conspo.<name>`, with schema, fake and autograd. Its
dispatch costs tens of microseconds a call, which plain eager tensors need not pay: for them the same forward,
`setup_context` and backward run as a `torch.autograd.Function`.

Second derivatives raise: a gradient would otherwise be a constant in silence.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.autograd.graph import Node
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

P = ParamSpec("P")
R = TypeVar("R")

NAMESPACE = "conspo"  # of the ops; a second copy of the package in one process needs another

# Types of arguments that eager mode may take straight: no subclass of a tensor, and no symbolic number.
PLAIN = frozenset(
    (Tensor, nn.Parameter, bool, int, float, str, list, type(None), torch.dtype, torch.device, torch.Size)
)
_dispatch_modes: Callable[[], int] = torch._C._len_torch_dispatch_stack
_transforms: Callable[[], Any] = torch._C._functorch.peek_interpreter_stack


FORMULAS: dict[Any, Callable[..., int]] = {}  # operations of an op by its arguments
_NO_GUARD = contextlib.nullcontext()


def device_guard(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """Makes the device of x the current one: kernels are launched on the current device."""
    return torch.cuda.device_of(x) if x.is_cuda else _NO_GUARD


def op(
    fake: Callable[..., Any],
    *,
    mutates: Sequence[str] = (),
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
    flops: Callable[..., int] | None = None,
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Register a function of tensors and numbers as `conspo::<its name>`.

    fake: shapes and dtypes of the results.  mutates: names of the arguments that are written to.  setup_context,
    backward: as of `torch.library.register_autograd`; without them the op has no gradient.  flops: its operations, a
    formula of its arguments as of `torch.utils.flop_counter.register_flop_formula(..., get_raw=True)`.
    """

    def register(forward: Callable[P, R]) -> Callable[P, R]:
        name = forward.__name__
        registered = torch.library.custom_op(f"{NAMESPACE}::{name}", forward, mutates_args=mutates)
        registered.register_fake(fake)
        function = None
        if backward is not None:
            registered.register_autograd(backward, setup_context=setup_context)
            function = _function(name, forward, setup_context, backward)
        if flops is not None:
            FORMULAS[registered._opoverload.overloadpacket] = flops
        written = [i for i, argument in enumerate(registered._opoverload._schema.arguments) if argument.name in mutates]

        names = forward.__code__.co_varnames[: forward.__code__.co_argcount]

        @functools.wraps(forward)
        def call(*args: Any, **kwargs: Any) -> Any:
            if kwargs:
                args += tuple(kwargs.pop(name) for name in names[len(args) :])
                assert not kwargs, f"{name} got {', '.join(kwargs)}"
            if not _eager(args):
                if flops is not None and not torch.compiler.is_compiling():
                    _tell_flop_counters()
                return registered(*args)
            if function is not None and torch.is_grad_enabled() and _requires_grad(args):
                return function.apply(*args)
            result = forward(*args)  # type: ignore[call-arg]
            for i in written:
                if args[i] is not None:
                    torch.autograd.graph.increment_version(args[i])
            return result

        return call

    return register


def _tell_flop_counters() -> None:
    """Register FORMULAS, where somebody counts.

    Not when the op is registered: `torch.utils.flop_counter` imports Triton, which has to be imported later, as
    `gradcheck` first decides whether it interprets. A counter that is active has its own copy of the formulas already.
    """
    module = sys.modules.get("torch.utils.flop_counter")
    if module is None:
        return
    for target, formula in FORMULAS.items():
        if target not in module.flop_registry:
            module.register_flop_formula(target, get_raw=True)(formula)
    for mode in _get_current_dispatch_mode_stack():
        formulas = getattr(getattr(mode, "counter", None), "flop_registry", None)
        if formulas is not None:
            formulas.update((target, formula) for target, formula in FORMULAS.items() if target not in formulas)


def _requires_grad(args: tuple[Any, ...]) -> bool:
    for x in args:  # noqa: SIM110 - a generator costs a microsecond
        if isinstance(x, Tensor) and x.requires_grad:
            return True
    return False


def _eager(args: tuple[Any, ...]) -> bool:
    """Whether arguments are plain, and no compiler, mode or transform is active that has to see the op."""
    if torch.compiler.is_compiling() or _dispatch_modes() or _transforms() is not None:
        return False
    return PLAIN.issuperset(map(type, args)) and not _negative(args)


def _negative(args: Sequence[Any]) -> bool:
    """Whether a tensor is a view whose elements are minus what memory holds: the dispatcher gives an op a copy."""
    for x in args:  # noqa: SIM110 - a generator costs a microsecond
        if x.is_neg() if isinstance(x, Tensor) else isinstance(x, list) and _negative(x):
            return True
    return False


def _function(
    name: str, forward: Callable[..., Any], setup_context: Callable[..., None] | None, backward: Callable[..., Any]
) -> type[torch.autograd.Function]:
    """The autograd Function of the parts that the op is registered with."""

    # Forward sets up the context itself: with `setup_context`, `apply` binds the arguments by `inspect`, 100 us a call.
    def forward_and_context(ctx: Any, *args: Any) -> Any:
        output = forward(*args)
        if setup_context is not None:
            setup_context(ctx, inputs=args, output=output)
        return output

    members = {"forward": staticmethod(forward_and_context), "backward": staticmethod(backward)}
    return type(name, (torch.autograd.Function,), members)


def no_second_derivative(ctx, *_):  # type: ignore[no-untyped-def]
    raise NotImplementedError("conspo_kernels has no second derivative: the gradient has no gradient of its own")


def traced(x: Tensor | None) -> bool:
    """Whether a compiler traces the op that x comes to.

    A traced backward overwrites nothing that the forward saved: inductor cannot prove such a tensor to be its own, and
    would read and write all of it once more.
    """
    return isinstance(x, FakeTensor | FunctionalTensor)


def asked_for(node: Node | None) -> bool:
    """Whether the backward that runs computes the gradient of the tensor that a node made.

    `ctx.needs_input_grad` says what could be asked for: `autograd.grad(loss, hidden)` asks for less.
    """
    return node is None or torch._C._will_engine_execute_node(node)


class _WithoutDerivative(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gradient: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        return gradient.view_as(gradient)

    backward = staticmethod(no_second_derivative)


def without_derivative(gradient: Tensor) -> Tensor:
    """The gradient; under `create_graph=True`, when grad mode is on in backward, one whose own backward raises."""
    if not torch.is_grad_enabled() or traced(gradient):
        return gradient
    return _WithoutDerivative.apply(gradient.detach().requires_grad_())
