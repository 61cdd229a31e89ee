"""The arithmetic of a softmax over pieces of a row: running statistics, their merge, and the gradient of a piece.

With u = z, or tanh(z * inner) where there is a softcap, and `scale` the constant factor behind it (`LogitTransform`), a
row's statistics are m = max u, s = sum 2^d and, for the entropy, w = sum d * 2^d, with d = (u - m) * scale2 and
scale2 = scale * log2 e.
"""

import triton
import triton.language as tl

NEG_INF = tl.constexpr(float("-inf"))
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def capped(z, inner, TANH: tl.constexpr):
    """u = tanh(z * inner), inner in fp64, but -inf, a masked vocabulary entry, stays -inf. Without a softcap z."""
    if TANH is None:
        return z
    else:
        u, _slope = tanh(z, inner, TANH)
        return tl.where(z == NEG_INF, NEG_INF, u)


@triton.jit
def tanh(z, inner, TANH: tl.constexpr):
    """u = tanh(x) for x = z * inner, inner in fp64, and (du/dz) / (4 * inner), which is 0 at -inf.

    With t = exp(-2 |x|) and r = -1 / (1 + t), |u| = (t - 1) r; the slope 4 t r^2 keeps its digits where u saturates.
    TANH: "short" is wrong by about 1e-7 everywhere, "series" by a relative 1e-7; `LogitTransform.tanh` chooses.
    """
    t = tl.exp2(tl.abs(z) * (inner * (-2 * LOG2_E)).to(z.dtype))
    if z.dtype == tl.float64:
        r = -1 / (1 + t)
        u = (t - 1) * r
        u = tl.where(z < 0, -u, u)
    else:
        r = _minus_reciprocal(t)
        sign = z.to(tl.int32, bitcast=True) & -0x80000000
        u = (((t - 1) * r).to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)
    if TANH == "series":
        # 1 - t cancels for small x, and a large softcap multiplies what is lost: there the Taylor series through x^13.
        x = z * inner.to(z.dtype)
        small: tl.constexpr = 0.03 if z.dtype == tl.float64 else 0.3
        u = tl.where(tl.abs(x) < small, _tanh_series(x), u)
    return u, t * r * r


@triton.jit
def _tanh_series(x):
    """tanh(x) for small x. `tl.fma` takes a Python number as fp32, whatever its other operands are: hence `_number`."""
    x2 = x * x
    series = tl.fma(tl.fma(x2, _number(21844 / 6081075, x), _number(-1382 / 155925, x)), x2, _number(62 / 2835, x))
    series = tl.fma(tl.fma(series, x2, _number(-17 / 315, x)), x2, _number(2 / 15, x))
    return tl.fma(x, tl.fma(series, x2, _number(-1 / 3, x)) * x2, x)


@triton.jit
def _number(value: tl.constexpr, like):
    """A constant in the dtype of `like`."""
    return tl.full((), value, like.dtype)


@triton.jit
def _minus_reciprocal(t):
    """-1 / (1 + t) in fp32 for t in [0, 1], by multiply-adds: exponentials have filled the pipe that divides.

    First the cubic r with the least relative error, e = 1 + (1 + t) r = T4(2t - 1) / 577; then a step that leaves
    e^3 < 6e-9. In e, 1 + r is exact and t * r not rounded. The multiply-adds are asked for by name, so that all kernels
    find the same bits.
    """
    r = tl.fma(tl.fma(tl.fma(t, 128 / 577, -384 / 577), t, 544 / 577), t, -576 / 577)
    e = tl.fma(t, r, 1 + r)
    return tl.fma(r, tl.fma(e, e, e), r)


@triton.jit
def finite_max(m):
    """A maximum that may be subtracted: 0 where everything so far was -inf, which would give -inf - -inf = NaN."""
    return tl.where(m == NEG_INF, tl.zeros_like(m), m)


@triton.jit
def _moment(e, d):
    """e * d with 0 * -inf = 0, what a masked vocabulary entry adds to the entropy: no d with e > 0 is that small."""
    return e * tl.maximum(d, -1e30)


@triton.jit
def _rounded(a, b):
    """a * b, which no compiler fuses with a sum."""
    return tl.fma(a, b, tl.zeros_like(a))


@triton.jit
def fold(m, s, w, u, scale2, HAS_ENTROPY: tl.constexpr):
    """Fold a tile u [PARTS * LANES, VECTOR] into the running statistics [LANES].

    The parts, a lane's vectors, share one maximum: so there is one rescaling of s for all of them.
    """
    PARTS: tl.constexpr = u.shape[0] // m.shape[0]
    u = tl.reshape(u, (PARTS, m.shape[0], u.shape[1]))
    m_new = tl.maximum(m, tl.max(tl.max(u, axis=2), axis=0))
    base = finite_max(m_new)
    d_old = (m - base) * scale2
    decay = tl.exp2(d_old)
    d = (u - base[None, :, None]) * scale2
    e = tl.exp2(d)
    if HAS_ENTROPY:
        w = decay * w + _moment(decay * s, d_old) + tl.sum(tl.sum(_moment(e, d), axis=2), axis=0)
    s = decay * s + tl.sum(tl.sum(e, axis=2), axis=0)
    return m_new, s, w


@triton.jit
def merge(m, s, w, scale2, AXIS: tl.constexpr, HAS_ENTROPY: tl.constexpr):
    """Merge partial statistics along an axis into one, in a fixed order.

    Every lane of a warp has the sum over the warp, and from Triton 3.8 on every one stores it. Were a product fused
    with the sum, each lane would have its own product unrounded, and its own last bit: hence `_rounded`.
    """
    m_all = tl.max(m, axis=AXIS)
    base = finite_max(m_all)
    d = (m - tl.expand_dims(base, AXIS)) * scale2
    decay = tl.exp2(d)
    s = _rounded(decay, s)
    if HAS_ENTROPY:
        w_all = tl.sum(tl.fma(decay, w, _rounded(s, tl.maximum(d, -1e30))), axis=AXIS)
    else:
        w_all = tl.zeros_like(m_all)
    return m_all, tl.sum(s, axis=AXIS), w_all


@triton.jit
def label_mask(label_lane, start, WIDE, VECTOR, LANES):
    """Which vector of the tile at `start` has the label, and which of its entries that is, in all tiles the same one.

    Apart, they are a comparison per vector, and one per entry that is made once: not one per logit. Where stores are
    narrow a thread has entries of many vectors, and each is compared.
    """
    if WIDE:
        entry = (label_lane & (VECTOR - 1)).to(tl.int32)
        vector = (label_lane - start).to(tl.int32) - entry
        return tl.arange(0, LANES)[:, None] * VECTOR == vector, tl.arange(0, VECTOR)[None, :] == entry
    else:
        lanes = tl.arange(0, LANES)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
        is_label = lanes == (label_lane - start).to(tl.int32)
        return is_label, is_label


@triton.jit
def grad_tile(z, is_label, incoming, transform, TANH: tl.constexpr):
    """The gradient by a tile of logits z: c * dlogp[label]/dz + h * dentropy/dz.

    is_label: as of `label_mask`.
    incoming: (c, m, log_sum, h, entropy), c and h the gradients of the row's log-probability and of its entropy; the
    last two are None without an entropy.  transform: (inner, scale).
    """
    c, m, log_sum, h, entropy = incoming
    inner, scale = transform
    if TANH is not None:
        u, slope = tanh(z, inner, TANH)
        factor = (scale * inner * 4).to(z.dtype)
    else:
        u = z
        factor = scale
    c *= factor
    log2_p = (u - m) * (scale * LOG2_E) - log_sum * LOG2_E
    p = tl.exp2(log2_p)
    is_vector, is_entry = is_label
    g = tl.where(is_vector, tl.where(is_entry, c, tl.zeros_like(c)), tl.zeros_like(z)) - c * p
    if h is not None:
        g -= h * factor * (_moment(p, log2_p) * LN_2 + p * entropy)
    if TANH is not None:
        g *= slope
    return g
