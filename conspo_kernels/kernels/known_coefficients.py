"""Forward and gradient in one go, where the coefficients of the log-probabilities are known beforehand."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .transform import LogitTransform


def forward_backward(
    kernels: Any,
    grad_logits: Tensor,
    logits: Tensor,
    labels: Tensor,
    coefficients: Tensor,
    ignore_index: int,
    transform: LogitTransform,
) -> Tensor:
    """logprobs [B, T], and into `grad_logits`, which may be `logits`, the gradient of sum(coefficients * logprobs).

    kernels: a twin of token_logprob, whose own function for this is taken where it has one.
    """
    arguments = (grad_logits, logits, labels, coefficients, ignore_index, transform)
    if (at_once := getattr(kernels, "forward_backward", None)) is not None:
        return at_once(*arguments)
    logprobs, _entropy, row_max, log_sum = kernels.forward(logits, labels, ignore_index, transform, False)
    kernels.backward(grad_logits, logits, labels, row_max, log_sum, None, coefficients, None, ignore_index, transform)
    return logprobs
