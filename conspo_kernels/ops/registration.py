"""How an op is registered, and how it is called: eager mode goes straight to its autograd Function.

torch.compile, fake tensors and dispatch modes see `torch.ops.conspo.<name>`, with schema, fake and autograd. Its
dispatch costs tens of microseconds a call, which plain eager tensors need not pay: for them the same forward, `save`
and backward run as a `torch.autograd.Function`.

Second derivatives raise: a gradient would otherwise be a constant in silence.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections import namedtuple
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


def op(
    fake: Callable[[Any], Any],
    *,
    mutates: Sequence[str] = (),
    save: Callable[[Any, Any, Any], None] | None = None,
    backward: Callable[..., dict[str, Tensor | None]] | None = None,
    flops: Callable[[Any], int] | None = None,
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Register a function of tensors and numbers, the first of them a tensor, as `conspo::<its name>`.

    It runs while the device of its first tensor is the current one, on which kernels are launched.

    Args:
        fake: from the named arguments to results of their shapes and dtypes.
        mutates: names of the arguments that are written to.
        save: (ctx, the named arguments, the results): saves tensors for backward.
        backward: (ctx, the gradients of the results): the gradients of arguments by their names. It reads what was
            saved by `saved_tensors(ctx)`. Without these two the op has no gradient.
        flops: from the named arguments to the number of operations, for `torch.utils.flop_counter`.
    """

    def register(forward: Callable[P, R]) -> Callable[P, R]:
        name, parameters = forward.__name__, inspect.signature(forward).parameters
        defaults = [it.default for it in parameters.values() if it.default is not inspect.Parameter.empty]
        named: Any = namedtuple(name, parameters, defaults=defaults)  # type: ignore[misc]
        written = [i for i, argument in enumerate(parameters) if argument in mutates]

        @functools.wraps(forward)
        def on_device(*args: Any) -> Any:
            if not args[0].is_cuda:
                return forward(*args)  # type: ignore[call-arg]
            with torch.cuda.device_of(args[0]):
                return forward(*args)  # type: ignore[call-arg]

        schema = torch.library.infer_schema(forward, mutates_args=mutates)
        registered = torch.library.custom_op(f"{NAMESPACE}::{name}", on_device, mutates_args=mutates, schema=schema)
        registered.register_fake(lambda *args, **kwargs: fake(named(*args, **kwargs)))
        apply = None
        if save is not None and backward is not None:
            function = _function(named, on_device, save, backward)
            # Without torch's own search for functorch's tensors in every argument: `_eager` and checks have looked.
            apply = super(torch.autograd.Function, function).apply
            registered.register_autograd(
                function.backward, setup_context=lambda ctx, inputs, output: save(ctx, named(*inputs), output)
            )

        if flops is not None:
            FORMULAS[registered._opoverload.overloadpacket] = lambda *args, **_: flops(named(*args))

        @functools.wraps(forward)
        def call(*args: Any, **kwargs: Any) -> Any:
            args = named(*args, **kwargs)
            if not _eager(args):
                if flops is not None and not torch.compiler.is_compiling():
                    _tell_flop_counters()
                return registered(*args)
            if apply is not None and torch.is_grad_enabled() and _requires_grad(args):
                return apply(*args)
            result = on_device(*args)
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
    return PLAIN.issuperset(map(type, args))


def _function(named: Any, forward: Callable[..., Any], save: Callable[..., None], backward: Callable[..., Any]) -> Any:
    """The autograd Function of the parts that the op is registered with."""

    positions = {field: i for i, field in enumerate(named._fields)}

    # Forward sets up the context itself: with `setup_context`, `apply` binds the arguments by `inspect`, 100 us a call.
    def forward_and_save(ctx: Any, *args: Any) -> Any:
        output = forward(*args)
        save(ctx, named(*args), output)
        return output

    def by_position(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        # Kernels read memory, which a lazily negated view has not changed.
        incoming = [x if x is None else x.resolve_neg() for x in gradients]
        results: list[Tensor | None] = [None] * len(positions)
        for name, gradient in backward(ctx, *incoming).items():
            results[positions[name]] = gradient
        if torch.is_grad_enabled():
            depends_on = [*ctx.__dict__.pop("depends_on", ()), *incoming]
            results = [x if x is None else without_derivative(x, depends_on) for x in results]
        return tuple(results)

    members = {"forward": staticmethod(forward_and_save), "backward": staticmethod(by_position)}
    return type(named.__name__, (torch.autograd.Function,), members)


def saved_tensors(ctx: Any) -> tuple[Any, ...]:
    """What `save` has saved. Under `create_graph=True` they are noted: the gradient depends on those with a graph."""
    tensors: tuple[Any, ...] = ctx.saved_tensors
    if torch.is_grad_enabled():
        ctx.depends_on = tensors
    return tensors


def no_second_derivative(ctx: Any, *_: object) -> Any:
    raise NotImplementedError("conspo_kernels has no second derivative: the gradient has no gradient of its own")


def traced(x: Tensor | None) -> bool:
    """Whether a compiler traces the op that x comes to.

    A traced backward overwrites nothing that the forward saved: inductor cannot prove such a tensor to be its own, and
    would read and write all of it once more.
    """
    return isinstance(x, FakeTensor | FunctionalTensor)


def asked_for(node: Node | None) -> bool:
    """Whether the backward that runs computes the gradient of the tensor that a node made.

    `ctx.needs_input_grad` names all inputs that require a gradient: `autograd.grad(loss, hidden)` asks for fewer.
    """
    return node is None or torch._C._will_engine_execute_node(node)


class _WithoutDerivative(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gradient: Tensor, *depends_on: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        return gradient.view_as(gradient)

    backward = staticmethod(no_second_derivative)


def without_derivative(gradient: Tensor, depends_on: Sequence[Tensor | None]) -> Tensor:
    """For `create_graph=True`, when grad mode is on in backward: the gradient, as one whose own backward raises.

    It has a path to the tensors in `depends_on`, so that `autograd.grad` by one of these raises too.
    """
    if traced(gradient):
        return gradient
    with_graph = [x for x in depends_on if x is not None and x.requires_grad]
    return _WithoutDerivative.apply(gradient.detach().requires_grad_(), *with_graph)
