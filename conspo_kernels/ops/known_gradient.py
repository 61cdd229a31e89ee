"""Gradients computed in the forward pass, where the coefficients of the log-probabilities are known beforehand.

The ops return the log-probabilities and the gradients as plain tensors; `attach_gradient` then ties a gradient to a
value, and backward multiplies it, in place, by the scalar that comes in. A second backward is told by autograd.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..backends.registry import kernels_for
from ..linear import modes
from ..linear.modes import Needs
from ..registration import device_guard, op
from ..values import LogitRows, LogitTransform
from .derivative import without_derivative
from .linear_logprob import fake_gradients, or_empty, run_of


def _run(grad_logits: Tensor, rows: LogitRows, coefficients: Tensor, implementation: str) -> Tensor:
    with device_guard(rows.logits):
        kernels = kernels_for("token_logprob", implementation, rows.logits.device)
        return kernels.forward_backward(grad_logits, rows, coefficients.contiguous())


def _fake_known(logits: Tensor, labels: Tensor, coefficients: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return torch.empty_like(coefficients), torch.empty_like(logits, memory_format=torch.contiguous_format)


@op(_fake_known)
def token_logprob_known(
    logits: Tensor, labels: Tensor, coefficients: Tensor, transform: list[float], implementation: str
) -> tuple[Tensor, Tensor]:
    """logprobs [B, T] of logits [B, T, V], and the gradient of sum(coefficients * logprobs), new and contiguous."""
    grad_logits = torch.empty_like(logits, memory_format=torch.contiguous_format)
    rows = LogitRows(logits, labels.contiguous(), LogitTransform.from_numbers(transform))
    return _run(grad_logits, rows, coefficients, implementation), grad_logits


def _fake_known_(logits: Tensor, labels: Tensor, coefficients: Tensor, *_: object) -> Tensor:
    return torch.empty_like(coefficients)


@op(_fake_known_, mutates=("logits",))
def token_logprob_known_(
    logits: Tensor, labels: Tensor, coefficients: Tensor, transform: list[float], implementation: str
) -> Tensor:
    """The same, the gradient written over the logits."""
    rows = LogitRows(logits, labels.contiguous(), LogitTransform.from_numbers(transform))
    return _run(logits, rows, coefficients, implementation)


def _fake_linear_known(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    hidden, weight, bias, _labels, _keep, coefficients, needs, *_ = args
    return torch.empty_like(coefficients), *fake_gradients(hidden, weight, bias, coefficients, needs)


@op(_fake_linear_known)
def linear_logprob_known(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    keep: Tensor | None,
    coefficients: Tensor,
    needs: list[bool],
    logits_dtype: torch.dtype,
    transform: list[float],
    workspace: int,
    implementation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """logprobs [N], and the gradients of sum(coefficients * logprobs) that are needed, else empty: 3 GEMMs at most."""
    run = run_of(hidden, weight, bias, labels, keep, logits_dtype, transform, workspace, implementation)
    with device_guard(hidden):
        logprobs, grads = modes.forward_known(run, coefficients.contiguous(), Needs(*needs))
    hidden_grad, weight_grad, bias_grad = (or_empty(grad, logprobs) for grad in grads)
    return logprobs, hidden_grad, weight_grad, bias_grad


def _fake_scale(*_: object) -> None:
    return None


@op(_fake_scale, mutates=("gradient",))
def scale_(gradient: Tensor, factor: Tensor) -> None:
    """gradient *= factor (0-d), at no cost where the factor is 1; it counts as a modification even then."""
    with device_guard(gradient):
        kernels_for("scale", "auto", gradient.device).scale_(gradient, factor)


def _fake_attach(value: Tensor, *_: object) -> Tensor:
    return torch.empty_like(value)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    del output
    ctx.save_for_backward(inputs[2])
    ctx.used = False


def _backward(ctx: Any, grad_value: Tensor) -> tuple[Any, ...]:
    (gradient,) = ctx.saved_tensors  # the first backward modified it: autograd tells a second, but inside of hooks
    if ctx.used:
        raise RuntimeError("a second backward through a loss of known weights, whose gradient the first has scaled")
    ctx.used = True
    gradient = gradient.detach()
    scale_(gradient, grad_value)
    return grad_value, without_derivative(gradient), None


@op(_fake_attach, setup_context=_setup_context, backward=_backward)
def attach_gradient(value: Tensor, x: Tensor, gradient: Tensor) -> Tensor:
    """The value (0-d), whose gradient with respect to x is `gradient`, besides those that it has already."""
    return value.clone()
