"""Gradients computed in the forward pass, where the coefficients of the log-probabilities are known beforehand.

The ops return the log-probabilities and the gradients as plain tensors; `weighted_sum` then ties the gradients to the
value of the loss.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..backends.registry import backend_for
from ..linear import modes
from ..linear.modes import Needs
from ..values import LogitRows, LogitTransform
from . import flops
from .linear_logprob import fake_gradients, or_empty, run_of
from .registration import op


def _fake_forward_backward(it: Any) -> tuple[Tensor, Tensor]:
    gradient = it.coefficients.new_empty(0)
    if it.grad_logits is None:
        gradient = torch.empty_like(it.logits, memory_format=torch.contiguous_format)
    return torch.empty_like(it.coefficients), gradient


@op(_fake_forward_backward, mutates=("grad_logits",))
def token_logprob_forward_backward(
    logits: Tensor,
    labels: Tensor,
    coefficients: Tensor,
    grad_logits: Tensor | None,
    transform: list[float],
    implementation: str,
) -> tuple[Tensor, Tensor]:
    """logprobs [B, T] of logits [B, T, V], and the gradient of sum(coefficients * logprobs), new and contiguous.

    grad_logits: the gradient is written there instead, perhaps over the logits; then the second result is empty.
    """
    gradient = grad_logits
    if gradient is None:
        gradient = torch.empty_like(logits, memory_format=torch.contiguous_format)
    rows = LogitRows(logits, labels.contiguous(), LogitTransform(*transform))
    backend = backend_for(implementation, logits.device)
    logprobs = backend.token_logprob_forward_backward(gradient, rows, coefficients.contiguous())
    return logprobs, gradient if grad_logits is None else logprobs.new_empty(0)


def _fake_linear_forward_backward(it: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    hidden_grad, weight_grad, bias_grad = fake_gradients(it.hidden, it.weight, it.bias, it.coefficients, it.needs)
    if it.wide_weight_grad and it.needs[1]:
        weight_grad = it.coefficients.new_empty(it.weight.shape)
    return torch.empty_like(it.coefficients), hidden_grad, weight_grad, bias_grad


@op(_fake_linear_forward_backward, flops=flops.forward_backward)
def linear_logprob_forward_backward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    indices: Tensor | None,
    coefficients: Tensor,
    needs: list[bool],
    wide_weight_grad: bool,
    logits_dtype: torch.dtype,
    transform: list[float],
    workspace: int,
    implementation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """logprobs [N], and the gradients of sum(coefficients * logprobs) that are needed, else empty: 3 GEMMs at most.

    wide_weight_grad: that of weight is not rounded from the dtype that it is summed in, fp32 or fp64.
    """
    run = run_of(hidden, weight, bias, labels, indices, logits_dtype, transform, workspace, implementation)
    logprobs, grads = modes.forward_backward(run, coefficients.contiguous(), Needs(*needs), wide_weight_grad)
    hidden_grad, weight_grad, bias_grad = (or_empty(grad, logprobs) for grad in grads)
    return logprobs, hidden_grad, weight_grad, bias_grad
