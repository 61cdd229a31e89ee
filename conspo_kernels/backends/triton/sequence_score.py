"""Segmented mean of token log-probabilities, forward and backward, and sums with known weights, in Triton.

One program per rollout, which walks its own tokens: the order of the sum depends on the rollout's length alone.
Rollouts are the rows of padded [B, T] tensors, or the segments between `offsets` of packed ones.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...values import IGNORED as IGNORED_LABEL
from .direct import kernel
from .launch import FUSED, ceil_div

BLOCK = tl.constexpr(4096)
LAUNCH: dict[str, Any] = {"num_warps": 8, **FUSED}
IGNORED = tl.constexpr(IGNORED_LABEL)
UNSPECIALIZED = ("num_tokens", "num_positions", "num_segments")
# A user's slice begins anywhere.
UNALIGNED = ("logprobs_ptr", "labels_ptr", "offsets_ptr", "weights_ptr", "factor_ptr", "values_ptr", "counts_ptr")


@triton.jit
def _segment(s, offsets_ptr, num_positions, num_tokens):
    """Tokens [start, stop) of segment s.

    Offsets are clamped: those on an accelerator cannot be checked without a synchronisation, and must not be followed
    out of the tensor.
    """
    if offsets_ptr is not None:
        start = tl.load(offsets_ptr + s).to(tl.int64)
        stop = tl.load(offsets_ptr + s + 1).to(tl.int64)
        start = tl.minimum(tl.maximum(start, 0), num_tokens)
        stop = tl.minimum(tl.maximum(stop, start), num_tokens)
    else:
        start = s * num_positions
        stop = start + num_positions
    return start, stop


# Reads a log-probability and a label per token; writes two numbers per rollout.
@kernel(do_not_specialize=UNSPECIALIZED, do_not_specialize_on_alignment=UNALIGNED)
def _forward_kernel(
    logprobs_ptr, labels_ptr, offsets_ptr, scores_ptr, counts_ptr, num_positions: tl.int64, num_tokens: tl.int64
):
    s = tl.program_id(0).to(tl.int64)
    start, stop = _segment(s, offsets_ptr, num_positions, num_tokens)
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


@triton.jit
def _fill_gap(out_ptr, start, stop, value):
    while start < stop:
        tokens = start + tl.arange(0, BLOCK)
        tl.store(out_ptr + tokens, tl.zeros((BLOCK,), out_ptr.dtype.element_ty) + value, mask=tokens < stop)
        start += BLOCK


@triton.jit
def _fill_outside(out_ptr, offsets_ptr, num_segments, num_tokens, value):
    """Store a value at the packed tokens that are outside of all segments."""
    zero = num_tokens * 0  # of its type, which a loop variable has to keep
    start = tl.maximum(tl.minimum(tl.load(offsets_ptr).to(tl.int64), num_tokens), zero)
    stop = tl.maximum(tl.minimum(tl.load(offsets_ptr + num_segments).to(tl.int64), num_tokens), zero)
    _fill_gap(out_ptr, zero, start, value)
    _fill_gap(out_ptr, stop, num_tokens, value)


# Reads a label per token and two numbers per rollout; writes a gradient per token.
@kernel(do_not_specialize=UNSPECIALIZED, do_not_specialize_on_alignment=UNALIGNED)
def _backward_kernel(
    weights_ptr, factor_ptr, counts_ptr, labels_ptr, offsets_ptr, grad_logprobs_ptr,
    num_positions: tl.int64, num_tokens: tl.int64, num_segments: tl.int64,
):  # fmt: skip
    s = tl.program_id(0).to(tl.int64)
    if offsets_ptr is not None:
        if s == num_segments:
            _fill_outside(grad_logprobs_ptr, offsets_ptr, num_segments, num_tokens, 0)
            return
    start, stop = _segment(s, offsets_ptr, num_positions, num_tokens)
    n = tl.load(counts_ptr + s)
    grad = tl.load(weights_ptr + s, mask=n > 0, other=0.0)
    if factor_ptr is not None:  # a weight of zero takes no part, whatever comes in
        grad = tl.where(grad == 0, grad, grad * tl.load(factor_ptr).to(grad.dtype))
    grad = grad / tl.maximum(n, 1)
    while start < stop:
        tokens = start + tl.arange(0, BLOCK)
        mask = tokens < stop
        active = mask & (n > 0) & (tl.load(labels_ptr + tokens, mask=mask, other=0) != IGNORED)
        tl.store(grad_logprobs_ptr + tokens, tl.where(active, grad, tl.zeros_like(grad)), mask=mask)
        start += BLOCK


# Reads the labels twice and a number per rollout; writes a coefficient and a label per token, a number per rollout.
@kernel(do_not_specialize=UNSPECIALIZED, do_not_specialize_on_alignment=UNALIGNED)
def _coefficients_kernel(
    weights_ptr, labels_ptr, offsets_ptr, coefficients_ptr, counts_ptr, kept_labels_ptr,
    num_positions: tl.int64, num_tokens: tl.int64, num_segments: tl.int64,
):  # fmt: skip
    s = tl.program_id(0).to(tl.int64)
    if offsets_ptr is not None:
        if s == num_segments:
            _fill_outside(coefficients_ptr, offsets_ptr, num_segments, num_tokens, 0)
            _fill_outside(kept_labels_ptr, offsets_ptr, num_segments, num_tokens, IGNORED)
            return
    TILE: tl.constexpr = BLOCK // 2  # two loops' registers
    start, stop = _segment(s, offsets_ptr, num_positions, num_tokens)
    count = tl.zeros((TILE,), tl.int32)
    first = start
    while first < stop:
        tokens = first + tl.arange(0, TILE)
        count += (tl.load(labels_ptr + tokens, mask=tokens < stop, other=IGNORED) != IGNORED).to(tl.int32)
        first += TILE
    n = tl.sum(count)
    tl.store(counts_ptr + s, n)
    c = tl.load(weights_ptr + s, mask=n > 0, other=0.0) / tl.maximum(n, 1)
    while start < stop:
        tokens = start + tl.arange(0, TILE)
        mask = tokens < stop
        label = tl.load(labels_ptr + tokens, mask=mask, other=IGNORED)
        coefficient = tl.where(label != IGNORED, c, tl.zeros_like(c))
        tl.store(coefficients_ptr + tokens, coefficient, mask=mask)
        tl.store(kept_labels_ptr + tokens, tl.where(coefficient != 0, label, IGNORED), mask=mask)
        start += TILE


# Reads a coefficient and a label per token, and writes them.
@kernel(do_not_specialize=UNSPECIALIZED, do_not_specialize_on_alignment=UNALIGNED)
def _masked_kernel(values_ptr, labels_ptr, coefficients_ptr, kept_labels_ptr, num_tokens: tl.int64):
    tokens = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = tokens < num_tokens
    label = tl.load(labels_ptr + tokens, mask=mask, other=IGNORED)
    coefficient = tl.load(values_ptr + tokens, mask=mask & (label != IGNORED), other=0.0)
    tl.store(coefficients_ptr + tokens, coefficient, mask=mask)
    tl.store(kept_labels_ptr + tokens, tl.where(coefficient != 0, label, IGNORED), mask=mask)


# Reads two numbers (three with counts) per value; writes one. One program: the order of the sum is fixed.
@kernel(do_not_specialize=("number",), do_not_specialize_on_alignment=UNALIGNED)
def _weighted_sum_kernel(values_ptr, weights_ptr, counts_ptr, sum_ptr, number: tl.int64):
    total = tl.zeros((BLOCK,), values_ptr.dtype.element_ty)
    start = number * 0
    while start < number:
        i = start + tl.arange(0, BLOCK)
        weight = tl.load(weights_ptr + i, mask=i < number, other=0.0)
        used = weight != 0  # what is not used may be -inf or NaN
        if counts_ptr is not None:
            used = used & (tl.load(counts_ptr + i, mask=i < number, other=0) > 0)
        total += weight * tl.load(values_ptr + i, mask=used, other=0.0)
        start += BLOCK
    tl.store(sum_ptr, tl.sum(total))


def forward(logprobs: Tensor, labels: Tensor, offsets: Tensor | None) -> tuple[Tensor, Tensor]:
    """logprobs, labels [B, T], offsets [S+1] or None -> scores [S] (NaN where empty), counts [S] int32."""
    num_segments = labels.shape[0] if offsets is None else offsets.numel() - 1
    scores = logprobs.new_empty(num_segments)
    counts = logprobs.new_empty(num_segments, dtype=torch.int32)
    if num_segments > 0:
        _forward_kernel[(num_segments,)](
            logprobs, labels, offsets, scores, counts, labels.shape[1], labels.numel(), **LAUNCH
        )
    return scores, counts


def backward(
    weights: Tensor, counts: Tensor, labels: Tensor, offsets: Tensor | None, factor: Tensor | None = None
) -> Tensor:
    """The gradient of the scores, weights [S] times factor, at their tokens: [B, T], zero where ignored."""
    grad_logprobs = torch.empty_like(labels, dtype=weights.dtype)
    if programs := _num_programs(labels, offsets):
        sizes = (labels.shape[1], labels.numel(), counts.numel())
        _backward_kernel[(programs,)](weights, factor, counts, labels, offsets, grad_logprobs, *sizes, **LAUNCH)
    return grad_logprobs


def coefficients(weights: Tensor, labels: Tensor, offsets: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """weights [S] over counts at their tokens [B, T]; counts [S] int32; labels, `IGNORED` where that is 0."""
    at_tokens = torch.empty_like(labels, dtype=weights.dtype)
    counts = torch.empty_like(weights, dtype=torch.int32)
    kept_labels = torch.empty_like(labels)
    if programs := _num_programs(labels, offsets):
        sizes = (labels.shape[1], labels.numel(), weights.numel())
        _coefficients_kernel[(programs,)](weights, labels, offsets, at_tokens, counts, kept_labels, *sizes, **LAUNCH)
    return at_tokens, counts, kept_labels


def masked(coefficients: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Coefficients [B, T], zero where ignored; the labels, `IGNORED` where the coefficient is zero."""
    at_tokens, kept_labels = torch.empty_like(coefficients), torch.empty_like(labels)
    if labels.numel():
        _masked_kernel[(ceil_div(labels.numel(), BLOCK.value),)](
            coefficients, labels, at_tokens, kept_labels, labels.numel(), **LAUNCH
        )
    return at_tokens, kept_labels


def weighted_sum(values: Tensor, weights: Tensor, counts: Tensor | None) -> Tensor:
    """The sum (0-d) of weights times values, contiguous, without those whose weight (or count) is zero."""
    total = values.new_empty(())
    _weighted_sum_kernel[(1,)](values, weights, counts, total, values.numel(), **LAUNCH)
    return total


def _num_programs(labels: Tensor, offsets: Tensor | None) -> int:
    """One per rollout; of packed tokens one more, for those of no rollout."""
    return labels.shape[0] if offsets is None else offsets.numel()
