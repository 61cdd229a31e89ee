"""Token log-probabilities over the vocabulary, forward and backward, in Triton.

A row's statistics are saved as (max u, log sum exp(y - max y)), kept apart: their sum would lose the digits of
log-probabilities at |z| = 1e4.

Names: b sequences, t positions, token = b * T + t, v vocabulary; z raw logits; u, m, s, w and `scale` as in
`softmax.py` (w for the entropy); d = u - m. In backward c and h are the incoming gradients of a log-probability and of
an entropy; h is not the hidden size, which no kernel knows. What belongs together goes from function to function as one
value: a `row` is (offset of its first logit, vocab_size, first, last), a `span` of its vectors (start, stop, whether
the edges belong to it), `incoming` (c, m, log_sum, h, entropy), the last two None without an entropy, a `transform`
(inner, scale), and `grad` (pointer, offset of the row's first gradient).
"""

import triton
import triton.language as tl

from ...values import IGNORED as IGNORED_LABEL
from .direct import kernel
from .rows import UNALIGNED, UNSPECIALIZED, edges, interior, row_offset
from .softmax import LN_2, LOG2_E, NEG_INF, capped, fold, grad_tile, label_mask, merge

IGNORED = tl.constexpr(IGNORED_LABEL)


@triton.jit
def _chunk_statistics(logits_ptr, row, span, transform, TANH, HAS_ENTROPY, ACC, VECTOR, LANES, PARTS, KEEP):
    """Statistics (m, s, w) of the aligned vectors [start, stop) of a row and, with `has_edges`, of its edges."""
    offset, vocab_size, first, last = row
    start, stop, has_edges = span
    inner, scale = transform
    scale2 = scale * LOG2_E
    lanes = tl.arange(0, LANES)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
    m = tl.full((LANES // PARTS,), NEG_INF, ACC)
    s = tl.zeros((LANES // PARTS,), ACC)
    w = tl.zeros((LANES // PARTS,), ACC)
    num_tiles = tl.maximum(stop - start, 0) // (LANES * VECTOR)
    for _ in range(num_tiles):
        u = capped(tl.load(logits_ptr + start + lanes, eviction_policy=KEEP).to(ACC), inner, TANH)
        m, s, w = fold(m, s, w, u, scale2, HAS_ENTROPY)
        start += LANES * VECTOR
    if start < stop:
        mask = start + lanes < stop
        u = tl.load(logits_ptr + start + lanes, mask=mask, other=NEG_INF, eviction_policy=KEEP).to(ACC)
        u = capped(u, inner, TANH)
        m, s, w = fold(m, s, w, u, scale2, HAS_ENTROPY)
    m, s, w = merge(m, s, w, scale2, 0, HAS_ENTROPY)

    if has_edges:
        offsets, mask = edges(offset, vocab_size, first, last, VECTOR)
        u = tl.load(logits_ptr + offsets, mask=mask, other=NEG_INF).to(ACC)
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
    transform = (tl.full((), inner, tl.float64), tl.full((), scale, ACC))

    offset = row_offset(token, num_positions, logits_misalignment, stride_logits_b, stride_logits_t)
    first, last = interior(offset, vocab_size, VECTOR)
    start = first + chunk * CHUNK
    span = (start, tl.minimum(start + CHUNK, last), (chunk == 0) & (last - first < vocab_size))
    row = (offset, vocab_size, first, last)
    m, s, w = _chunk_statistics(logits_ptr, row, span, transform, TANH, HAS_ENTROPY, ACC, VECTOR, LANES, PARTS, "")

    out = partial_ptr + program.to(tl.int64) * (3 if HAS_ENTROPY else 2)
    tl.store(out, m)
    tl.store(out + 1, s)
    if HAS_ENTROPY:
        tl.store(out + 2, w)


@triton.jit
def _label_distance(logits_ptr, offset, label, active, vocab_size, m, inner, TANH):
    """u - m of the label's logit."""
    # A label outside the vocabulary is never read: its logit, and so its log-probability, is NaN.
    readable = active & (label >= 0) & (label < vocab_size)
    u = tl.load(logits_ptr + offset + label, mask=readable, other=float("nan")).to(m.dtype)
    if TANH is not None:
        # A softcap of 50 makes 7e-6 of tanh's error in fp32. Recompute the label's tanh in fp64, except where the label
        # is the row maximum: there both terms carry the same error, it cancels, and logp <= 0.
        z, u = u, capped(u, inner, TANH)
        d = tl.where(u == m, u - m, capped(z.to(tl.float64), inner, "series") - m).to(m.dtype)
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

    offset = row_offset(tokens, num_positions, logits_misalignment, stride_logits_b, stride_logits_t)
    d = _label_distance(logits_ptr, offset, labels, active, vocab_size, m, inner, TANH)
    zero = tl.zeros_like(log_sum)
    tl.store(logprobs_ptr + tokens, tl.where(active, tl.fma(d, scale, -log_sum), zero), mask=in_range)
    tl.store(row_max_ptr + tokens, tl.where(active, m, zero), mask=in_range)
    tl.store(log_sum_ptr + tokens, tl.where(active, log_sum, zero), mask=in_range)
    if HAS_ENTROPY:
        tl.store(entropy_ptr + tokens, tl.where(active, log_sum - w / s * LN_2, zero), mask=in_range)


@triton.jit
def _backward_tile(logits_ptr, grad_ptr, mask, is_label, wait, incoming, transform, TANH, DROP):
    z = tl.load(logits_ptr, mask=mask, eviction_policy=DROP).to(incoming[0].dtype)
    if wait:  # until all threads of the program have read this far
        tl.debug_barrier()
    g = grad_tile(z, is_label, incoming, transform, TANH)
    tl.store(grad_ptr, g.to(grad_ptr.dtype.element_ty), mask=mask, eviction_policy=DROP)


@triton.jit
def _no_gradient(incoming):
    """Whether the gradients that come in are zero."""
    c, _m, _log_sum, h, _entropy = incoming
    if h is not None:
        return (c == 0) & (h == 0)
    else:
        return c == 0


@triton.jit
def _write_gradient(logits_ptr, row, grad, span, label, incoming, transform, TANH, SAME_ALIGNMENT, VECTOR, LANES, DROP):
    """The gradient of the vectors [start, stop) behind the first one of a row and, with `has_edges`, of its edges.

    The last tile first. Compilers put more loads before their first use so, and spend fewer instructions.
    """
    offset, vocab_size, first, last = row
    grad_ptr, grad_offset = grad
    start, stop, has_edges = span
    if SAME_ALIGNMENT:
        grad_first, _grad_last = interior(grad_offset, vocab_size, VECTOR)
    else:
        grad_first = grad_offset + (first - offset)
    lanes = tl.arange(0, LANES)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
    # Lanes are compared in 32 bits, of which a label of 2^32 + 3 has those of lane 3: such a label is no lane's.
    label_lane = tl.where(label >> 31 == 0, label - (first - offset), -1)
    num_tiles = tl.maximum(stop - start, 0) // (LANES * VECTOR)

    if _no_gradient(incoming):
        zero = tl.zeros((LANES, VECTOR), grad_ptr.dtype.element_ty)
        for _ in range(num_tiles):
            tl.store(grad_ptr + grad_first + start + lanes, zero)
            start += LANES * VECTOR
        if start < stop:
            tl.store(grad_ptr + grad_first + start + lanes, zero, mask=start + lanes < stop)
        if has_edges:
            offsets, mask = edges(offset, vocab_size, first, last, VECTOR)
            tl.store(grad_ptr + (grad_offset - offset) + offsets, tl.zeros_like(offsets).to(zero.dtype), mask=mask)
    else:
        start += (num_tiles * (LANES * VECTOR)).to(start.dtype)
        if start < stop:
            is_label, mask = label_mask(label_lane, start, SAME_ALIGNMENT, VECTOR, LANES), start + lanes < stop
            z_ptr, g_ptr = logits_ptr + first + start + lanes, grad_ptr + grad_first + start + lanes
            _backward_tile(z_ptr, g_ptr, mask, is_label, False, incoming, transform, TANH, DROP)
        for _ in range(num_tiles):
            start -= LANES * VECTOR
            is_label = label_mask(label_lane, start, SAME_ALIGNMENT, VECTOR, LANES)
            z_ptr, g_ptr = logits_ptr + first + start + lanes, grad_ptr + grad_first + start + lanes
            _backward_tile(z_ptr, g_ptr, None, is_label, False, incoming, transform, TANH, DROP)
        if has_edges:
            offsets, mask = edges(offset, vocab_size, first, last, VECTOR)
            z_ptr, g_ptr = logits_ptr + offsets, grad_ptr + (grad_offset - offset) + offsets
            is_label = offsets - offset == label
            _backward_tile(z_ptr, g_ptr, mask, (is_label, is_label), False, incoming, transform, TANH, DROP)


@triton.jit
def _write_narrow_gradient(logits_ptr, row, grad, label, incoming, transform, TANH, ALIGNED, VECTOR, LANES, DROP):
    """The gradient of a whole row in half of a logit's bytes, perhaps in the second half of the row's own.

    From the end: a tile is written half as far from it as it was read, over logits that were read before, perhaps by
    another thread. So all wait for each other once the tiles 0, 1, 2, 4, 8 ... are read. No other program may be here.
    """
    offset, vocab_size, _first, _last = row
    grad_ptr, grad_offset = grad
    # A product, so that the compiler sees it.
    logits_ptr += offset // VECTOR * VECTOR if ALIGNED else offset
    grad_ptr += grad_offset // VECTOR * VECTOR if ALIGNED else grad_offset
    lanes = tl.arange(0, LANES)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
    label_lane = tl.where(label >> 31 == 0, label, -1)  # as in `_write_gradient`
    start = vocab_size // (LANES * VECTOR) * (LANES * VECTOR)
    last = vocab_size // VECTOR * VECTOR
    edge = last + tl.arange(0, VECTOR)
    if _no_gradient(incoming):
        zero = tl.zeros((LANES, VECTOR), grad_ptr.dtype.element_ty)
        tl.store(grad_ptr + edge, tl.zeros_like(edge).to(zero.dtype), mask=edge < vocab_size)
        tl.store(grad_ptr + start + lanes, zero, mask=start + lanes < last)
        for _ in range(vocab_size // (LANES * VECTOR)):
            start -= LANES * VECTOR
            tl.store(grad_ptr + start + lanes, zero)
    else:
        if last < vocab_size:
            z_ptr, g_ptr = logits_ptr + edge, grad_ptr + edge
            is_label = edge == label
            _backward_tile(z_ptr, g_ptr, edge < vocab_size, (is_label, is_label), True, incoming, transform, TANH, DROP)
        if start < last:
            is_label, mask = label_mask(label_lane, start, True, VECTOR, LANES), start + lanes < last
            z_ptr, g_ptr = logits_ptr + start + lanes, grad_ptr + start + lanes
            _backward_tile(z_ptr, g_ptr, mask, is_label, True, incoming, transform, TANH, DROP)
        for tile in range(vocab_size // (LANES * VECTOR)):
            start -= LANES * VECTOR
            is_label, wait = label_mask(label_lane, start, True, VECTOR, LANES), tile & (tile - 1) == 0
            z_ptr, g_ptr = logits_ptr + start + lanes, grad_ptr + start + lanes
            _backward_tile(z_ptr, g_ptr, None, is_label, wait, incoming, transform, TANH, DROP)


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
    h, entropy = None, None
    if HAS_ENTROPY:
        h = tl.load(grad_entropy_ptr + token, mask=active, other=0.0)
        entropy = tl.load(entropy_ptr + token)
    m = tl.load(row_max_ptr + token)
    log_sum = tl.load(log_sum_ptr + token)
    incoming = (c, m, log_sum, h, entropy)
    transform = (tl.full((), inner, tl.float64), tl.full((), scale, ACC))

    offset = row_offset(token, num_positions, logits_misalignment, stride_logits_b, stride_logits_t)
    first, last = interior(offset, vocab_size, VECTOR)
    row = (offset, vocab_size, first, last)
    grad = (grad_logits_ptr, row_offset(token, num_positions, grad_misalignment, stride_grad_b, stride_grad_t))
    label -= vocab_start
    if grad_logits_ptr.dtype.element_ty.primitive_bitwidth < logits_ptr.dtype.element_ty.primitive_bitwidth:
        _write_narrow_gradient(
            logits_ptr, row, grad, label, incoming, transform, TANH, SAME_ALIGNMENT, VECTOR, LANES, ""
        )
    else:
        start = chunk * CHUNK
        span = (start, tl.minimum(start + CHUNK, last - first), (chunk == 0) & (last - first < vocab_size))
        _write_gradient(
            logits_ptr, row, grad, span, label, incoming, transform, TANH, SAME_ALIGNMENT, VECTOR, LANES, ""
        )


# Reads N * V logits twice, the second time from the caches, and writes them once. One program per row: it
# is the row's statistics, then its gradient, backwards: what was read last is still in the L1, most of the rest in the
# L2 where that holds the rows in flight. Ignored tokens are not read. Logits and gradient are aligned alike.
@kernel(do_not_specialize=UNSPECIALIZED, do_not_specialize_on_alignment=UNALIGNED)
def _forward_backward_kernel(
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
    scale = tl.full((), scale, ACC)
    inner = tl.full((), inner, tl.float64)
    transform = (inner, scale)
    offset = row_offset(token, num_positions, logits_misalignment, stride_logits_b, stride_logits_t)
    grad = (grad_logits_ptr, row_offset(token, num_positions, grad_misalignment, stride_grad_b, stride_grad_t))
    first, last = interior(offset, vocab_size, VECTOR)
    row = (offset, vocab_size, first, last)
    has_edges = last - first < vocab_size

    m = tl.zeros((), ACC)
    log_sum = tl.zeros((), ACC)
    logprob = tl.zeros((), ACC)
    if active:
        span = (first, last, has_edges)
        m, s, _w = _chunk_statistics(
            logits_ptr, row, span, transform, TANH, False, ACC, VECTOR, LANES, PARTS, "evict_last"
        )
        log_sum = tl.log(s)
        d = _label_distance(logits_ptr, offset, label, active, vocab_size, m, inner, TANH)
        logprob = tl.fma(d, scale, -log_sum)
    tl.store(logprobs_ptr + token, logprob)
    tl.debug_barrier()  # where the gradient overwrites the logits, every thread has read the label's
    incoming = (c, m, log_sum, None, None)
    if grad_logits_ptr.dtype.element_ty.primitive_bitwidth < logits_ptr.dtype.element_ty.primitive_bitwidth:
        _write_narrow_gradient(
            logits_ptr, row, grad, label, incoming, transform, TANH, True, VECTOR, LANES, "evict_first"
        )
    else:
        span = (last * 0, last - first, has_edges)
        _write_gradient(
            logits_ptr, row, grad, span, label, incoming, transform, TANH, True, VECTOR, LANES, "evict_first"
        )
