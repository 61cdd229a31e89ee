"""TRL's loss head on this library's ops, for every one of its trainers, until it is disabled.

TRL's trainers take log-probabilities and entropies from `ChunkedLogProbFunction`, given hidden states, and from
`selective_log_softmax_and_entropy` and `selective_log_softmax`, given logits. While the loss head is on, all references
to these in TRL's modules are to the functions below, which take and return the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from conspo_kernels import linear_token_logprobs, token_logprobs

from ..replace import Replacement
from ..required import required

_replacement: Replacement | None = None  # while the head is on

ALL_STATISTICS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")  # those of ChunkedLogProbFunction, in order
Statistics = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]


@contextmanager
def fused_loss_head() -> Iterator[None]:
    """The loss head is on inside of the `with`, and afterwards, also after an exception, what it was before.

    Raises:
        ImportError: TRL is missing or too old.
    """
    before = _replacement is not None
    enable_fused_loss_head()
    try:
        yield
    finally:
        if before:
            enable_fused_loss_head()
        else:
            disable_fused_loss_head()


def enable_fused_loss_head() -> None:
    """TRL's log-probabilities and entropies come from this library's ops, whatever the trainer. A second call is none.

    Raises:
        ImportError: TRL is missing or too old.

    Cost: from hidden states, in GEMMs of 2 * N * H * V operations: as `linear_token_logprobs`, and one more for each
        call that asks for log_sum_sq_probs, mean_logits or is_top1 (SFT, DPO and KTO do), which TRL's own function
        computes, without a gradient.
    """
    global _replacement
    if _replacement is None:
        _replacement = Replacement(_pairs(), within="trl")


def disable_fused_loss_head() -> None:
    """TRL's own functions are back, in modules that TRL imported in the meantime too."""
    global _replacement
    if _replacement is not None:
        _replacement.undo()
        _replacement = None


def _pairs() -> list[tuple[Any, Any]]:
    """TRL's own, and what takes its place."""
    required("trl")
    from trl import kernels
    from trl.trainer import utils

    function, selective = kernels.ChunkedLogProbFunction, utils.selective_log_softmax
    pairs = [
        (function, FusedLogProbs(function)),
        (selective, _selective(selective)),
        (utils.selective_log_softmax_and_entropy, selective_log_softmax_and_entropy),
    ]
    kernel = getattr(kernels, "selective_log_softmax_and_entropy", None)
    return pairs if kernel is None else [*pairs, (kernel, logprobs_and_entropies)]  # None where there is no Triton


class FusedLogProbs:
    """In place of TRL's autograd function `ChunkedLogProbFunction`."""

    def __init__(self, original: Any) -> None:
        self.original = original

    def apply(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = ALL_STATISTICS,
    ) -> Statistics:
        """Of hidden [N, H], weight [V, H], bias [V], targets [N]: five [N], None where not asked for."""
        if hasattr(weight, "ds_id"):  # DeepSpeed's mark of a parameter that is there while it is gathered
            raise ValueError(
                "the fused loss head does not run under ZeRO-3: backward reads the weight of lm_head, which is not "
                "gathered then. Use ZeRO-2 or FSDP2, or TRL's own loss head"
            )
        head, weight_grad = _cast_weight(hidden, weight)
        result = linear_token_logprobs(
            hidden, head, targets, bias=None if bias is None else bias.to(head.dtype), weight_grad=weight_grad,
            temperature=temperature, softcap=final_logit_softcapping, logit_scale=logit_scale,
            return_entropy="entropy" in outputs,
        )  # fmt: skip
        logprobs, entropy = result if isinstance(result, tuple) else (result, None)
        others = tuple(name for name in ALL_STATISTICS if name in outputs and name != "entropy")
        if not others:
            return logprobs, entropy, None, None, None
        with torch.no_grad():
            statistics = self.original.apply(
                hidden, weight, bias, targets, temperature, chunk_size, final_logit_softcapping, logit_scale, others
            )
        return logprobs, entropy, *statistics[2:]


def _cast_weight(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor | None]:
    """The weight in the dtype of the GEMMs, and, where its gradient is of more bits, [V, H] fp32 to add it up in."""
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    if weight.dtype != torch.float32 or dtype.itemsize > 2 or not (weight.requires_grad and torch.is_grad_enabled()):
        return weight.to(dtype), None
    weight_grad = torch.zeros_like(weight, requires_grad=False)
    return UnroundedGradient.apply(weight, dtype, weight_grad), weight_grad


class UnroundedGradient(torch.autograd.Function):
    """A weight in 16 bits whose gradient is handed on as the ops have summed it, in fp32. That of a cast is rounded."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, dtype: torch.dtype, weight_grad: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.weight_grad = weight_grad
        return weight.to(dtype)

    @staticmethod
    def backward(ctx: Any, *_none: Tensor | None) -> tuple[Tensor, None, None]:
        """Runs when the ops' backward has run: their gradient of this weight is in `weight_grad`."""
        if ctx.weight_grad is None:
            raise RuntimeError("a second backward through the loss head: its gradient was handed on by the first")
        weight_grad, ctx.weight_grad = ctx.weight_grad, None
        return weight_grad, None, None


def _selective(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """In place of `trl.trainer.utils.selective_log_softmax`."""

    def selective_log_softmax(
        logits: Tensor, index: Tensor, temperature: float = 1.0, row_mask: Tensor | None = None
    ) -> Tensor:
        """Of logits [..., V] and index [...]; several indices per row, [..., K], are left to TRL's own."""
        if index.dim() == logits.dim():
            return original(logits, index, temperature, row_mask)
        return _of_rows(logits, index, temperature, row_mask, False)[0]

    return selective_log_softmax


def selective_log_softmax_and_entropy(
    logits: Tensor,
    index: Tensor,
    entropy_requires_grad: bool = True,
    temperature: float = 1.0,
    row_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """In place of `trl.trainer.utils`'s: of logits [..., V], index and row_mask [...]."""
    logprobs, entropy = _of_rows(logits, index, temperature, row_mask, True)
    return logprobs, entropy if entropy_requires_grad else entropy.detach()


def logprobs_and_entropies(
    logits: Tensor, index: Tensor, temperature: float = 1.0, row_mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """In place of `trl.kernels.selective_log_softmax_and_entropy`: of logits [..., V], index and row_mask [...]."""
    return _of_rows(logits, index, temperature, row_mask, True)


def _of_rows(
    logits: Tensor, index: Tensor, temperature: float, row_mask: Tensor | None, entropy: bool
) -> tuple[Tensor, Tensor]:
    """Log-probabilities and, if asked for, entropies (else the former twice), shaped like index, 0 where masked."""
    shape, rows = index.shape, logits
    if logits.dim() != 3:  # [B, T, V] may be a slice of a larger tensor: read in place
        rows = logits.reshape(1, -1, logits.shape[-1])
        index, row_mask = index.reshape(1, -1), None if row_mask is None else row_mask.reshape(1, -1)
    result = token_logprobs(rows, index, response_mask=row_mask, temperature=temperature, return_entropy=entropy)
    logprobs, entropies = result if isinstance(result, tuple) else (result, result)
    return logprobs.view(shape), entropies.view(shape)
