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
from .registration import device_guard, op


def _run(grad_logits: Tensor, rows: LogitRows, coefficients: Tensor, implementation: str) -> Tensor:
    with device_guard(rows.logits):
        kernels = backend_for(implementation, rows.logits.device).token_logprob
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
    """`token_logprob_known`, with the gradient written over the logits."""
    rows = LogitRows(logits, labels.contiguous(), LogitTransform.from_numbers(transform))
    return _run(logits, rows, coefficients, implementation)


def _fake_linear_known(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    hidden, weight, bias, _labels, _places, coefficients, needs, wide, *_ = args
    hidden_grad, weight_grad, bias_grad = fake_gradients(hidden, weight, bias, coefficients, needs)
    if wide and needs[1]:
        weight_grad = coefficients.new_empty(weight.shape)
    return torch.empty_like(coefficients), hidden_grad, weight_grad, bias_grad


@op(_fake_linear_known, flops=flops.known)
def linear_logprob_known(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    places: Tensor | None,
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
    run = run_of(hidden, weight, bias, labels, places, logits_dtype, transform, workspace, implementation)
    with device_guard(hidden):
        logprobs, grads = modes.forward_known(run, coefficients.contiguous(), Needs(*needs), wide_weight_grad)
    hidden_grad, weight_grad, bias_grad = (or_empty(grad, logprobs) for grad in grads)
    return logprobs, hidden_grad, weight_grad, bias_grad
