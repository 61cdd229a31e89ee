"""Sums of scores or log-probabilities with known weights, of logits and of hidden states alike."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from .conspo import ConSPOOutput, rollout_scores
from .ops.ranks import name_of, sum_over_ranks
from .ops.sequence_score import masked_coefficients, sequence_score_backward, token_coefficients
from .ops.weighted_sum import weighted_sum
from .parallel import Parallel
from .sources import KnownGradients, Source
from .values import Tokens

# Nats per token. The same parameters give the same scores up to rounding. In bf16 a model's logits move by a hundredth
# when its batch changes; the mean over the tokens of a rollout moves by less.
DRIFT_TOLERANCE = 0.01


def weighted_scores(
    source: Source, tokens: Tokens, weights: Tensor, phase_one: Tensor | None, return_metrics: bool
) -> Tensor | ConSPOOutput:
    """sum_i weights[i] * s_i over rollouts [S], with its gradient.  phase_one: [S] scores of the weights."""
    parallel, implementation = source.parallel, source.implementation
    coefficients, counts, labels = _coefficients(tokens, weights, parallel, implementation)
    # Where nobody asks for scores, tokens of weight 0 need no log-probability.
    if source.skips_tokens or (phase_one is None and not return_metrics):
        tokens = tokens._replace(labels=labels)
    logprobs, known = source.forward_backward(tokens, coefficients) or (source.logprobs(tokens)[0], KnownGradients())
    ties = known._asdict()
    if parallel.context is None:  # the sum over rollouts of weights times means
        value = weighted_sum(values=logprobs, weights=coefficients, counts=None, implementation=implementation, **ties)
        if phase_one is None and not return_metrics:
            return value
        scores, _counts = rollout_scores(logprobs.detach(), tokens, parallel, implementation)
    else:
        scores, _counts = rollout_scores(logprobs, tokens, parallel, implementation)
        value = weighted_sum(values=scores, weights=weights, counts=counts, implementation=implementation, **ties)
    scores = scores.detach()
    drifted = {}
    if phase_one is not None:
        used = (weights != 0) & (counts > 0)
        drifted = {"conspo/score_drift": _drift(scores, phase_one, used)}
    if not return_metrics:
        return value
    metrics = {"conspo/response_tokens": counts.sum().to(scores.dtype), **drifted}
    if source.skips_tokens:
        scores = scores.masked_fill(weights == 0, torch.nan)  # not computed
    return ConSPOOutput(value, metrics, scores, logprobs.detach().view(tokens.shape))


def _coefficients(
    tokens: Tokens, weights: Tensor, parallel: Parallel, implementation: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Weights [S] as coefficients [B, T]; counts [S] of whole rollouts; labels [B, T], `IGNORED` where that is 0."""
    where: Any = {"labels": tokens.labels, "offsets": tokens.offsets, "implementation": implementation}
    if parallel.context is None:
        return token_coefficients(weights=weights, **where)
    counts = sum_over_ranks(x=tokens.response_counts(), group=name_of(parallel.context))
    coefficients = sequence_score_backward(weights=weights * parallel.context_factor, counts=counts, **where)
    return coefficients, counts, tokens.only(coefficients != 0).labels


def _drift(scores: Tensor, phase_one: Tensor, used: Tensor) -> Tensor:
    """0-d, the largest change among rollouts with a weight. Warns on a CPU only: on a GPU a warning would wait."""
    changes = torch.where(used, (scores - phase_one).abs(), 0.0)
    drift = changes.max() if changes.numel() else changes.sum()
    if drift.device.type == "cpu" and not torch.compiler.is_compiling() and not drift <= DRIFT_TOLERANCE:
        warnings.warn(
            f"scores drifted by {drift.item():.3g} nats per token since phase 1 (more than {DRIFT_TOLERANCE}): the "
            "gradient is that of other parameters, of dropout left on, or of another temperature or mask",
            RuntimeWarning,
            stacklevel=4,
        )
    return drift


def weighted_logprobs(source: Source, tokens: Tokens, coefficients: Tensor) -> Tensor:
    """sum_t coefficients[t] * logp[t] over response tokens, with its gradient.  coefficients: [B, T]."""
    parallel, implementation = source.parallel, source.implementation
    coefficients, labels = masked_coefficients(
        coefficients=coefficients, labels=tokens.labels, implementation=implementation
    )
    tokens = tokens._replace(labels=labels)
    scaled = coefficients * parallel.context_factor if parallel.context_factor != 1 else coefficients
    logprobs, known = source.forward_backward(tokens, scaled) or (source.logprobs(tokens)[0], KnownGradients())
    ties = known._asdict()
    value = weighted_sum(values=logprobs, weights=scaled, counts=None, implementation=implementation, **ties)
    if parallel.context is not None:
        local = value.detach()
        total = sum_over_ranks(x=local / parallel.context_factor, group=name_of(parallel.context))
        value = value - local + total
    return value
