"""conspo::weighted_sum: the value of a loss with known weights, tied to gradients that were computed with it.

Backward multiplies these gradients in place by the scalar that comes in. The gradient of weight may instead be added to
a buffer. Autograd reports a second backward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..backends.registry import backend_for
from .registration import asked_for, op, saved_tensors, traced


@op(lambda _: None, mutates=("gradient",))
def scale_(gradient: Tensor, factor: Tensor, implementation: str) -> None:
    """gradient *= factor (0-d), at no cost where the factor is 1; it counts as a modification even then."""
    backend_for(implementation, gradient.device).scale_(gradient, factor)


@op(lambda _: None, mutates=("target",))
def add_scaled_(target: Tensor, source: Tensor, factor: Tensor) -> None:
    """target += source * factor (0-d); target and source have one shape and one dtype."""
    target.addcmul_(source, factor.to(source.dtype))


def _save(ctx: Any, it: Any, output: Tensor) -> None:
    ctx.weight_grad, ctx.implementation = it.weight_grad, it.implementation
    # A graph through the values: then no gradient is known.
    weights, counts = (it.weights, it.counts) if it.values.requires_grad else (None, None)
    ctx.save_for_backward(weights, counts, it.grad_x, it.grad_weight, it.grad_bias)
    ctx.weight_node = None if it.weight is None else it.weight.grad_fn
    ctx.used = False


def _backward(ctx: Any, grad_value: Tensor) -> dict[str, Tensor | None]:
    weights, counts, *gradients = saved_tensors(ctx)  # the first backward modified them: autograd raises in a second
    if ctx.used and any(gradient is not None for gradient in gradients):  # but not inside of saved-tensor hooks
        raise RuntimeError("a second backward through a loss of known weights, whose gradient the first has scaled")
    ctx.used = True
    result: dict[str, Tensor | None] = {}
    if weights is not None:
        used = weights != 0 if counts is None else (weights != 0) & (counts > 0)
        result["values"] = torch.where(used, weights * grad_value, 0.0)
    for name, gradient in zip(("x", "weight", "bias"), gradients, strict=True):
        if gradient is None:
            continue
        gradient = gradient.detach()
        if name == "weight" and ctx.weight_grad is not None:
            if traced(gradient) or asked_for(ctx.weight_node):
                add_scaled_(target=ctx.weight_grad, source=gradient, factor=grad_value)
        elif traced(gradient):
            result[name] = gradient * grad_value
        else:
            scale_(gradient=gradient, factor=grad_value, implementation=ctx.implementation)
            result[name] = gradient
    return result


@op(lambda it: it.values.new_empty(()), save=_save, backward=_backward)
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
    backend = backend_for(implementation, values.device)
    return backend.weighted_sum(values.contiguous(), weights.contiguous(), counts)
