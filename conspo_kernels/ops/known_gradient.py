"""Gradients computed in the forward pass, where the coefficients of the log-probabilities are known beforehand.

The ops return the log-probabilities and the gradients as plain tensors; `attach_gradient` then ties a gradient to a
value, and backward multiplies it, in place, by the scalar that comes in. A second backward is told by autograd.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels import linear_tiles
from ..kernels.known_coefficients import forward_backward
from ..kernels.linear_tiles import Head, Needs, Tokens
from ..kernels.transform import LogitTransform
from .derivative import without_derivative
from .implementation import twin
from .linear_logprob import fake_gradients, or_empty
from .token_logprob import check_labels


def _run(
    grad_logits: Tensor,
    logits: Tensor,
    labels: Tensor,
    coefficients: Tensor,
    ignore_index: int,
    temperature: float,
    logit_scale: float,
    softcap: float | None,
    implementation: str,
) -> Tensor:
    check_labels(labels, ignore_index, logits.shape[-1])
    with torch.cuda.device_of(logits):
        return forward_backward(
            twin("token_logprob", implementation, logits.device), grad_logits, logits, labels.contiguous(),
            coefficients.contiguous(), ignore_index, LogitTransform(temperature, logit_scale, softcap),
        )  # fmt: skip


@torch.library.custom_op("conspo::token_logprob_known", mutates_args=())
def token_logprob_known(
    logits: Tensor,
    labels: Tensor,
    coefficients: Tensor,
    ignore_index: int,
    temperature: float,
    logit_scale: float,
    softcap: float | None,
    implementation: str,
) -> tuple[Tensor, Tensor]:
    """logprobs [B, T] of logits [B, T, V], and the gradient of sum(coefficients * logprobs), new and contiguous."""
    grad_logits = torch.empty_like(logits, memory_format=torch.contiguous_format)
    logprobs = _run(
        grad_logits, logits, labels, coefficients, ignore_index, temperature, logit_scale, softcap, implementation
    )
    return logprobs, grad_logits


@token_logprob_known.register_fake
def _(
    logits: Tensor,
    labels: Tensor,
    coefficients: Tensor,
    ignore_index: int,
    temperature: float,
    logit_scale: float,
    softcap: float | None,
    implementation: str,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(coefficients), torch.empty_like(logits, memory_format=torch.contiguous_format)


@torch.library.custom_op("conspo::token_logprob_known_", mutates_args={"logits"})
def token_logprob_known_(
    logits: Tensor,
    labels: Tensor,
    coefficients: Tensor,
    ignore_index: int,
    temperature: float,
    logit_scale: float,
    softcap: float | None,
    implementation: str,
) -> Tensor:
    """The same, the gradient written over the logits."""
    return _run(logits, logits, labels, coefficients, ignore_index, temperature, logit_scale, softcap, implementation)


@token_logprob_known_.register_fake
def _(
    logits: Tensor,
    labels: Tensor,
    coefficients: Tensor,
    ignore_index: int,
    temperature: float,
    logit_scale: float,
    softcap: float | None,
    implementation: str,
) -> Tensor:
    return torch.empty_like(coefficients)


@torch.library.custom_op("conspo::linear_logprob_known", mutates_args=())
def linear_logprob_known(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    keep: Tensor | None,
    coefficients: Tensor,
    needs: list[bool],
    ignore_index: int,
    temperature: float,
    logit_scale: float,
    softcap: float | None,
    workspace: int,
    implementation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """logprobs [N], and the gradients of sum(coefficients * logprobs) that are needed, else empty: 3 GEMMs at most."""
    check_labels(labels, ignore_index, weight.shape[0])
    with torch.cuda.device_of(hidden):
        logprobs, grads = linear_tiles.forward_backward(
            twin("token_logprob", implementation, hidden.device), Tokens.of(hidden, labels, ignore_index, keep),
            Head(weight, bias), LogitTransform(temperature, logit_scale, softcap), coefficients.contiguous(),
            Needs(*needs), workspace,
        )  # fmt: skip
    hidden_grad, weight_grad, bias_grad = (or_empty(grad, logprobs) for grad in grads)
    return logprobs, hidden_grad, weight_grad, bias_grad


@linear_logprob_known.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    keep: Tensor | None,
    coefficients: Tensor,
    needs: list[bool],
    ignore_index: int,
    temperature: float,
    logit_scale: float,
    softcap: float | None,
    workspace: int,
    implementation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return torch.empty_like(coefficients), *fake_gradients(hidden, weight, bias, coefficients, needs)


@torch.library.custom_op("conspo::scale_", mutates_args={"gradient"})
def scale_(gradient: Tensor, factor: Tensor) -> None:
    """gradient *= factor (0-d), at no cost where the factor is 1; it counts as a modification even then."""
    if gradient.device.type == "cpu":
        if factor.item() != 1:
            gradient.mul_(factor)
    elif gradient.is_contiguous() and twin("token_logprob", "auto", gradient.device).__name__.endswith("_triton"):
        from ..kernels import scale_triton

        with torch.cuda.device_of(gradient):
            scale_triton.scale_(gradient, factor)
    else:
        gradient.mul_(factor)


@torch.library.custom_op("conspo::attach_gradient", mutates_args=())
def attach_gradient(value: Tensor, x: Tensor, gradient: Tensor) -> Tensor:
    """The value (0-d), whose gradient with respect to x is `gradient`, besides those that it has already."""
    return value.clone()


@attach_gradient.register_fake
def _(value: Tensor, x: Tensor, gradient: Tensor) -> Tensor:
    return torch.empty_like(value)


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(inputs[2])
    ctx.used = False


def _backward(ctx, grad_value):  # type: ignore[no-untyped-def]
    (gradient,) = (
        ctx.saved_tensors
    )  # which the first backward modified: a second is told by autograd, but inside of hooks
    if ctx.used:
        raise RuntimeError("a second backward through a loss of known weights, whose gradient the first has scaled")
    ctx.used = True
    gradient = gradient.detach()
    scale_(gradient, grad_value)
    return grad_value, without_derivative(gradient), None


attach_gradient.register_autograd(_backward, setup_context=_setup_context)
