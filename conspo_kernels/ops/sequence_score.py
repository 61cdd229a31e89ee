"""conspo::sequence_score: the mean log-probability of each rollout's response tokens, and the ops of its gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..backends.registry import backend_for
from .registration import op, saved_tensors


def _fake(it: Any) -> tuple[Tensor, Tensor]:
    num_rollouts = it.labels.shape[0] if it.offsets is None else it.offsets.shape[0] - 1
    return it.logprobs.new_empty(num_rollouts), it.logprobs.new_empty(num_rollouts, dtype=torch.int32)


def _save(ctx: Any, it: Any, output: tuple[Tensor, Tensor]) -> None:
    _scores, counts = output
    ctx.implementation = it.implementation
    ctx.save_for_backward(it.labels, it.offsets, counts)
    ctx.mark_non_differentiable(counts)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_scores: Tensor | None, _grad_counts: object) -> dict[str, Tensor | None]:
    if grad_scores is None:
        return {}
    labels, offsets, counts = saved_tensors(ctx)
    gradient = sequence_score_backward(
        weights=grad_scores, counts=counts, labels=labels, offsets=offsets, implementation=ctx.implementation
    )
    return {"logprobs": gradient}


@op(_fake, save=_save, backward=_backward)
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
    backend = backend_for(implementation, logprobs.device)
    return backend.sequence_score_forward(logprobs.contiguous(), labels.contiguous(), offsets)


@op(lambda it: it.weights.new_empty(it.labels.shape))
def sequence_score_backward(
    weights: Tensor,
    counts: Tensor,
    labels: Tensor,
    offsets: Tensor | None,
    implementation: str,
    factor: Tensor | None = None,
) -> Tensor:
    """The gradient with respect to the log-probabilities, [B, T].  factor: 0-d, of all weights but those of zero."""
    backend = backend_for(implementation, weights.device)
    return backend.sequence_score_backward(weights.contiguous(), counts, labels.contiguous(), offsets, factor)


def _fake_coefficients(it: Any) -> tuple[Tensor, Tensor, Tensor]:
    counts = it.weights.new_empty(it.weights.shape, dtype=torch.int32)
    return it.weights.new_empty(it.labels.shape), counts, it.labels.new_empty(it.labels.shape)


@op(_fake_coefficients)
def token_coefficients(
    weights: Tensor, labels: Tensor, offsets: Tensor | None, implementation: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Weights of scores [S] as coefficients of log-probabilities [B, T].

    Returns:
        coefficients: [B, T], dtype of the weights.
        counts: [S] int32, response tokens.
        labels: [B, T] int64, those whose coefficient is not zero, else `IGNORED`.
    """
    backend = backend_for(implementation, weights.device)
    return backend.token_coefficients(weights.contiguous(), labels.contiguous(), offsets)


@op(lambda it: (it.coefficients.new_empty(it.labels.shape), it.labels.new_empty(it.labels.shape)))
def masked_coefficients(coefficients: Tensor, labels: Tensor, implementation: str) -> tuple[Tensor, Tensor]:
    """Coefficients [B, T], zero where ignored whatever they are there; and the labels of those that are not zero."""
    backend = backend_for(implementation, coefficients.device)
    return backend.masked_coefficients(coefficients.contiguous(), labels.contiguous())
