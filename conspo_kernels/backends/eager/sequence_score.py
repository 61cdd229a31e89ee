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
        return offsets.clamp(0, active.numel()).cummax(0).values
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


def backward(grad_scores: Tensor, counts: Tensor, labels: Tensor, offsets: Tensor | None) -> Tensor:
    """The gradient of the scores, [S], spread over their tokens: [B, T], zero where ignored."""
    active = labels != IGNORED
    per_token = torch.where(counts > 0, grad_scores / counts, 0.0)
    per_token = torch.cat([per_token, per_token.new_zeros(1)])
    index = _token_segments(_segments(active, offsets), labels.numel()).view(labels.shape)
    return torch.where(active, per_token[index], 0.0)
