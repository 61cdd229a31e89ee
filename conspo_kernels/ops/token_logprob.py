"""conspo::token_logprob: log-probability of each token's label, optionally with the entropy of its distribution."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.linear_tiles import IGNORED
from ..kernels.transform import LogitTransform
from .derivative import no_second_derivative
from .implementation import twin
from .ranks import labels_here, statistics_of_all


def check_labels(labels: Tensor, ignore_index: int, vocab_size: int) -> None:
    """Labels are values: they are looked at where that costs no synchronisation, on the CPU."""
    if labels.device.type != "cpu":
        return
    bad = (labels != ignore_index) & ((labels < 0) | (labels >= vocab_size))
    if bad.any():
        position = tuple(bad.nonzero()[0].tolist())
        raise ValueError(
            f"labels must lie in [0, {vocab_size}) or equal ignore_index ({ignore_index}); "
            f"found {labels[position].item()} at token {position}"
        )


@torch.library.custom_op("conspo::token_logprob", mutates_args=())
def token_logprob(
    logits: Tensor,
    labels: Tensor,
    ignore_index: int,
    temperature: float,
    logit_scale: float,
    softcap: float | None,
    with_entropy: bool,
    inplace_backward: bool,
    implementation: str,
    vocab_start: int = 0,
    vocab_group: str = "",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probabilities, entropy (empty unless asked for) and the statistics (max, log-sum) that backward needs.

    Args:
        logits: [B, T, V], last stride 1.
        labels: [B, T] integers.
        inplace_backward: read by backward only: the gradient overwrites `logits`.
        vocab_group: name of the ranks that the vocabulary is spread over, of which this one's part begins at
            `vocab_start`; "": it is whole.

    Returns:
        logprobs, entropy, row_max, log_sum: [B, T] fp32, or fp64 for fp64 logits; 0 where ignored.
    """
    del inplace_backward
    transform = LogitTransform(temperature, logit_scale, softcap)
    kernels = twin("token_logprob", implementation, logits.device)

    def forward(labels: Tensor, ignore_index: int) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        with torch.cuda.device_of(logits):
            return kernels.forward(logits, labels.contiguous(), ignore_index, transform, with_entropy)

    if vocab_group:
        logprobs, entropy, row_max, log_sum = statistics_of_all(
            forward, labels, ignore_index, vocab_start, logits.shape[-1], transform.scale, vocab_group
        )
    else:
        check_labels(labels, ignore_index, logits.shape[-1])
        logprobs, entropy, row_max, log_sum = forward(labels, ignore_index)
    return logprobs, logprobs.new_empty(0) if entropy is None else entropy, row_max, log_sum


@token_logprob.register_fake
def _(
    logits: Tensor,
    labels: Tensor,
    ignore_index: int,
    temperature: float,
    logit_scale: float,
    softcap: float | None,
    with_entropy: bool,
    inplace_backward: bool,
    implementation: str,
    vocab_start: int = 0,
    vocab_group: str = "",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    logprobs, entropy, row_max, log_sum = (logits.new_empty(labels.shape, dtype=dtype) for _ in range(4))
    return logprobs, entropy if with_entropy else logprobs.new_empty(0), row_max, log_sum


@torch.library.custom_op("conspo::token_logprob_backward", mutates_args=())
def token_logprob_backward(
    logits: Tensor,
    labels: Tensor,
    row_max: Tensor,
    log_sum: Tensor,
    entropy: Tensor,
    grad_logprobs: Tensor,
    grad_entropy: Tensor | None,
    ignore_index: int,
    temperature: float,
    logit_scale: float,
    softcap: float | None,
    implementation: str,
) -> Tensor:
    """The gradient with respect to the logits, in a new contiguous tensor."""
    grad_logits = torch.empty_like(logits, memory_format=torch.contiguous_format)
    _write_gradient(
        grad_logits, logits, labels, row_max, log_sum, entropy, grad_logprobs, grad_entropy,
        ignore_index, temperature, logit_scale, softcap, implementation,
    )  # fmt: skip
    return grad_logits


@token_logprob_backward.register_fake
def _(
    logits: Tensor,
    labels: Tensor,
    row_max: Tensor,
    log_sum: Tensor,
    entropy: Tensor,
    grad_logprobs: Tensor,
    grad_entropy: Tensor | None,
    ignore_index: int,
    temperature: float,
    logit_scale: float,
    softcap: float | None,
    implementation: str,
) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


@torch.library.custom_op("conspo::token_logprob_backward_", mutates_args={"logits"})
def token_logprob_backward_(
    logits: Tensor,
    labels: Tensor,
    row_max: Tensor,
    log_sum: Tensor,
    entropy: Tensor,
    grad_logprobs: Tensor,
    grad_entropy: Tensor | None,
    ignore_index: int,
    temperature: float,
    logit_scale: float,
    softcap: float | None,
    implementation: str,
) -> None:
    """The gradient with respect to the logits, written over the logits."""
    _write_gradient(
        logits, logits, labels, row_max, log_sum, entropy, grad_logprobs, grad_entropy,
        ignore_index, temperature, logit_scale, softcap, implementation,
    )  # fmt: skip


def _write_gradient(
    grad_logits: Tensor,
    logits: Tensor,
    labels: Tensor,
    row_max: Tensor,
    log_sum: Tensor,
    entropy: Tensor,
    grad_logprobs: Tensor,
    grad_entropy: Tensor | None,
    ignore_index: int,
    temperature: float,
    logit_scale: float,
    softcap: float | None,
    implementation: str,
) -> None:
    with torch.cuda.device_of(logits):
        twin("token_logprob", implementation, logits.device).backward(
            grad_logits, logits, labels.contiguous(), row_max, log_sum,
            None if grad_entropy is None else entropy,
            grad_logprobs.contiguous(), None if grad_entropy is None else grad_entropy.contiguous(),
            ignore_index, LogitTransform(temperature, logit_scale, softcap),
        )  # fmt: skip


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    logits, labels, *transform, with_entropy, ctx.inplace_backward, ctx.implementation, start, group = inputs
    if group:
        labels, transform[0] = labels_here(labels, transform[0], start, logits.shape[-1]), IGNORED
    ctx.transform = transform
    _logprobs, entropy, row_max, log_sum = output
    ctx.save_for_backward(logits, labels, row_max, log_sum, entropy)
    ctx.mark_non_differentiable(row_max, log_sum, *(() if with_entropy else (entropy,)))
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_logprobs, grad_entropy, *_):  # type: ignore[no-untyped-def]
    nothing = (None,) * 10
    if not ctx.needs_input_grad[0] or (grad_logprobs is None and grad_entropy is None):
        return None, *nothing
    logits, labels, row_max, log_sum, entropy = ctx.saved_tensors
    if grad_logprobs is None:
        grad_logprobs = torch.zeros_like(row_max)
    arguments = (logits, labels, row_max, log_sum, entropy, grad_logprobs, grad_entropy)
    if not ctx.inplace_backward:
        return token_logprob_backward(*arguments, *ctx.transform, ctx.implementation), *nothing
    # The op counts as a modification of the logits, so that whoever saved them, a second backward too, is told by
    # autograd.
    token_logprob_backward_(*arguments, *ctx.transform, ctx.implementation)
    return logits.detach(), *nothing


token_logprob.register_autograd(_backward, setup_context=_setup_context)


token_logprob_backward.register_autograd(no_second_derivative)
