"""conspo::token_logprob: log-probability of each token's label, optionally with the entropy of its distribution."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..backends.registry import backend_for
from ..values import Incoming, LogitRows, LogitTransform, Statistics, accumulated, local_labels
from .ranks import statistics_over_ranks
from .registration import op, saved_tensors, traced


def statistics_like(logits: Tensor, labels: Tensor, with_entropy: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The results of an op that returns statistics: shaped like labels, the entropy empty unless asked for."""
    dtype = accumulated(logits.dtype)
    logprobs, entropy, row_max, log_sum = (logits.new_empty(labels.shape, dtype=dtype) for _ in range(4))
    return logprobs, entropy if with_entropy else logprobs.new_empty(0), row_max, log_sum


def tensors_of(statistics: Statistics) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As an op returns them: tensors, and no tensor twice."""
    logprobs, entropy, row_max, log_sum = statistics
    return logprobs, logprobs.new_empty(0) if entropy is None else entropy, row_max, log_sum


def _save(ctx: Any, it: Any, output: tuple[Tensor, ...]) -> None:
    ctx.transform, ctx.inplace_backward, ctx.implementation = it.transform, it.inplace_backward, it.implementation
    labels = local_labels(it.labels, it.vocab_start, it.logits.shape[-1]) if it.vocab_group else it.labels
    _logprobs, entropy, row_max, log_sum = output
    ctx.save_for_backward(it.logits, labels, row_max, log_sum, entropy)
    ctx.mark_non_differentiable(row_max, log_sum, *(() if it.with_entropy else (entropy,)))
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None, *_: object) -> dict[str, Any]:
    if not ctx.needs_input_grad[0] or (grad_logprobs is None and grad_entropy is None):
        return {}
    logits, labels, row_max, log_sum, entropy = saved_tensors(ctx)
    # The op in place counts as a modification of the logits: autograd raises in any other backward that saved them.
    overwrites = ctx.inplace_backward and not traced(logits)
    run = token_logprob_backward_ if overwrites else token_logprob_backward
    gradient = run(
        logits=logits,
        labels=labels,
        row_max=row_max,
        log_sum=log_sum,
        entropy=None if grad_entropy is None else entropy,
        grad_logprobs=torch.zeros_like(row_max) if grad_logprobs is None else grad_logprobs,
        grad_entropy=grad_entropy,
        transform=ctx.transform,
        implementation=ctx.implementation,
    )
    return {"logits": logits.detach() if gradient is None else gradient}


@op(lambda it: statistics_like(it.logits, it.labels, it.with_entropy), save=_save, backward=_backward)
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
    backend = backend_for(implementation, logits.device)
    vocab_size, logit_transform = logits.shape[-1], LogitTransform(*transform)
    local = local_labels(labels, vocab_start, vocab_size) if vocab_group else labels
    statistics = backend.token_logprob_forward(LogitRows(logits, local.contiguous(), logit_transform), with_entropy)
    if vocab_group:
        scale = logit_transform.scale
        statistics = statistics_over_ranks(statistics, labels, local, vocab_start, vocab_size, scale, vocab_group)
    return tensors_of(statistics)


def _fake_backward(it: Any) -> Tensor:
    return torch.empty_like(it.logits, memory_format=torch.contiguous_format)


@op(_fake_backward)
def token_logprob_backward(
    logits: Tensor,
    labels: Tensor,
    row_max: Tensor,
    log_sum: Tensor,
    entropy: Tensor | None,
    grad_logprobs: Tensor,
    grad_entropy: Tensor | None,
    transform: list[float],
    implementation: str,
) -> Tensor:
    """The gradient with respect to the logits, in a new contiguous tensor.

    row_max, log_sum, entropy: of forward; the last is needed with `grad_entropy` only.
    """
    gradient = torch.empty_like(logits, memory_format=torch.contiguous_format)
    rows = LogitRows(logits, labels.contiguous(), LogitTransform(*transform))
    incoming = incoming_of(row_max, log_sum, entropy, grad_logprobs, grad_entropy)
    backend_for(implementation, logits.device).token_logprob_backward(gradient, rows, incoming)
    return gradient


@op(lambda _: None, mutates=("logits",))
def token_logprob_backward_(
    logits: Tensor,
    labels: Tensor,
    row_max: Tensor,
    log_sum: Tensor,
    entropy: Tensor | None,
    grad_logprobs: Tensor,
    grad_entropy: Tensor | None,
    transform: list[float],
    implementation: str,
) -> None:
    """`token_logprob_backward`, with the gradient written over the logits."""
    rows = LogitRows(logits, labels.contiguous(), LogitTransform(*transform))
    incoming = incoming_of(row_max, log_sum, entropy, grad_logprobs, grad_entropy)
    backend_for(implementation, logits.device).token_logprob_backward(logits, rows, incoming)


def incoming_of(
    row_max: Tensor, log_sum: Tensor, entropy: Tensor | None, grad_logprobs: Tensor, grad_entropy: Tensor | None
) -> Incoming:
    """As kernels take them: the gradients that autograd hands in may have any strides."""
    grad_entropy = None if grad_entropy is None else grad_entropy.contiguous()
    return Incoming(row_max, log_sum, grad_logprobs.contiguous(), entropy, grad_entropy)
