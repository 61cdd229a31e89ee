"""conspo::token_logprob: log-probability of each token's label, optionally with the entropy of its distribution."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..backends.registry import backend_for
from ..values import LogitRows, LogitTransform, Statistics, Upstream
from .ranks import local_labels, statistics_over_ranks
from .registration import device_guard, no_second_derivative, op, traced


def statistics_like(logits: Tensor, labels: Tensor, with_entropy: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The results of an op that returns statistics: shaped like labels, the entropy empty unless asked for."""
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    logprobs, entropy, row_max, log_sum = (logits.new_empty(labels.shape, dtype=dtype) for _ in range(4))
    return logprobs, entropy if with_entropy else logprobs.new_empty(0), row_max, log_sum


def tensors_of(statistics: Statistics) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As an op returns them: tensors, and no tensor twice."""
    logprobs, entropy, row_max, log_sum = statistics
    return logprobs, logprobs.new_empty(0) if entropy is None else entropy, row_max, log_sum


def _fake(
    logits: Tensor, labels: Tensor, transform: list[float], with_entropy: bool, *_: object
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return statistics_like(logits, labels, with_entropy)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, labels, ctx.transform, with_entropy, ctx.inplace_backward, ctx.implementation, start, group = inputs
    if group:
        labels = local_labels(labels, start, logits.shape[-1])
    _logprobs, entropy, row_max, log_sum = output
    ctx.save_for_backward(logits, labels, row_max, log_sum, entropy)
    ctx.mark_non_differentiable(row_max, log_sum, *(() if with_entropy else (entropy,)))
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None, *_: object) -> tuple[Any, ...]:
    others = (None,) * 7
    if not ctx.needs_input_grad[0] or (grad_logprobs is None and grad_entropy is None):
        return None, *others
    logits, labels, row_max, log_sum, entropy = ctx.saved_tensors
    if grad_logprobs is None:
        grad_logprobs = torch.zeros_like(row_max)
    upstream = [grad_logprobs] if grad_entropy is None else [grad_logprobs, grad_entropy]
    arguments = (labels, [row_max, log_sum, entropy], upstream, ctx.transform, ctx.implementation)
    if not ctx.inplace_backward or traced(logits):
        return token_logprob_backward(logits, *arguments), *others
    # The op counts as a modification of the logits: autograd raises in any other backward that saved them.
    token_logprob_backward_(logits, *arguments)
    return logits.detach(), *others


@op(_fake, setup_context=_setup_context, backward=_backward)
def token_logprob(
    logits: Tensor,
    labels: Tensor,
    transform: list[float],
    with_entropy: bool,
    inplace_backward: bool,
    implementation: str,
    vocab_start: int,
    vocab_group: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probabilities, entropy (empty unless asked for) and the statistics (max, log-sum) that backward needs.

    Args:
        logits: [B, T, V], last stride 1.
        labels: [B, T] int64, an index or `IGNORED`.
        transform: a `LogitTransform`.
        inplace_backward: read by backward only: the gradient overwrites `logits`.
        vocab_group: name of the ranks that the vocabulary is spread over, of which this one's part begins at
            `vocab_start`; "": it is whole.

    Returns:
        logprobs, entropy, row_max, log_sum: [B, T] fp32, or fp64 for fp64 logits; 0 where ignored.
    """
    del inplace_backward
    kernels = backend_for(implementation, logits.device).token_logprob
    logit_transform = LogitTransform.from_numbers(transform)

    def forward(labels: Tensor) -> Statistics:
        with device_guard(logits):
            return kernels.forward(LogitRows(logits, labels.contiguous(), logit_transform), with_entropy)

    if not vocab_group:
        return tensors_of(forward(labels))
    size, scale = logits.shape[-1], logit_transform.scale
    return tensors_of(statistics_over_ranks(forward, labels, vocab_start, size, scale, vocab_group))


def _fake_backward(logits: Tensor, *_: object) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


@op(_fake_backward, backward=no_second_derivative)
def token_logprob_backward(
    logits: Tensor,
    labels: Tensor,
    statistics: list[Tensor],
    upstream: list[Tensor],
    transform: list[float],
    implementation: str,
) -> Tensor:
    """The gradient with respect to the logits, in a new contiguous tensor.

    statistics: max, log-sum and entropy (empty unless its gradient comes in).  upstream: the gradients of the
    log-probabilities and, if there is one, of the entropies.
    """
    grad_logits = torch.empty_like(logits, memory_format=torch.contiguous_format)
    rows = LogitRows(logits, labels.contiguous(), LogitTransform.from_numbers(transform))
    _write_gradient(grad_logits, rows, statistics, upstream, implementation)
    return grad_logits


def _fake_inplace(*_: object) -> None:
    return None


@op(_fake_inplace, mutates=("logits",))
def token_logprob_backward_(
    logits: Tensor,
    labels: Tensor,
    statistics: list[Tensor],
    upstream: list[Tensor],
    transform: list[float],
    implementation: str,
) -> None:
    """`token_logprob_backward`, with the gradient written over the logits."""
    rows = LogitRows(logits, labels.contiguous(), LogitTransform.from_numbers(transform))
    _write_gradient(logits, rows, statistics, upstream, implementation)


def _write_gradient(
    grad_logits: Tensor, rows: LogitRows, statistics: list[Tensor], upstream: list[Tensor], implementation: str
) -> None:
    row_max, log_sum, entropy = statistics
    incoming = Upstream(*(x.contiguous() for x in upstream))
    saved = Statistics(row_max, None if incoming.entropy is None else entropy, row_max, log_sum)
    with device_guard(rows.logits):
        backend_for(implementation, rows.logits.device).token_logprob.backward(grad_logits, rows, saved, incoming)
