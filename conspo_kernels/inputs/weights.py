"""Known weights of rollouts and coefficients of tokens as the user passed them: checked, and on the device."""

from __future__ import annotations

from torch import Tensor

from ..ops.devices import moved
from ..sources import Source
from ..values import Tokens
from . import check


def weights_of(
    source: Source, tokens: Tokens, weights: Tensor, scores: Tensor | None
) -> tuple[Tensor, Tensor | None, Tokens]:
    """weights [S], the scores [S] that they belong to or None, and the tokens with a weight where that is known."""
    check.weights(weights, tokens.num_rollouts, source.device, scores)
    weights = weights.resolve_neg()
    if source.skips_tokens and weights.device.type == "cpu" and source.device.type != "cpu":
        tokens = tokens._replace(mask=tokens.per_token(weights != 0))
    weights = moved(weights, source.device, source.dtype)
    return weights, None if scores is None else moved(scores.detach(), source.device, source.dtype), tokens


def coefficients_of(source: Source, tokens: Tokens, coefficients: Tensor) -> tuple[Tensor, Tokens]:
    """coefficients [B, T], and the tokens with one where that is known."""
    check.coefficients(coefficients, tuple(tokens.shape), source.device)
    coefficients = coefficients.resolve_neg().view(tokens.labels.shape)
    if coefficients.device.type == "cpu" and source.device.type != "cpu":
        tokens = tokens._replace(mask=coefficients != 0)
    return moved(coefficients, source.device, source.dtype), tokens
