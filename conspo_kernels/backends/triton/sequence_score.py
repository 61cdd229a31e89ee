"""Segmented mean of token log-probabilities, forward and backward, in Triton.

One program per rollout, which walks its own tokens: the order of the sum depends on the rollout's length alone.
Rollouts are the rows of padded [B, T] tensors, or the segments between `offsets` of packed ones.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...values import IGNORED as IGNORED_LABEL

BLOCK = 4096
NUM_WARPS = 8
IGNORED = tl.constexpr(IGNORED_LABEL)
UNSPECIALIZED = ("num_tokens", "num_positions")
UNALIGNED = ("logprobs_ptr", "labels_ptr", "grad_scores_ptr")  # a user's slice begins anywhere


@triton.jit
def _segment(s, offsets_ptr, num_positions, num_tokens, PACKED: tl.constexpr):
    """Tokens [start, stop) of segment s.

    Offsets are clamped: those on an accelerator cannot be checked without a synchronisation, and must not be followed
    out of the tensor.
    """
    if PACKED:
        start = tl.load(offsets_ptr + s)
        stop = tl.load(offsets_ptr + s + 1)
        start = tl.minimum(tl.maximum(start, 0), num_tokens)
        stop = tl.minimum(tl.maximum(stop, start), num_tokens)
    else:
        start = s * num_positions
        stop = start + num_positions
    return start, stop


# Reads a log-probability and a label per token; writes two numbers per rollout.
@triton.jit(do_not_specialize=UNSPECIALIZED, do_not_specialize_on_alignment=UNALIGNED)
def _forward_kernel(
    logprobs_ptr, labels_ptr, offsets_ptr, scores_ptr, counts_ptr,
    num_positions: tl.int64, num_tokens: tl.int64,
    PACKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    s = tl.program_id(0).to(tl.int64)
    start, stop = _segment(s, offsets_ptr, num_positions, num_tokens, PACKED)
    total = tl.zeros((BLOCK,), logprobs_ptr.dtype.element_ty)
    count = tl.zeros((BLOCK,), tl.int32)
    while start < stop:
        tokens = start + tl.arange(0, BLOCK)
        mask = tokens < stop
        active = mask & (tl.load(labels_ptr + tokens, mask=mask, other=0) != IGNORED)
        total += tl.load(logprobs_ptr + tokens, mask=active, other=0.0)
        count += active.to(tl.int32)
        start += BLOCK
    n = tl.sum(count)
    tl.store(scores_ptr + s, tl.where(n > 0, tl.sum(total) / n.to(total.dtype), float("nan")))
    tl.store(counts_ptr + s, n)


# Reads a label per token and two numbers per rollout; writes a gradient per token.
@triton.jit(do_not_specialize=UNSPECIALIZED, do_not_specialize_on_alignment=UNALIGNED)
def _backward_kernel(
    grad_scores_ptr, counts_ptr, labels_ptr, offsets_ptr, grad_logprobs_ptr,
    num_positions: tl.int64, num_tokens: tl.int64,
    PACKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    s = tl.program_id(0).to(tl.int64)
    start, stop = _segment(s, offsets_ptr, num_positions, num_tokens, PACKED)
    n = tl.load(counts_ptr + s)
    grad = tl.load(grad_scores_ptr + s, mask=n > 0, other=0.0) / tl.maximum(n, 1)
    while start < stop:
        tokens = start + tl.arange(0, BLOCK)
        mask = tokens < stop
        active = mask & (n > 0) & (tl.load(labels_ptr + tokens, mask=mask, other=0) != IGNORED)
        tl.store(grad_logprobs_ptr + tokens, tl.where(active, grad, tl.zeros_like(grad)), mask=mask)
        start += BLOCK


def forward(logprobs: Tensor, labels: Tensor, offsets: Tensor | None) -> tuple[Tensor, Tensor]:
    """logprobs, labels [B, T], offsets [S+1] or None -> scores [S] (NaN where empty), counts [S] int32."""
    num_segments = labels.shape[0] if offsets is None else offsets.numel() - 1
    scores = logprobs.new_empty(num_segments)
    counts = torch.empty(num_segments, dtype=torch.int32, device=logprobs.device)
    if num_segments > 0:
        _forward_kernel[(num_segments,)](
            logprobs, labels, offsets, scores, counts, labels.shape[1], labels.numel(),
            PACKED=offsets is not None, BLOCK=BLOCK, num_warps=NUM_WARPS, enable_fp_fusion=True,
        )  # fmt: skip
    return scores, counts


def backward(grad_scores: Tensor, counts: Tensor, labels: Tensor, offsets: Tensor | None) -> Tensor:
    """The gradient of the scores, [S], spread over their tokens: [B, T], zero where ignored."""
    # Of packed tokens, those outside all segments have no program.
    allocate = torch.empty if offsets is None else torch.zeros
    grad_logprobs = allocate(labels.shape, dtype=grad_scores.dtype, device=labels.device)
    num_segments = counts.numel()
    if num_segments > 0:
        _backward_kernel[(num_segments,)](
            grad_scores, counts, labels, offsets, grad_logprobs, labels.shape[1], labels.numel(),
            PACKED=offsets is not None, BLOCK=BLOCK, num_warps=NUM_WARPS, enable_fp_fusion=True,
        )  # fmt: skip
    return grad_logprobs
