"""Token log-probabilities over the vocabulary, forward and backward: PyTorch.

Rows are taken a few at a time, so that the working set stays a few copies of `CHUNK_ELEMENTS` numbers whatever N is.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ...values import IGNORED, LogitRows, LogitTransform, Statistics, Upstream

CHUNK_ELEMENTS = 1 << 21


def _row_chunks(keep: Tensor, vocab_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Positions (b, t) of the tokens to keep, a chunk of rows at a time; of all tokens on a GPU."""
    if _can_choose(keep):
        tokens = keep.flatten().nonzero()[:, 0]
    else:
        tokens = torch.arange(keep.numel(), device=keep.device)
    for chunk in tokens.split(max(1, CHUNK_ELEMENTS // vocab_size)):
        yield chunk // keep.shape[1], chunk % keep.shape[1]


def _can_choose(keep: Tensor) -> bool:
    """Whether the number of tokens to keep is known without a synchronisation."""
    return keep.device.type == "cpu"


def _transformed(z: Tensor, transform: LogitTransform) -> tuple[Tensor, Tensor | float]:
    """u and du/dz of `LogitTransform`; -inf, a masked vocabulary entry, stays -inf with slope 0."""
    if transform.softcap is None:
        return z, 1.0
    u = torch.tanh(z * transform.inner)
    return torch.where(z == -torch.inf, z, u), (1 - u * u) * transform.inner


def _moment(p: Tensor, log_p: Tensor) -> Tensor:
    """p * log p with 0 * -inf = 0."""
    return torch.where(p > 0, p * log_p, 0.0)


def forward(rows: LogitRows, with_entropy: bool, out: Statistics | None = None) -> Statistics:
    """Statistics, each [B, T]."""
    logits, labels, transform, _start = rows
    acc = torch.float64 if logits.dtype == torch.float64 else torch.float32
    vocab_size = logits.shape[-1]
    logprobs, row_max, log_sum = (torch.zeros(labels.shape, dtype=acc, device=logits.device) for _ in range(3))
    entropy = torch.zeros_like(logprobs) if with_entropy else None
    active = labels != IGNORED
    for chunk in _row_chunks(active, vocab_size):
        u, _ = _transformed(logits[chunk].to(acc), transform)
        m = u.amax(-1)
        d = (u - torch.where(m == -torch.inf, 0.0, m)[:, None]) * transform.scale
        e = d.exp()
        s = e.sum(-1)
        ls = s.log()
        label = labels[chunk]
        inside = (label >= 0) & (label < vocab_size)
        label_d = d.gather(1, label.clamp(0, vocab_size - 1)[:, None])[:, 0]
        values = [(logprobs, torch.where(inside, label_d, torch.nan) - ls), (row_max, m), (log_sum, ls)]
        if entropy is not None:
            values.append((entropy, ls - _moment(e, d).sum(-1) / s))
        for result, value in values:
            result[chunk] = torch.where(active[chunk], value, 0.0)
    found = Statistics(logprobs, entropy, row_max, log_sum)
    return found if out is None else found.copied_to(out)


def backward(grad_logits: Tensor, rows: LogitRows, statistics: Statistics, upstream: Upstream) -> None:
    """Write the gradient of forward's outputs into `grad_logits` [B, T, V], which may be the logits themselves."""
    logits, labels, transform = rows.logits, rows.labels_in_slice(), rows.transform
    grad_logprobs, grad_entropy = upstream
    _logprobs, entropy, row_max, log_sum = statistics
    acc, vocab_size = row_max.dtype, logits.shape[-1]
    active = labels != IGNORED
    coefficient_bt = torch.where(active, grad_logprobs, 0.0)
    nonzero = coefficient_bt != 0
    if grad_entropy is not None:
        entropy_coefficient_bt = torch.where(active, grad_entropy, 0.0)
        nonzero |= entropy_coefficient_bt != 0
    if _can_choose(nonzero):
        for chunk in _row_chunks(~nonzero, vocab_size):
            grad_logits[chunk] = 0.0
    for chunk in _row_chunks(nonzero, vocab_size):
        u, slope = _transformed(logits[chunk].to(acc), transform)
        coefficient = coefficient_bt[chunk][:, None]
        log_p = (u - row_max[chunk][:, None]) * transform.scale - log_sum[chunk][:, None]
        p = log_p.exp()
        g = -coefficient * p
        label = labels[chunk][:, None]
        inside = (label >= 0) & (label < vocab_size)
        g.scatter_add_(1, label.clamp(0, vocab_size - 1), torch.where(inside, coefficient, 0.0))
        if grad_entropy is not None:
            assert entropy is not None
            g -= entropy_coefficient_bt[chunk][:, None] * (_moment(p, log_p) + p * entropy[chunk][:, None])
        g *= transform.scale
        g *= slope
        grad_logits[chunk] = torch.where(nonzero[chunk][:, None], g, 0.0).to(grad_logits.dtype)


def forward_backward(grad_logits: Tensor, rows: LogitRows, coefficients: Tensor, out: Tensor | None = None) -> Tensor:
    """logprobs [B, T], and into `grad_logits` (perhaps the logits) the gradient of sum(coefficients * logprobs)."""
    statistics = forward(rows, with_entropy=False)
    backward(grad_logits, rows, statistics, Upstream(coefficients))
    return statistics.logprobs if out is None else out.copy_(statistics.logprobs)
