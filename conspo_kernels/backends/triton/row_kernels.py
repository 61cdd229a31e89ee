"""Token log-probabilities over the vocabulary, forward and backward, in Triton.

A row's statistics are saved as (max u, log sum exp(y - max y)), kept apart: their sum would lose the digits of
log-probabilities at |z| = 1e4.

Names: b sequences, t positions, token = b * T + t, v vocabulary; z raw logits; u, m, s, w and `scale` as in
`softmax.py` (w for the entropy); d = u - m. In backward c and h are the incoming gradients of a log-probability and of
an entropy; h is not the hidden size, which no kernel knows.
"""

import triton
import triton.language as tl

from ...values import IGNORED as IGNORED_LABEL
from .direct import kernel
from .rows import UNALIGNED, UNSPECIALIZED, edges, interior, row_offset
from .softmax import LN_2, LOG2_E, NEG_INF, capped, fold, grad_tile, merge

IGNORED = tl.constexpr(IGNORED_LABEL)


@triton.jit
def _chunk_statistics(
    logits_ptr, row, vocab_size, first, last, start, stop, has_edges, inner, scale2,
    TANH: tl.constexpr, HAS_ENTROPY: tl.constexpr, ACC: tl.constexpr, VECTOR: tl.constexpr, LANES: tl.constexpr,
    PARTS: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """Statistics (m, s, w) of the aligned vectors [start, stop) of a row and, with `has_edges`, of its edges."""
    lanes = tl.arange(0, LANES)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
    m = tl.full((LANES // PARTS,), NEG_INF, ACC)
    s = tl.zeros((LANES // PARTS,), ACC)
    w = tl.zeros((LANES // PARTS,), ACC)
    num_tiles = tl.maximum(stop - start, 0) // (LANES * VECTOR)
    for _ in range(num_tiles):
        u = tl.load(logits_ptr + start + lanes, eviction_policy=KEEP).to(ACC)
        if TANH is not None:
            u = capped(u, inner, TANH)
        m, s, w = fold(m, s, w, u, scale2, HAS_ENTROPY)
        start += LANES * VECTOR
    if start < stop:
        mask = start + lanes < stop
        u = tl.load(logits_ptr + start + lanes, mask=mask, other=NEG_INF, eviction_policy=KEEP).to(ACC)
        if TANH is not None:
            u = capped(u, inner, TANH)
        m, s, w = fold(m, s, w, u, scale2, HAS_ENTROPY)
    m, s, w = merge(m, s, w, scale2, 0, HAS_ENTROPY)

    if has_edges:
        offsets, mask = edges(row, vocab_size, first, last, VECTOR)
        u = tl.load(logits_ptr + offsets, mask=mask, other=NEG_INF).to(ACC)
        if TANH is not None:
            u = capped(u, inner, TANH)
        m_row, s_row, w_row = fold(m[None], s[None], w[None], u[None, :], scale2, HAS_ENTROPY)
        m, s, w = tl.sum(m_row), tl.sum(s_row), tl.sum(w_row)
    return m, s, w


# Reads N * V logits once; writes 2 (3 with entropy) numbers per token and chunk.
@kernel(do_not_specialize=UNSPECIALIZED, do_not_specialize_on_alignment=UNALIGNED)
def _statistics_kernel(
    logits_ptr, labels_ptr, partial_ptr,
    logits_misalignment: tl.int64, stride_logits_b: tl.int64, stride_logits_t: tl.int64, num_positions: tl.int64,
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

    row = row_offset(token, num_positions, logits_misalignment, stride_logits_b, stride_logits_t)
    first, last = interior(row, vocab_size, VECTOR)
    start = first + chunk * CHUNK
    stop = tl.minimum(start + CHUNK, last)
    has_edges = (chunk == 0) & (last - first < vocab_size)
    m, s, w = _chunk_statistics(
        logits_ptr, row, vocab_size, first, last, start, stop, has_edges, inner, scale2,
        TANH, HAS_ENTROPY, ACC, VECTOR, LANES, PARTS, "",
    )  # fmt: skip

    out = partial_ptr + program.to(tl.int64) * (3 if HAS_ENTROPY else 2)
    tl.store(out, m)
    tl.store(out + 1, s)
    if HAS_ENTROPY:
        tl.store(out + 2, w)


@triton.jit
def _label_distance(
    logits_ptr, row, label, active, vocab_size, m, inner, TANH: tl.constexpr, ACC: tl.constexpr
):  # fmt: skip
    """u - m of the label's logit."""
    # A label outside the vocabulary is never read: its logit, and so its log-probability, is NaN.
    readable = active & (label >= 0) & (label < vocab_size)
    u = tl.load(logits_ptr + row + label, mask=readable, other=float("nan")).to(ACC)
    if TANH is not None:
        # A softcap of 50 makes 7e-6 of tanh's error in fp32. Recompute the label's tanh in fp64, except where the label
        # is the row maximum: there both terms carry the same error, it cancels, and logp <= 0.
        z, u = u, capped(u, inner, TANH)
        d = tl.where(u == m, u - m, capped(z.to(tl.float64), inner, "series") - m).to(ACC)
    else:
        d = u - m
    return d


# Reads the partial statistics and one logit per token; writes 3 (4 with entropy) numbers per token.
@kernel(do_not_specialize=UNSPECIALIZED, do_not_specialize_on_alignment=UNALIGNED)
def _combine_kernel(
    logits_ptr, labels_ptr, partial_ptr, logprobs_ptr, entropy_ptr, row_max_ptr, log_sum_ptr,
    logits_misalignment: tl.int64, stride_logits_b: tl.int64, stride_logits_t: tl.int64, num_tokens: tl.int64,
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

    row = row_offset(tokens, num_positions, logits_misalignment, stride_logits_b, stride_logits_t)
    d = _label_distance(logits_ptr, row, labels, active, vocab_size, m, inner, TANH, ACC)
    zero = tl.zeros_like(log_sum)
    tl.store(logprobs_ptr + tokens, tl.where(active, tl.fma(d, scale, -log_sum), zero), mask=in_range)
    tl.store(row_max_ptr + tokens, tl.where(active, m, zero), mask=in_range)
    tl.store(log_sum_ptr + tokens, tl.where(active, log_sum, zero), mask=in_range)
    if HAS_ENTROPY:
        tl.store(entropy_ptr + tokens, tl.where(active, log_sum - w / s * LN_2, zero), mask=in_range)


@triton.jit
def _backward_tile(
    logits_ptr, grad_ptr, mask, is_label, wait, c, h, m, log_sum, entropy, inner, scale,
    TANH: tl.constexpr, HAS_ENTROPY: tl.constexpr, DROP: tl.constexpr,
):  # fmt: skip
    z = tl.load(logits_ptr, mask=mask, eviction_policy=DROP).to(m.dtype)
    if wait:  # until all threads of the program have read this far
        tl.debug_barrier()
    g = grad_tile(z, is_label, c, h, m, log_sum, entropy, inner, scale, TANH, HAS_ENTROPY)
    tl.store(grad_ptr, g.to(grad_ptr.dtype.element_ty), mask=mask, eviction_policy=DROP)


@triton.jit
def _write_gradient(
    logits_ptr, grad_logits_ptr, row, grad_row, first, last, start, stop, has_edges, label, vocab_size,
    c, h, m, log_sum, entropy, inner, scale,
    TANH: tl.constexpr, HAS_ENTROPY: tl.constexpr, SAME_ALIGNMENT: tl.constexpr, VECTOR: tl.constexpr,
    LANES: tl.constexpr, DROP: tl.constexpr,
):  # fmt: skip
    """The gradient of the vectors [start, stop) behind the first one of a row and, with `has_edges`, of its edges.

    The last tile first. Compilers put more loads before their first use so, and spend fewer instructions.
    """
    if SAME_ALIGNMENT:
        grad_first, _grad_last = interior(grad_row, vocab_size, VECTOR)
    else:
        grad_first = grad_row + (first - row)
    lanes = tl.arange(0, LANES)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
    # Lanes are compared in 32 bits, of which a label of 2^32 + 3 has those of lane 3: such a label is no lane's.
    label_lane = tl.where(label >> 31 == 0, label - (first - row), -1)
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
        start += (num_tiles * (LANES * VECTOR)).to(start.dtype)
        if start < stop:
            _backward_tile(
                logits_ptr + first + start + lanes, grad_logits_ptr + grad_first + start + lanes, start + lanes < stop,
                lanes == (label_lane - start).to(tl.int32), False, c, h, m, log_sum, entropy, inner, scale,
                TANH, HAS_ENTROPY, DROP,
            )  # fmt: skip
        for _ in range(num_tiles):
            start -= LANES * VECTOR
            _backward_tile(
                logits_ptr + first + start + lanes, grad_logits_ptr + grad_first + start + lanes, None,
                lanes == (label_lane - start).to(tl.int32), False, c, h, m, log_sum, entropy, inner, scale,
                TANH, HAS_ENTROPY, DROP,
            )  # fmt: skip
        if has_edges:
            offsets, mask = edges(row, vocab_size, first, last, VECTOR)
            _backward_tile(
                logits_ptr + offsets, grad_logits_ptr + (grad_row - row) + offsets, mask, offsets - row == label,
                False, c, h, m, log_sum, entropy, inner, scale, TANH, HAS_ENTROPY, DROP,
            )  # fmt: skip


@triton.jit
def _write_narrow_gradient(
    logits_ptr, grad_logits_ptr, row, grad_row, label, vocab_size, c, h, m, log_sum, entropy, inner, scale,
    ALIGNED: tl.constexpr, TANH: tl.constexpr, HAS_ENTROPY: tl.constexpr, VECTOR: tl.constexpr, LANES: tl.constexpr,
    DROP: tl.constexpr,
):  # fmt: skip
    """The gradient of a whole row in half of a logit's bytes, perhaps in the second half of the row's own.

    From the end: a tile is written half as far from it as it was read, over logits that were read before, perhaps by
    another thread. So all wait for each other once the tiles 0, 1, 2, 4, 8 ... are read. No other program may be here.
    """
    # A product, so that the compiler sees it.
    logits_ptr += row // VECTOR * VECTOR if ALIGNED else row
    grad_logits_ptr += grad_row // VECTOR * VECTOR if ALIGNED else grad_row
    lanes = tl.arange(0, LANES)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
    label_lane = tl.where(label >> 31 == 0, label, -1)  # as in `_write_gradient`
    start = vocab_size // (LANES * VECTOR) * (LANES * VECTOR)
    last = vocab_size // VECTOR * VECTOR
    edge = last + tl.arange(0, VECTOR)
    if (c == 0) & (h == 0):
        zero = tl.zeros((LANES, VECTOR), grad_logits_ptr.dtype.element_ty)
        tl.store(grad_logits_ptr + edge, tl.zeros_like(edge).to(zero.dtype), mask=edge < vocab_size)
        tl.store(grad_logits_ptr + start + lanes, zero, mask=start + lanes < last)
        for _ in range(vocab_size // (LANES * VECTOR)):
            start -= LANES * VECTOR
            tl.store(grad_logits_ptr + start + lanes, zero)
    else:
        if last < vocab_size:
            _backward_tile(
                logits_ptr + edge, grad_logits_ptr + edge, edge < vocab_size, edge == label, True,
                c, h, m, log_sum, entropy, inner, scale, TANH, HAS_ENTROPY, DROP,
            )  # fmt: skip
        if start < last:
            _backward_tile(
                logits_ptr + start + lanes, grad_logits_ptr + start + lanes, start + lanes < last,
                lanes == (label_lane - start).to(tl.int32), True,
                c, h, m, log_sum, entropy, inner, scale, TANH, HAS_ENTROPY, DROP,
            )  # fmt: skip
        for tile in range(vocab_size // (LANES * VECTOR)):
            start -= LANES * VECTOR
            _backward_tile(
                logits_ptr + start + lanes, grad_logits_ptr + start + lanes, None,
                lanes == (label_lane - start).to(tl.int32), tile & (tile - 1) == 0,
                c, h, m, log_sum, entropy, inner, scale, TANH, HAS_ENTROPY, DROP,
            )  # fmt: skip


# Reads and writes N * V once. Tokens whose coefficients are zero, ignored ones too, are zero-filled and not read. One
# program per chunk of a row, or per row where the gradient is narrower than the logits.
@kernel(do_not_specialize=UNSPECIALIZED, do_not_specialize_on_alignment=UNALIGNED)
def _backward_kernel(
    logits_ptr, labels_ptr, row_max_ptr, log_sum_ptr, entropy_ptr, grad_logprobs_ptr, grad_entropy_ptr,
    grad_logits_ptr,
    logits_misalignment: tl.int64, stride_logits_b: tl.int64, stride_logits_t: tl.int64, grad_misalignment: tl.int64,
    stride_grad_b: tl.int64, stride_grad_t: tl.int64, num_positions: tl.int64, vocab_start: tl.int64,
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
    h = tl.zeros_like(c)
    entropy = tl.zeros_like(c)
    if HAS_ENTROPY:
        h = tl.load(grad_entropy_ptr + token, mask=active, other=0.0)
        entropy = tl.load(entropy_ptr + token)
    m = tl.load(row_max_ptr + token)
    log_sum = tl.load(log_sum_ptr + token)
    inner = tl.full((), inner, tl.float64)
    scale = tl.full((), scale, ACC)

    row = row_offset(token, num_positions, logits_misalignment, stride_logits_b, stride_logits_t)
    first, last = interior(row, vocab_size, VECTOR)
    grad_row = row_offset(token, num_positions, grad_misalignment, stride_grad_b, stride_grad_t)
    if grad_logits_ptr.dtype.element_ty.primitive_bitwidth < logits_ptr.dtype.element_ty.primitive_bitwidth:
        _write_narrow_gradient(
            logits_ptr, grad_logits_ptr, row, grad_row, label - vocab_start, vocab_size, c, h, m, log_sum, entropy,
            inner, scale, SAME_ALIGNMENT, TANH, HAS_ENTROPY, VECTOR, LANES, "",
        )  # fmt: skip
    else:
        start = chunk * CHUNK
        stop = tl.minimum(start + CHUNK, last - first)
        has_edges = (chunk == 0) & (last - first < vocab_size)
        _write_gradient(
            logits_ptr, grad_logits_ptr, row, grad_row, first, last, start, stop, has_edges, label - vocab_start,
            vocab_size, c, h, m, log_sum, entropy, inner, scale,
            TANH, HAS_ENTROPY, SAME_ALIGNMENT, VECTOR, LANES, "",
        )  # fmt: skip


# Reads N * V logits twice, the second time from the caches, and writes them once. One program per row: it
# is the row's statistics, then its gradient, backwards: what was read last is still in the L1, most of the rest in the
# L2 where that holds the rows in flight. Ignored tokens are not read. Logits and gradient are aligned alike.
@kernel(do_not_specialize=UNSPECIALIZED, do_not_specialize_on_alignment=UNALIGNED)
def _known_kernel(
    logits_ptr, labels_ptr, coefficients_ptr, logprobs_ptr, grad_logits_ptr,
    logits_misalignment: tl.int64, stride_logits_b: tl.int64, stride_logits_t: tl.int64, grad_misalignment: tl.int64,
    stride_grad_b: tl.int64, stride_grad_t: tl.int64, num_positions: tl.int64,
    inner: tl.float64, scale: tl.float64, vocab_size, num_chunks,
    TANH: tl.constexpr, ACC: tl.constexpr, VECTOR: tl.constexpr, LANES: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    label = tl.load(labels_ptr + token)
    active = label != IGNORED
    c = tl.load(coefficients_ptr + token, mask=active, other=0.0)
    inner = tl.full((), inner, tl.float64)
    scale = tl.full((), scale, ACC)
    row = row_offset(token, num_positions, logits_misalignment, stride_logits_b, stride_logits_t)
    grad_row = row_offset(token, num_positions, grad_misalignment, stride_grad_b, stride_grad_t)
    first, last = interior(row, vocab_size, VECTOR)
    has_edges = last - first < vocab_size

    m = tl.zeros((), ACC)
    log_sum = tl.zeros((), ACC)
    logprob = tl.zeros((), ACC)
    if active:
        m, s, _w = _chunk_statistics(
            logits_ptr, row, vocab_size, first, last, first, last, has_edges, inner, scale * LOG2_E,
            TANH, False, ACC, VECTOR, LANES, PARTS, "evict_last",
        )  # fmt: skip
        log_sum = tl.log(s)
        d = _label_distance(logits_ptr, row, label, active, vocab_size, m, inner, TANH, ACC)
        logprob = tl.fma(d, scale, -log_sum)
    tl.store(logprobs_ptr + token, logprob)
    tl.debug_barrier()  # where the gradient overwrites the logits, every thread has read the label's
    zero = tl.zeros_like(c)
    if grad_logits_ptr.dtype.element_ty.primitive_bitwidth < logits_ptr.dtype.element_ty.primitive_bitwidth:
        _write_narrow_gradient(
            logits_ptr, grad_logits_ptr, row, grad_row, label, vocab_size, c, zero, m, log_sum, zero, inner, scale,
            True, TANH, False, VECTOR, LANES, "evict_first",
        )  # fmt: skip
    else:
        _write_gradient(
            logits_ptr, grad_logits_ptr, row, grad_row, first, last, last * 0, last - first, has_edges, label,
            vocab_size, c, zero, m, log_sum, zero, inner, scale, TANH, False, True, VECTOR, LANES, "evict_first",
        )  # fmt: skip
