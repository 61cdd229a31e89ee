"""Sums of scores or log-probabilities with known weights: what `weighted_score_loss` and its relatives share."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from .contrast import ConSPOOutput
from .inputs import check
from .inputs.parallel import Parallel
from .inputs.tokens import TokenLayout
from .ops.devices import beside
from .ops.ranks import name_of, sum_over_ranks
from .ops.sequence_score import masked_coefficients, sequence_score_backward, token_coefficients
from .ops.weighted_sum import weighted_sum
from .scores import response_counts, rollout_scores
from .sources import KnownGradient, Source

# Nats per token. The same parameters give the same scores up to rounding. In bf16 a model's logits move by a hundredth
# when its batch changes; the mean over the tokens of a rollout moves by less.
DRIFT_TOLERANCE = 0.01


def weighted_scores(
    source: Source, tokens: TokenLayout, weights: Tensor, phase_one: Tensor | None, return_metrics: bool
) -> Tensor | ConSPOOutput:
    """sum_i weights[i] * s_i over rollouts [S], with its gradient.  phase_one: [S] scores of the weights."""
    check.flags(return_metrics=return_metrics)
    parallel, implementation = source.settings.parallel, source.settings.implementation
    check.weights(weights, tokens.num_rollouts, tokens.labels.device, phase_one)
    weights = weights.resolve_neg()
    on_cpu = weights if weights.device.type == "cpu" else None
    weights = beside(weights, tokens.labels, source.dtype)
    coefficients, counts, wanted = _coefficients(tokens, weights, parallel, implementation)
    keep = None
    if source.skips_tokens:
        tokens = tokens._replace(labels=wanted)
        keep = None if on_cpu is None else tokens.per_token(on_cpu != 0)
    known = source.known_gradient(tokens, coefficients, keep)
    logprobs = source.logprobs(tokens, keep)[0] if known is None else known.logprobs
    known = known or KnownGradient(logprobs)
    tied = (*known.inputs, *known.gradients, known.weight_grad, implementation)
    if parallel.context is None:  # the sum over rollouts of weights times means
        value = weighted_sum(logprobs, coefficients, None, *tied)
        if phase_one is None and not return_metrics:
            return value
        scores, _counts = rollout_scores(logprobs.detach(), tokens, parallel, implementation)
    else:
        scores, _counts = rollout_scores(logprobs, tokens, parallel, implementation)
        value = weighted_sum(scores, weights, counts, *tied)
    scores = scores.detach()
    drifted = {}
    if phase_one is not None:
        used = (weights != 0) & (counts > 0)
        drifted = {"conspo/score_drift": _drift(scores, beside(phase_one, scores, scores.dtype), used)}
    if not return_metrics:
        return value
    metrics = {"conspo/response_tokens": counts.sum().to(scores.dtype), **drifted}
    if source.skips_tokens:
        scores = scores.masked_fill(weights == 0, torch.nan)  # not computed
    return ConSPOOutput(value, metrics, scores, logprobs.detach().view(tokens.shape))


def _coefficients(
    tokens: TokenLayout, weights: Tensor, parallel: Parallel, implementation: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Weights [S] as coefficients [B, T]; counts [S] of whole rollouts; labels [B, T], `IGNORED` where that is 0."""
    if parallel.context is None:
        return token_coefficients(weights, tokens.labels, tokens.offsets, implementation)
    counts, scaled = response_counts(tokens, parallel), weights * parallel.context_factor
    coefficients = sequence_score_backward(scaled, counts, tokens.labels, tokens.offsets, implementation)
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


def weighted_logprobs(source: Source, tokens: TokenLayout, coefficients: Tensor) -> Tensor:
    """sum_t coefficients[t] * logp[t] over response tokens, with its gradient.  coefficients: shaped like labels."""
    check.coefficients(coefficients, tuple(tokens.shape), tokens.labels)
    coefficients = coefficients.resolve_neg()
    parallel, keep = source.settings.parallel, None
    if coefficients.device.type == "cpu":
        keep = (coefficients != 0).view(tokens.labels.shape)
    coefficients = beside(coefficients, tokens.labels, source.dtype).view(tokens.labels.shape)
    coefficients, wanted = masked_coefficients(coefficients, tokens.labels, source.settings.implementation)
    if source.skips_tokens:
        tokens = tokens._replace(labels=wanted)
    scaled = coefficients * parallel.context_factor if parallel.context_factor != 1 else coefficients
    known = source.known_gradient(tokens, scaled, keep)
    logprobs = source.logprobs(tokens, keep)[0] if known is None else known.logprobs
    known = known or KnownGradient(logprobs)
    value = weighted_sum(
        logprobs, scaled, None, *known.inputs, *known.gradients, known.weight_grad, source.settings.implementation
    )
    if parallel.context is not None:
        local = value.detach()
        value = value - local + sum_over_ranks(local / parallel.context_factor, name_of(parallel.context))
    return value
