"""Token log-probabilities over the vocabulary, forward and backward: how `row_kernels.py` is launched."""

import functools
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from ...values import Incoming, LogitRows, LogitTransform, Statistics, accumulated
from .launch import ceil_div, register_limit, row_fits_cache
from .row_kernels import _backward_kernel, _combine_kernel, _forward_backward_kernel, _statistics_kernel
from .rows import VECTOR_BYTES, aligned_base, num_chunks_of, tiles

COMBINE_ROWS = 16


def forward(rows: LogitRows, with_entropy: bool, out: Statistics | None = None) -> Statistics:
    """Statistics, each [B, T]."""
    logits, labels, transform, _start = rows
    num_tokens = labels.numel()
    if out is None:
        out = Statistics.empty(tuple(labels.shape), accumulated(logits.dtype), logits.device, with_entropy)
    if num_tokens == 0:
        return out
    logprobs, entropy, row_max, log_sum = out

    constants = _constants(logits.dtype, logits.shape[-1], transform) | {"HAS_ENTROPY": with_entropy}
    num_chunks, tanh = constants["num_chunks"], constants["TANH"]
    partial = log_sum.new_empty(num_tokens * num_chunks * (3 if with_entropy else 2))
    base, misalignment = aligned_base(logits)
    row = (misalignment, *logits.stride()[:2])
    kernel = "heavy forward" if logits.element_size() == 2 and tanh == "series" else "forward"
    limit = register_limit(kernel, logits, tanh is not None, with_entropy)
    _statistics_kernel[(num_tokens * num_chunks,)](
        base, labels, partial, *row, labels.shape[1], **constants, **tiles(logits, kernel, limit)
    )
    _combine_kernel[(ceil_div(num_tokens, COMBINE_ROWS),)](
        base, labels, partial, logprobs, entropy, row_max, log_sum, *row, num_tokens, labels.shape[1],
        **constants, ROWS=COMBINE_ROWS, CHUNKS=1 << (num_chunks - 1).bit_length(), num_warps=1,
        # Several lanes hold a row and store it. Were `merge`'s products fused with the sum over lanes, each would have
        # its own one unrounded, and its own last bit.
        enable_fp_fusion=False,
    )  # fmt: skip
    return out


def backward(grad_logits: Tensor, rows: LogitRows, incoming: Incoming) -> None:
    """Write the gradient of forward's outputs into `grad_logits` [B, T, V], which may be the logits themselves."""
    logits, labels, transform, start = rows
    row_max, log_sum, grad_logprobs, entropy, grad_entropy = incoming
    num_tokens, constants = labels.numel(), _constants(logits.dtype, logits.shape[-1], transform)
    if num_tokens == 0:
        return
    if grad_logits.dtype != logits.dtype:
        # The gradient may lie over logits that only this row's program may read.
        constants = constants | {"num_chunks": 1}
    base, grad_base, row, grad_row, same_alignment = _strided(logits, grad_logits)
    # A series for tanh and the addresses of narrow stores double the registers per logit: a smaller tile.
    tanh, with_entropy = constants["TANH"], grad_entropy is not None
    kernel = "backward" if tanh != "series" and same_alignment else "heavy"
    limit = register_limit(kernel, logits, tanh is not None, with_entropy) if same_alignment else None
    _backward_kernel[(num_tokens * constants["num_chunks"],)](
        base, labels, row_max, log_sum, entropy, grad_logprobs, grad_entropy, grad_base, *row, *grad_row,
        labels.shape[1], start, **constants, **tiles(logits, kernel, limit),
        HAS_ENTROPY=with_entropy, SAME_ALIGNMENT=same_alignment,
    )  # fmt: skip


def forward_backward(grad_logits: Tensor, rows: LogitRows, coefficients: Tensor, out: Tensor | None = None) -> Tensor:
    """logprobs [B, T], and into `grad_logits` (perhaps the logits) the gradient of sum(coefficients * logprobs)."""
    logits, labels, transform, _start = rows
    logprobs = torch.empty_like(coefficients) if out is None else out
    base, grad_base, row, grad_row, same_alignment = _strided(logits, grad_logits)
    # With a softcap, or narrow stores, arithmetic takes as long as a third look at the row would.
    if transform.softcap is not None or not same_alignment or not row_fits_cache(logits):
        acc, device = coefficients.dtype, coefficients.device
        statistics = Statistics.empty(tuple(labels.shape), acc, device, False)._replace(logprobs=logprobs)
        backward(grad_logits, rows, forward(rows, False, statistics).incoming(coefficients))
    elif labels.numel():
        _forward_backward_kernel[(labels.numel(),)](
            base, labels, coefficients, logprobs, grad_base, *row, *grad_row, labels.shape[1],
            **_constants(logits.dtype, logits.shape[-1], transform),
            **tiles(logits, "forward_backward", register_limit("forward_backward", logits, False, False)),
        )  # fmt: skip
    return logprobs


def _strided(logits: Tensor, grad_logits: Tensor) -> tuple[Tensor, Tensor, tuple[int, ...], tuple[int, ...], bool]:
    """Both from an aligned base, offset and strides of the rows of each, and whether these are aligned alike.

    A gradient narrower than the logits: whether the rows of both are aligned.
    """
    base, misalignment = aligned_base(logits)
    grad_base, grad_misalignment = aligned_base(grad_logits)
    row = (misalignment, *logits.stride()[:2])
    grad_row = (grad_misalignment, *grad_logits.stride()[:2])
    vector = VECTOR_BYTES // logits.element_size()
    if grad_logits.dtype != logits.dtype:
        same_alignment = all(x % vector == 0 for x in (*row, *grad_row))
    else:
        same_alignment = all((a - b) % vector == 0 for a, b in zip(row, grad_row, strict=True))
    return base, grad_base, row, grad_row, same_alignment


@functools.lru_cache(maxsize=64)  # building them takes 1 us, at every launch
def _constants(dtype: torch.dtype, vocab_size: int, transform: LogitTransform) -> dict[str, Any]:
    """The arguments that all kernels of `row_kernels.py` share."""
    return {
        "inner": transform.inner,
        "scale": transform.scale,
        "vocab_size": vocab_size,
        "num_chunks": num_chunks_of(vocab_size, dtype),
        "TANH": transform.tanh(dtype),
        "ACC": tl.float64 if dtype == torch.float64 else tl.float32,
    }
