"""Segmented mean of token log-probabilities, forward and backward: PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from ...values import IGNORED


def _segments(active: Tensor, offsets: Tensor | None) -> Tensor:
    """[S+1] offsets into the flattened tokens; padded rows are segments of one length.

    Those on an accelerator were not checked, and must not be followed out of the tensor.
    """
    if offsets is not None:
        return offsets.long().clamp(0, active.numel()).cummax(0).values
    num_rows, num_positions = active.shape
    return torch.arange(num_rows + 1, device=active.device) * num_positions


def _token_segments(offsets: Tensor, num_tokens: int) -> Tensor:
    """The segment of every token; S for tokens past the last offset."""
    return torch.searchsorted(offsets[1:].contiguous(), torch.arange(num_tokens, device=offsets.device), right=True)


def forward(logprobs: Tensor, labels: Tensor, offsets: Tensor | None) -> tuple[Tensor, Tensor]:
    """logprobs, labels [B, T], offsets [S+1] or None -> scores [S] (NaN where empty), counts [S] int32."""
    active = labels != IGNORED
    segments = _segments(active, offsets)

    def total(values: Tensor) -> Tensor:
        # One after another: in fp32 the mean of 32,768 equal log-probabilities would be off by 3e-4 of itself.
        flat = values.flatten().double()
        return torch.segment_reduce(flat, "sum", offsets=segments, initial=0, unsafe=True)

    counts = total(active)
    scores = (total(torch.where(active, logprobs, 0.0)) / counts).to(logprobs.dtype)
    return torch.where(counts > 0, scores, torch.nan), counts.to(torch.int32)


def backward(
    weights: Tensor, counts: Tensor, labels: Tensor, offsets: Tensor | None, factor: Tensor | None = None
) -> Tensor:
    """The gradient of the scores, weights [S] times factor, at their tokens: [B, T], zero where ignored."""
    active = labels != IGNORED
    grad_scores = weights if factor is None else scaled(weights, factor)
    per_token = torch.where(counts > 0, grad_scores / counts, 0.0)
    per_token = torch.cat([per_token, per_token.new_zeros(1)])
    index = _token_segments(_segments(active, offsets), labels.numel()).view(labels.shape)
    return torch.where(active, per_token[index], 0.0)


def scaled(weights: Tensor, factor: Tensor) -> Tensor:
    """A weight of zero takes no part: an infinite or NaN factor must not reach it as NaN."""
    return torch.where(weights == 0, 0.0, weights * factor)


def counts_of(labels: Tensor, offsets: Tensor | None) -> Tensor:
    """[S] int32 tokens with a label."""
    active = labels != IGNORED
    if offsets is None:
        return active.sum(1, dtype=torch.int32)
    total = torch.nn.functional.pad(active.flatten().cumsum(0), (1, 0))
    before = total[offsets.long().clamp(0, labels.numel())]  # on an accelerator offsets are not checked
    return (before[1:] - before[:-1]).clamp(min=0).int()


def coefficients(weights: Tensor, labels: Tensor, offsets: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """weights [S] over counts at their tokens [B, T]; counts [S] int32; labels, `IGNORED` where that is 0."""
    counts = counts_of(labels, offsets)
    spread = backward(weights, counts, labels, offsets)
    return spread, counts, torch.where(spread != 0, labels, IGNORED)


def masked(coefficients: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Coefficients [B, T], zero where ignored; the labels, `IGNORED` where the coefficient is zero."""
    spread = torch.where(labels == IGNORED, 0.0, coefficients)
    return spread, torch.where(spread != 0, labels, IGNORED)


def weighted_sum(values: Tensor, weights: Tensor, counts: Tensor | None) -> Tensor:
    """The sum (0-d) of weights times values, without those whose weight (or count) is zero."""
    unused = weights == 0
    if counts is not None:
        unused |= counts <= 0
    return torch.where(unused, 0.0, weights * values).sum()
