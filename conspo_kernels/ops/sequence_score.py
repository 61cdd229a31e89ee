"""conspo::sequence_score: the mean log-probability of each rollout's response tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..backends.registry import backend_for
from .registration import device_guard, op, without_derivative


def _fake(logprobs: Tensor, labels: Tensor, offsets: Tensor | None, *_: object) -> tuple[Tensor, Tensor]:
    num_rollouts = labels.shape[0] if offsets is None else offsets.shape[0] - 1
    return logprobs.new_empty(num_rollouts), logprobs.new_empty(num_rollouts, dtype=torch.int32)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _logprobs, labels, offsets, ctx.implementation = inputs
    _scores, counts = output
    ctx.save_for_backward(labels, offsets, counts)
    ctx.mark_non_differentiable(counts)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_scores: Tensor | None, _grad_counts: object) -> tuple[Any, ...]:
    if grad_scores is None:
        return None, None, None, None
    labels, offsets, counts = ctx.saved_tensors
    gradient = sequence_score_backward(grad_scores, counts, labels, offsets, ctx.implementation)
    return without_derivative(gradient), None, None, None


@op(_fake, setup_context=_setup_context, backward=_backward)
def sequence_score(
    logprobs: Tensor, labels: Tensor, offsets: Tensor | None, implementation: str
) -> tuple[Tensor, Tensor]:
    """Mean log-probability of each rollout's response tokens.

    Args:
        logprobs: [B, T] floating point.
        labels: [B, T] int64; a token whose label is `IGNORED` is not a response token.
        offsets: [S+1] int64 into the flattened tokens, or None: the rows are the rollouts.

    Returns:
        scores: [S], dtype of `logprobs`, NaN where there is no response token.
        counts: [S] int32, response tokens.
    """
    with device_guard(logprobs):
        kernels = backend_for(implementation, logprobs.device).sequence_score
        return kernels.forward(logprobs.contiguous(), labels.contiguous(), offsets)


def _fake_backward(weights: Tensor, counts: Tensor, labels: Tensor, *_: object) -> Tensor:
    return weights.new_empty(labels.shape)


@op(_fake_backward)
def sequence_score_backward(
    weights: Tensor,
    counts: Tensor,
    labels: Tensor,
    offsets: Tensor | None,
    implementation: str,
    factor: Tensor | None = None,
) -> Tensor:
    """The gradient with respect to the log-probabilities, [B, T].  factor: 0-d, of all weights but those of zero."""
    with device_guard(weights):
        kernels = backend_for(implementation, weights.device).sequence_score
        return kernels.backward(weights.contiguous(), counts, labels.contiguous(), offsets, factor)


def _fake_coefficients(weights: Tensor, labels: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    spread = weights.new_empty(labels.shape)
    return spread, weights.new_empty(weights.shape, dtype=torch.int32), labels.new_empty(labels.shape)


@op(_fake_coefficients)
def token_coefficients(
    weights: Tensor, labels: Tensor, offsets: Tensor | None, implementation: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Weights of scores [S] as coefficients of log-probabilities [B, T].

    Returns:
        coefficients: [B, T], dtype of the weights.
        counts: [S] int32, response tokens.
        wanted: [B, T] int64, the labels whose coefficient is not zero, else `IGNORED`.
    """
    with device_guard(weights):
        kernels = backend_for(implementation, weights.device).sequence_score
        return kernels.coefficients(weights.contiguous(), labels.contiguous(), offsets)


def _fake_masked(coefficients: Tensor, labels: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return coefficients.new_empty(labels.shape), labels.new_empty(labels.shape)


@op(_fake_masked)
def masked_coefficients(coefficients: Tensor, labels: Tensor, implementation: str) -> tuple[Tensor, Tensor]:
    """Coefficients [B, T], zero where ignored whatever they are there; and the labels of those that are not zero."""
    with device_guard(coefficients):
        kernels = backend_for(implementation, coefficients.device).sequence_score
        return kernels.masked(coefficients.contiguous(), labels.contiguous())
