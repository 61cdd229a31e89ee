"""conspo::sequence_score, the mean log-probability per rollout; conspo::sequence_offsets, the checked cu_seqlens."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from .implementation import twin


@torch.library.custom_op("conspo::sequence_offsets", mutates_args=())
def sequence_offsets(cu_seqlens: Tensor, num_tokens: int, device: torch.device) -> Tensor:
    """cu_seqlens [S+1] as int64 on `device`; values are checked where they are on the CPU."""
    if cu_seqlens.device.type == "cpu":
        values = cu_seqlens.tolist()
        if values[0] != 0:
            raise ValueError(f"cu_seqlens must begin with 0, got {values[0]}")
        for s, (start, stop) in enumerate(itertools.pairwise(values)):
            if stop < start:
                raise ValueError(f"cu_seqlens must not fall, got {start} then {stop} at index {s + 1}")
        if values[-1] > num_tokens:
            raise ValueError(f"cu_seqlens must end within the {num_tokens} packed tokens, got {values[-1]}")
    return cu_seqlens.to(device, torch.int64, non_blocking=True, copy=True)


@sequence_offsets.register_fake
def _(cu_seqlens: Tensor, num_tokens: int, device: torch.device) -> Tensor:
    return cu_seqlens.new_empty(cu_seqlens.shape, dtype=torch.int64, device=device)


@torch.library.custom_op("conspo::sequence_score", mutates_args=())
def sequence_score(
    logprobs: Tensor, labels: Tensor, offsets: Tensor | None, ignore_index: int, implementation: str
) -> tuple[Tensor, Tensor]:
    """Mean log-probability of each rollout's response tokens.

    Args:
        logprobs: [B, T] floating point.
        labels: [B, T]; a token whose label is `ignore_index` is not a response token.
        offsets: [S+1] int64 into the flattened tokens, or None: the rows are the rollouts.

    Returns:
        scores: [S], dtype of `logprobs`, NaN where there is no response token.
        counts: [S] int32, response tokens.
    """
    with torch.cuda.device_of(logprobs):
        kernels = twin("sequence_score", implementation, logprobs.device)
        return kernels.forward(logprobs.contiguous(), labels.contiguous(), offsets, ignore_index)


@sequence_score.register_fake
def _(
    logprobs: Tensor, labels: Tensor, offsets: Tensor | None, ignore_index: int, implementation: str
) -> tuple[Tensor, Tensor]:
    num_rollouts = labels.shape[0] if offsets is None else offsets.shape[0] - 1
    return logprobs.new_empty(num_rollouts), logprobs.new_empty(num_rollouts, dtype=torch.int32)


@torch.library.custom_op("conspo::sequence_score_backward", mutates_args=())
def sequence_score_backward(
    grad_scores: Tensor, counts: Tensor, labels: Tensor, offsets: Tensor | None, ignore_index: int, implementation: str
) -> Tensor:
    """The gradient with respect to the log-probabilities, [B, T]."""
    with torch.cuda.device_of(grad_scores):
        kernels = twin("sequence_score", implementation, grad_scores.device)
        return kernels.backward(grad_scores.contiguous(), counts, labels.contiguous(), offsets, ignore_index)


@sequence_score_backward.register_fake
def _(
    grad_scores: Tensor, counts: Tensor, labels: Tensor, offsets: Tensor | None, ignore_index: int, implementation: str
) -> Tensor:
    return grad_scores.new_empty(labels.shape)


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    _logprobs, labels, offsets, ctx.ignore_index, ctx.implementation = inputs
    _scores, counts = output
    ctx.save_for_backward(labels, offsets, counts)
    ctx.mark_non_differentiable(counts)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_scores, _grad_counts):  # type: ignore[no-untyped-def]
    if grad_scores is None:
        return None, None, None, None, None
    labels, offsets, counts = ctx.saved_tensors
    grad = sequence_score_backward(grad_scores, counts, labels, offsets, ctx.ignore_index, ctx.implementation)
    return grad, None, None, None, None


sequence_score.register_autograd(_backward, setup_context=_setup_context)
