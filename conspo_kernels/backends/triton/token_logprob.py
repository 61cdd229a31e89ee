"""Token log-probabilities over the vocabulary, forward and backward, in Triton.

A row's statistics are saved as (max u, log sum exp(y - max y)), kept apart: their sum would lose the digits of
log-probabilities at |z| = 1e4.

Names: b sequences, t positions, token = b * T + t, v vocabulary; z raw logits, u and `scale` as in `softmax.py`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...values import IGNORED as IGNORED_LABEL
from ...values import LogitRows, LogitTransform, Statistics, Upstream
from .rows import (
    UNALIGNED,
    UNSPECIALIZED,
    VECTOR_BYTES,
    aligned_base,
    edges,
    interior,
    num_chunks_of,
    row_offset,
    tiles,
)
from .softmax import LN_2, LOG2_E, NEG_INF, capped, fold, grad_tile, merge

COMBINE_ROWS = 16
IGNORED = tl.constexpr(IGNORED_LABEL)


# Reads N * V logits once; writes 2 (3 with entropy) numbers per token and chunk.
@triton.jit(do_not_specialize=UNSPECIALIZED, do_not_specialize_on_alignment=UNALIGNED)
def _statistics_kernel(
    logits_ptr, labels_ptr, partial_ptr,
    logits_early: tl.int64, stride_logits_b: tl.int64, stride_logits_t: tl.int64, num_positions: tl.int64,
    inner: tl.float64, scale: tl.float64, vocab_size, num_chunks,
    TANH: tl.constexpr, HAS_ENTROPY: tl.constexpr, ACC: tl.constexpr, VECTOR: tl.constexpr,
    LANES: tl.constexpr, CHUNK: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    token = (program // num_chunks).to(tl.int64)
    chunk = program % num_chunks
    if tl.load(labels_ptr + token) == IGNORED:
        return
    inner = tl.full((), inner, tl.float64)
    scale2 = tl.full((), scale, ACC) * LOG2_E

    row = row_offset(token, num_positions, logits_early, stride_logits_b, stride_logits_t)
    first, last = interior(row, vocab_size, VECTOR)
    start = first + chunk * CHUNK
    stop = tl.minimum(start + CHUNK, last)
    lanes = tl.arange(0, LANES)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]

    m = tl.full((LANES // PARTS,), NEG_INF, ACC)
    s = tl.zeros((LANES // PARTS,), ACC)
    w = tl.zeros((LANES // PARTS,), ACC)
    num_tiles = tl.maximum(stop - start, 0) // (LANES * VECTOR)
    for _ in range(num_tiles):
        u = tl.load(logits_ptr + start + lanes).to(ACC)
        if TANH is not None:
            u = capped(u, inner, TANH)
        m, s, w = fold(m, s, w, u, scale2, HAS_ENTROPY)
        start += LANES * VECTOR
    if start < stop:
        u = tl.load(logits_ptr + start + lanes, mask=start + lanes < stop, other=NEG_INF).to(ACC)
        if TANH is not None:
            u = capped(u, inner, TANH)
        m, s, w = fold(m, s, w, u, scale2, HAS_ENTROPY)
    m, s, w = merge(m, s, w, scale2, 0, HAS_ENTROPY)

    if (chunk == 0) & (last - first < vocab_size):
        offsets, mask = edges(row, vocab_size, first, last, VECTOR)
        u = tl.load(logits_ptr + offsets, mask=mask, other=NEG_INF).to(ACC)
        if TANH is not None:
            u = capped(u, inner, TANH)
        m_row, s_row, w_row = fold(m[None], s[None], w[None], u[None, :], scale2, HAS_ENTROPY)
        m, s, w = tl.sum(m_row), tl.sum(s_row), tl.sum(w_row)

    out = partial_ptr + program.to(tl.int64) * (3 if HAS_ENTROPY else 2)
    tl.store(out, m)
    tl.store(out + 1, s)
    if HAS_ENTROPY:
        tl.store(out + 2, w)


# Reads the partial statistics and one logit per token; writes 3 (4 with entropy) numbers per token.
@triton.jit(do_not_specialize=UNSPECIALIZED, do_not_specialize_on_alignment=UNALIGNED)
def _combine_kernel(
    logits_ptr, labels_ptr, partial_ptr, logprobs_ptr, entropy_ptr, row_max_ptr, log_sum_ptr,
    logits_early: tl.int64, stride_logits_b: tl.int64, stride_logits_t: tl.int64, num_tokens: tl.int64,
    num_positions: tl.int64, inner: tl.float64, scale: tl.float64, vocab_size, num_chunks,
    TANH: tl.constexpr, HAS_ENTROPY: tl.constexpr, ACC: tl.constexpr, ROWS: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    tokens = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    in_range = tokens < num_tokens
    labels = tl.load(labels_ptr + tokens, mask=in_range, other=0)
    active = in_range & (labels != IGNORED)
    inner = tl.full((), inner, tl.float64)
    scale = tl.full((), scale, ACC)

    chunks = tl.arange(0, CHUNKS)
    columns: tl.constexpr = 3 if HAS_ENTROPY else 2
    partial = partial_ptr + (tokens[:, None] * num_chunks + chunks[None, :]) * columns
    mask = active[:, None] & (chunks < num_chunks)[None, :]
    m = tl.load(partial, mask=mask, other=NEG_INF)
    s = tl.load(partial + 1, mask=mask, other=0.0)
    w = tl.zeros_like(s)
    if HAS_ENTROPY:
        w = tl.load(partial + 2, mask=mask, other=0.0)
    m, s, w = merge(m, s, w, scale * LOG2_E, 1, HAS_ENTROPY)
    log_sum = tl.log(s)

    # A label outside the vocabulary is never read: its logit, and so its log-probability, is NaN.
    readable = active & (labels >= 0) & (labels < vocab_size)
    row = row_offset(tokens, num_positions, logits_early, stride_logits_b, stride_logits_t)
    u = tl.load(logits_ptr + row + labels, mask=readable, other=float("nan")).to(ACC)
    if TANH is not None:
        # A softcap of 50 makes 7e-6 of tanh's error in fp32: the sum has it, the label need not. Only the maximum keeps
        # it: there both errors are the same and cancel, so that logp <= 0.
        z, u = u, capped(u, inner, TANH)
        d = tl.where(u == m, u - m, capped(z.to(tl.float64), inner, "series") - m).to(ACC)
    else:
        d = u - m
    zero = tl.zeros_like(log_sum)
    tl.store(logprobs_ptr + tokens, tl.where(active, tl.fma(d, scale, -log_sum), zero), mask=in_range)
    tl.store(row_max_ptr + tokens, tl.where(active, m, zero), mask=in_range)
    tl.store(log_sum_ptr + tokens, tl.where(active, log_sum, zero), mask=in_range)
    if HAS_ENTROPY:
        tl.store(entropy_ptr + tokens, tl.where(active, log_sum - w / s * LN_2, zero), mask=in_range)


@triton.jit
def _backward_tile(
    logits_ptr, grad_ptr, mask, is_label, c, h, m, log_sum, entropy, inner, scale,
    TANH: tl.constexpr, HAS_ENTROPY: tl.constexpr,
):  # fmt: skip
    z = tl.load(logits_ptr, mask=mask).to(m.dtype)
    g = grad_tile(z, is_label, c, h, m, log_sum, entropy, inner, scale, TANH, HAS_ENTROPY)
    tl.store(grad_ptr, g.to(grad_ptr.dtype.element_ty), mask=mask)


# Reads and writes N * V once. Tokens whose coefficients are zero, ignored ones too, are zero-filled and not read.
@triton.jit(do_not_specialize=UNSPECIALIZED, do_not_specialize_on_alignment=UNALIGNED)
def _backward_kernel(
    logits_ptr, labels_ptr, row_max_ptr, log_sum_ptr, entropy_ptr, grad_logprobs_ptr, grad_entropy_ptr,
    grad_logits_ptr,
    logits_early: tl.int64, stride_logits_b: tl.int64, stride_logits_t: tl.int64, grad_early: tl.int64,
    stride_grad_b: tl.int64, stride_grad_t: tl.int64, num_positions: tl.int64,
    inner: tl.float64, scale: tl.float64, vocab_size, num_chunks,
    TANH: tl.constexpr, HAS_ENTROPY: tl.constexpr, SAME_ALIGNMENT: tl.constexpr, ACC: tl.constexpr,
    VECTOR: tl.constexpr, LANES: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    token = (program // num_chunks).to(tl.int64)
    chunk = program % num_chunks
    label = tl.load(labels_ptr + token)
    active = label != IGNORED
    c = tl.load(grad_logprobs_ptr + token, mask=active, other=0.0)
    h, entropy = tl.zeros_like(c), tl.zeros_like(c)
    if HAS_ENTROPY:
        h = tl.load(grad_entropy_ptr + token, mask=active, other=0.0)
        entropy = tl.load(entropy_ptr + token)
    m = tl.load(row_max_ptr + token)
    log_sum = tl.load(log_sum_ptr + token)
    inner = tl.full((), inner, tl.float64)
    scale = tl.full((), scale, ACC)

    row = row_offset(token, num_positions, logits_early, stride_logits_b, stride_logits_t)
    first, last = interior(row, vocab_size, VECTOR)
    grad_row = row_offset(token, num_positions, grad_early, stride_grad_b, stride_grad_t)
    if SAME_ALIGNMENT:
        grad_first, _grad_last = interior(grad_row, vocab_size, VECTOR)
    else:
        grad_first = grad_row + (first - row)
    start = chunk * CHUNK
    stop = tl.minimum(start + CHUNK, last - first)
    lanes = tl.arange(0, LANES)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
    # Lanes are compared in 32 bits, of which a label of 2^32 + 3 has those of lane 3: such a label is no lane's.
    label_lane = tl.where(label >> 31 == 0, label - (first - row), -1)
    has_edges = (chunk == 0) & (last - first < vocab_size)
    num_tiles = tl.maximum(stop - start, 0) // (LANES * VECTOR)

    if (c == 0) & (h == 0):
        zero = tl.zeros((LANES, VECTOR), grad_logits_ptr.dtype.element_ty)
        for _ in range(num_tiles):
            tl.store(grad_logits_ptr + grad_first + start + lanes, zero)
            start += LANES * VECTOR
        if start < stop:
            tl.store(grad_logits_ptr + grad_first + start + lanes, zero, mask=start + lanes < stop)
        if has_edges:
            offsets, mask = edges(row, vocab_size, first, last, VECTOR)
            tl.store(grad_logits_ptr + (grad_row - row) + offsets, tl.zeros_like(offsets).to(zero.dtype), mask=mask)
    else:
        for _ in range(num_tiles):
            is_label = lanes == (label_lane - start).to(tl.int32)
            _backward_tile(
                logits_ptr + first + start + lanes, grad_logits_ptr + grad_first + start + lanes, None, is_label,
                c, h, m, log_sum, entropy, inner, scale, TANH, HAS_ENTROPY,
            )  # fmt: skip
            start += LANES * VECTOR
        if start < stop:
            is_label = lanes == (label_lane - start).to(tl.int32)
            _backward_tile(
                logits_ptr + first + start + lanes, grad_logits_ptr + grad_first + start + lanes, start + lanes < stop,
                is_label, c, h, m, log_sum, entropy, inner, scale, TANH, HAS_ENTROPY,
            )  # fmt: skip
        if has_edges:
            offsets, mask = edges(row, vocab_size, first, last, VECTOR)
            _backward_tile(
                logits_ptr + offsets, grad_logits_ptr + (grad_row - row) + offsets, mask, offsets - row == label,
                c, h, m, log_sum, entropy, inner, scale, TANH, HAS_ENTROPY,
            )  # fmt: skip


def forward(rows: LogitRows, with_entropy: bool) -> Statistics:
    """Statistics, each [B, T]."""
    logits, labels, transform = rows
    num_tokens, num_chunks = labels.numel(), num_chunks_of(logits)
    acc = torch.float64 if logits.dtype == torch.float64 else torch.float32
    logprobs, row_max, log_sum = (torch.empty(labels.shape, dtype=acc, device=logits.device) for _ in range(3))
    entropy = torch.empty_like(logprobs) if with_entropy else None
    if num_tokens == 0:
        return Statistics(logprobs, entropy, row_max, log_sum)

    partial = torch.empty(num_tokens * num_chunks * (3 if with_entropy else 2), dtype=acc, device=logits.device)
    base, early = aligned_base(logits)
    row = (early, logits.stride(0), logits.stride(1))
    constants = _constants(logits, transform) | {"HAS_ENTROPY": with_entropy}
    _statistics_kernel[(num_tokens * num_chunks,)](
        base, labels, partial, *row, labels.shape[1], **constants, **tiles(logits, "forward")
    )
    _combine_kernel[(triton.cdiv(num_tokens, COMBINE_ROWS),)](
        base, labels, partial, logprobs, entropy, row_max, log_sum, *row, num_tokens, labels.shape[1],
        **constants, ROWS=COMBINE_ROWS, CHUNKS=triton.next_power_of_2(num_chunks), num_warps=1,
        # Several lanes hold a row and store it. Were `merge`'s products fused with the sum over lanes, each would have
        # its own one unrounded, and its own last bit.
        enable_fp_fusion=False,
    )  # fmt: skip
    return Statistics(logprobs, entropy, row_max, log_sum)


def backward(grad_logits: Tensor, rows: LogitRows, statistics: Statistics, upstream: Upstream) -> None:
    """Write the gradient of forward's outputs into `grad_logits` [B, T, V], which may be the logits themselves."""
    logits, labels, transform = rows
    grad_logprobs, grad_entropy = upstream
    num_tokens, num_chunks = labels.numel(), num_chunks_of(logits)
    if num_tokens == 0:
        return
    _logprobs, entropy, row_max, log_sum = statistics
    base, early = aligned_base(logits)
    grad_base, grad_early = aligned_base(grad_logits)
    row = (early, logits.stride(0), logits.stride(1))
    grad_row = (grad_early, grad_logits.stride(0), grad_logits.stride(1))
    vector = VECTOR_BYTES // logits.element_size()
    same_alignment = all((a - b) % vector == 0 for a, b in zip(row, grad_row, strict=True))
    # The slope of a softcap and the addresses of narrow stores double the registers per logit: a smaller tile.
    light = transform.softcap is None and same_alignment
    _backward_kernel[(num_tokens * num_chunks,)](
        base, labels, row_max, log_sum, entropy, grad_logprobs, grad_entropy, grad_base, *row, *grad_row,
        labels.shape[1], **_constants(logits, transform), **tiles(logits, "backward" if light else "heavy"),
        HAS_ENTROPY=grad_entropy is not None, SAME_ALIGNMENT=same_alignment,
    )  # fmt: skip


def forward_backward(grad_logits: Tensor, rows: LogitRows, coefficients: Tensor) -> Tensor:
    """logprobs [B, T], and into `grad_logits` (perhaps the logits) the gradient of sum(coefficients * logprobs)."""
    statistics = forward(rows, with_entropy=False)
    backward(grad_logits, rows, statistics, Upstream(coefficients))
    return statistics.logprobs


def _constants(logits: Tensor, transform: LogitTransform) -> dict[str, object]:
    """The arguments that every kernel here takes."""
    return {
        "inner": transform.inner,
        "scale": transform.scale,
        "vocab_size": logits.shape[-1],
        "num_chunks": num_chunks_of(logits),
        "TANH": transform.tanh(logits.dtype),
        "ACC": tl.float64 if logits.dtype == torch.float64 else tl.float32,
    }
