"""conspo::weighted_sum: the value of a loss with known weights, tied to gradients that were computed with it.

Backward multiplies these gradients in place by the scalar that comes in. The gradient of weight may instead be added to
a buffer. Autograd reports a second backward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..backends.registry import backend_for
from .registration import asked_for, device_guard, op, traced, without_derivative


def _fake_scale(*_: object) -> None:
    return None


@op(_fake_scale, mutates=("gradient",))
def scale_(gradient: Tensor, factor: Tensor, implementation: str) -> None:
    """gradient *= factor (0-d), at no cost where the factor is 1; it counts as a modification even then."""
    with device_guard(gradient):
        backend_for(implementation, gradient.device).scale.scale_(gradient, factor)


@op(_fake_scale, mutates=("target",))
def add_scaled_(target: Tensor, source: Tensor, factor: Tensor) -> None:
    """target += source * factor (0-d); target and source have one shape and one dtype."""
    target.addcmul_(source, factor.to(source.dtype))


def _fake(values: Tensor, *_: object) -> Tensor:
    return values.new_empty(())


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    del output
    values, weights, counts, _hidden, weight, _bias, *gradients, ctx.weight_grad, ctx.implementation = inputs
    # A graph through the values: then no gradient is known.
    ctx.save_for_backward(*((weights, counts) if values.requires_grad else (None, None)), *gradients)
    ctx.weight_node = None if weight is None else weight.grad_fn
    ctx.used = False


def _backward(ctx: Any, grad_value: Tensor) -> tuple[Any, ...]:
    weights, counts, *gradients = ctx.saved_tensors  # the first backward modified them: autograd raises in a second
    if ctx.used and any(gradient is not None for gradient in gradients):  # but not inside of saved-tensor hooks
        raise RuntimeError("a second backward through a loss of known weights, whose gradient the first has scaled")
    ctx.used = True
    grad_values = None
    if weights is not None:
        used = weights != 0 if counts is None else (weights != 0) & (counts > 0)
        grad_values = torch.where(used, weights * grad_value, 0.0)
    given: list[Tensor | None] = []
    for i, gradient in enumerate(gradients):
        if gradient is None:
            given.append(None)
        elif i == 1 and ctx.weight_grad is not None:
            if traced(gradient) or asked_for(ctx.weight_node):
                add_scaled_(ctx.weight_grad, gradient.detach(), grad_value)
            given.append(None)
        elif traced(gradient):
            given.append(gradient * grad_value)
        else:
            gradient = gradient.detach()
            scale_(gradient, grad_value, ctx.implementation)
            given.append(without_derivative(gradient))
    return grad_values, None, None, *given, None, None, None, None, None


@op(_fake, setup_context=_setup_context, backward=_backward)
def weighted_sum(
    values: Tensor,
    weights: Tensor,
    counts: Tensor | None,
    x: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    grad_x: Tensor | None,
    grad_weight: Tensor | None,
    grad_bias: Tensor | None,
    weight_grad: Tensor | None,
    implementation: str,
) -> Tensor:
    """The sum (0-d) of weights times values, without those whose weight (or count) is zero, whatever the value.

    Args:
        values, weights: of one shape.
        counts: of that shape, or None.
        x, weight, bias: the inputs with known gradients: logits or hidden states, the head's weight and bias.
        grad_x, grad_weight, grad_bias: these gradients, or None.
        weight_grad: backward adds the gradient of weight to it, and returns none; `grad_weight` has its dtype.
    """
    del x, weight, bias, grad_x, grad_weight, grad_bias, weight_grad
    with device_guard(values):
        kernels = backend_for(implementation, values.device).sequence_score
        return kernels.weighted_sum(values.contiguous(), weights.contiguous(), counts)
