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
def capped(z, inner):
    """u = tanh(z * inner) and du/dz; -inf, a masked vocabulary entry, stays -inf with slope 0."""
    x = z * inner
    t = tl.exp2(tl.abs(x) * (-2 * LOG2_E))
    u = (1 - t) / (1 + t)
    u = tl.where(x < 0, -u, u)
    # 1 - t cancels for small x, and a large softcap multiplies what is lost: there the Taylor series through x^13.
    x2 = x * x
    series = x2 * (-1382 / 155925 + x2 * (21844 / 6081075))
    series = x2 * (-1 / 3 + x2 * (2 / 15 + x2 * (-17 / 315 + x2 * (62 / 2835) + x2 * series)))
    small: tl.constexpr = 0.03 if z.dtype == tl.float64 else 0.3
    u = tl.where(tl.abs(x) < small, x + x * series, u)
    return tl.where(z == NEG_INF, NEG_INF, u), 4 * t / ((1 + t) * (1 + t)) * inner


@triton.jit
def finite_max(m):
    """A maximum that may be subtracted: 0 where everything so far was -inf, which would give -inf - -inf = NaN."""
    return tl.where(m == NEG_INF, tl.zeros_like(m), m)


@triton.jit
def _moment(e, d):
    """e * d with 0 * -inf = 0: what a masked vocabulary entry adds to the entropy."""
    return tl.where(e > 0, e * d, tl.zeros_like(d))


@triton.jit
def fold(m, s, w, u, scale2, HAS_ENTROPY: tl.constexpr):
    """Fold a tile u [LANES, VECTOR] into the lanes' running statistics."""
    m_new = tl.maximum(m, tl.max(u, axis=1))
    base = finite_max(m_new)
    d_old = (m - base) * scale2
    decay = tl.exp2(d_old)
    d = (u - base[:, None]) * scale2
    e = tl.exp2(d)
    if HAS_ENTROPY:
        w = decay * w + _moment(decay * s, d_old) + tl.sum(_moment(e, d), axis=1)
    s = decay * s + tl.sum(e, axis=1)
    return m_new, s, w


@triton.jit
def merge(m, s, w, scale2, AXIS: tl.constexpr, HAS_ENTROPY: tl.constexpr):
    """Merge partial statistics along an axis into one, in a fixed order."""
    m_all = tl.max(m, axis=AXIS)
    base = finite_max(m_all)
    d = (m - tl.expand_dims(base, AXIS)) * scale2
    decay = tl.exp2(d)
    if HAS_ENTROPY:
        w_all = tl.sum(decay * w + _moment(decay * s, d), axis=AXIS)
    else:
        w_all = tl.zeros_like(m_all)
    return m_all, tl.sum(decay * s, axis=AXIS), w_all


@triton.jit
def grad_tile(
    z, is_label, c, h, m, log_sum, entropy, inner, scale, HAS_SOFTCAP: tl.constexpr, HAS_ENTROPY: tl.constexpr
):  # fmt: skip
    """c * dlogp[label]/dz + h * dH/dz for a tile of logits z."""
    if HAS_SOFTCAP:
        u, slope = capped(z, inner)
    else:
        u = z
    log2_p = (u - m) * (scale * LOG2_E) - log_sum * LOG2_E
    p = tl.exp2(log2_p)
    g = tl.where(is_label, c, tl.zeros_like(z)) - c * p
    if HAS_ENTROPY:
        g -= h * (_moment(p, log2_p) * LN_2 + p * entropy)
    g *= scale
    if HAS_SOFTCAP:
        g *= slope
    return g
