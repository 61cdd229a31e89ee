"""The functions of `contract.Backend` in PyTorch, for any device: implementation="torch".

Rows of logits are taken a few at a time, so that the working set stays a few copies of `CHUNK_ELEMENTS` numbers
whatever N is.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..objective import infonce as infonce
from ..values import ELSEWHERE, IGNORED, Incoming, LogitRows, LogitTransform, Statistics, accumulated, response_counts

CHUNK_ELEMENTS = 1 << 21


def obstacle(device: torch.device) -> str | None:
    return None


def token_logprob_forward(rows: LogitRows, with_entropy: bool, out: Statistics | None = None) -> Statistics:
    logits, labels, transform, _start = rows
    acc, vocab_size = accumulated(logits.dtype), logits.shape[-1]
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


def token_logprob_backward(grad_logits: Tensor, rows: LogitRows, incoming: Incoming) -> None:
    logits, labels, transform = rows.logits, rows.labels_in_slice(), rows.transform
    row_max, log_sum, grad_logprobs, entropy, grad_entropy = incoming
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


def token_logprob_forward_backward(
    grad_logits: Tensor, rows: LogitRows, coefficients: Tensor, out: Tensor | None = None
) -> Tensor:
    statistics = token_logprob_forward(rows, with_entropy=False)
    token_logprob_backward(grad_logits, rows, statistics.incoming(coefficients))
    return statistics.logprobs if out is None else out.copy_(statistics.logprobs)


def _row_chunks(mask: Tensor, vocab_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Positions (b, t) of the tokens where `mask` is true, a chunk of rows at a time; of all tokens on a GPU."""
    if _can_choose(mask):
        tokens = mask.flatten().nonzero()[:, 0]
    else:
        tokens = torch.arange(mask.numel(), device=mask.device)
    for chunk in tokens.split(max(1, CHUNK_ELEMENTS // vocab_size)):
        yield chunk // mask.shape[1], chunk % mask.shape[1]


def _can_choose(mask: Tensor) -> bool:
    """Whether the number of these tokens is known without a synchronisation."""
    return mask.device.type == "cpu"


def _transformed(z: Tensor, transform: LogitTransform) -> tuple[Tensor, Tensor | float]:
    """u and du/dz of `LogitTransform`; -inf, a masked vocabulary entry, stays -inf with slope 0."""
    if transform.softcap is None:
        return z, 1.0
    u = torch.tanh(z * transform.inner)
    return torch.where(z == -torch.inf, z, u), (1 - u * u) * transform.inner


def _moment(p: Tensor, log_p: Tensor) -> Tensor:
    """p * log p with 0 * -inf = 0."""
    return torch.where(p > 0, p * log_p, 0.0)


def sequence_score_forward(logprobs: Tensor, labels: Tensor, offsets: Tensor | None) -> tuple[Tensor, Tensor]:
    active = labels != IGNORED
    segments = _segments(active, offsets)

    def total(values: Tensor) -> Tensor:
        # One after another: in fp32 the mean of 32,768 equal log-probabilities would be off by 3e-4 of itself.
        flat = values.flatten().double()
        return torch.segment_reduce(flat, "sum", offsets=segments, initial=0, unsafe=True)

    counts = total(active)
    scores = (total(torch.where(active, logprobs, 0.0)) / counts).to(logprobs.dtype)
    return torch.where(counts > 0, scores, torch.nan), counts.to(torch.int32)


def sequence_score_backward(
    weights: Tensor, counts: Tensor, labels: Tensor, offsets: Tensor | None, factor: Tensor | None = None
) -> Tensor:
    active = labels != IGNORED
    grad_scores = weights if factor is None else scaled(weights, factor)
    per_token = torch.where(counts > 0, grad_scores / counts, 0.0)
    per_token = torch.cat([per_token, per_token.new_zeros(1)])
    index = _token_segments(_segments(active, offsets), labels.numel()).view(labels.shape)
    return torch.where(active, per_token[index], 0.0)


def token_coefficients(weights: Tensor, labels: Tensor, offsets: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    counts = response_counts(labels, offsets)
    at_tokens = sequence_score_backward(weights, counts, labels, offsets)
    return at_tokens, counts, torch.where(at_tokens != 0, labels, IGNORED)


def masked_coefficients(coefficients: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    at_tokens = torch.where(labels == IGNORED, 0.0, coefficients)
    return at_tokens, torch.where(at_tokens != 0, labels, IGNORED)


def weighted_sum(values: Tensor, weights: Tensor, counts: Tensor | None) -> Tensor:
    unused = weights == 0
    if counts is not None:
        unused |= counts <= 0
    return torch.where(unused, 0.0, weights * values).sum()


def _segments(active: Tensor, offsets: Tensor | None) -> Tensor:
    """[S+1] offsets into the flattened tokens; padded rows are segments of one length.

    Those on an accelerator were not checked, and must not be followed out of the tensor.
    """
    if offsets is not None:
        return offsets.long().clamp(0, active.numel()).cummax(0).values
    num_rows, num_positions = active.shape
    return torch.arange(num_rows + 1, device=active.device) * num_positions


def _token_segments(offsets: Tensor, num_tokens: int) -> Tensor:
    """The segment of every token; S for tokens past the last offset."""
    return torch.searchsorted(offsets[1:].contiguous(), torch.arange(num_tokens, device=offsets.device), right=True)


def scaled(weights: Tensor, factor: Tensor) -> Tensor:
    """A weight of zero takes no part: an infinite or NaN factor must not reach it as NaN."""
    return torch.where(weights == 0, 0.0, weights * factor)


def is_one(factor: Tensor) -> bool:
    """Whether a factor is 1, as the gradient of a loss mostly is. On a GPU nobody looks: that would wait."""
    return factor.is_cpu and factor.item() == 1


def align(labels: Tensor, response_mask: Tensor | None, offsets: Tensor | None, shift: bool, absent: int) -> Tensor:
    user_labels = labels.long()  # a narrower type may not hold `absent`: -100 is 156 in uint8
    active = user_labels != absent
    if response_mask is not None:
        active &= response_mask != 0
    aligned = torch.where(active, torch.where(user_labels < 0, ELSEWHERE, user_labels), IGNORED)
    if shift:
        aligned = _next_labels(aligned, offsets)
    if offsets is not None:
        position = torch.arange(aligned.shape[1], device=aligned.device)
        aligned = torch.where((position >= offsets[0]) & (position < offsets[-1]), aligned, IGNORED)
    return aligned


def _next_labels(labels: Tensor, offsets: Tensor | None) -> Tensor:
    """Position t gets the label of t + 1; the last position of a sequence has none."""
    shifted = torch.full_like(labels, IGNORED)
    shifted[:, :-1] = labels[:, 1:]
    if offsets is None or labels.shape[1] == 0:
        return shifted
    # Where a later sequence begins, the position before ends one. An offset of 0 (nothing before it) or past the last
    # token lands on the last token, which has no successor anyway.
    ends = torch.where((offsets > 0) & (offsets < labels.shape[1]), offsets - 1, labels.shape[1] - 1)
    return shifted.index_fill(1, ends.long(), IGNORED)


def scale_(gradient: Tensor, factor: Tensor) -> None:
    if not is_one(factor):
        gradient.mul_(factor)
