"""verl's `linear_cross_entropy` on these kernels: log-probabilities, entropy and gradients, logits never whole."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from conspo_kernels import Parallel, linear_token_logprobs


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    temperature: float = 1.0,
    reduction: str = "none",
    dist_process_group: ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probability of each label and entropy of its distribution, in verl's signature.

    Args:
        hidden: [..., H]; fp16, bf16, fp32 or fp64.
        weight: [V, H]; with `dist_process_group` this rank's part, all parts of one size, in rank order.
        labels: [...] integers.
        temperature: > 0, which the logits are divided by.
        reduction: of the log-probabilities: "none", "sum" or "mean".
        dist_process_group: the tensor-parallel ranks. As in verl, gradients of hidden are parts whose sum over these
            ranks is the gradient: Megatron's sequence parallelism sums them.

    Returns:
        (logprobs, entropy), [N] fp32 with N the number of labels (logprobs 0-d where reduced), both differentiable.

    Raises:
        TypeError, ValueError: as `linear_token_logprobs`; another reduction.

    As in verl's kernels logits are in fp32 (fp64 for fp64 operands), not rounded to the dtype of hidden, and autocast
    casts neither hidden nor weight, unless they differ in dtype.

    Cost: as `linear_token_logprobs`: one GEMM forward, and three in backward, two where all logits fit the workspace.

    Source: verl 0.9.1, verl/utils/kernel/linear_cross_entropy.py.
    """
    if reduction not in ("none", "sum", "mean"):
        raise ValueError(f'reduction must be "none", "sum" or "mean", got {reduction!r}')
    flat, labels = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    parallel = None
    if dist_process_group is not None and dist_process_group.size() > 1:
        parallel = Parallel(vocab=dist_process_group, vocab_start=dist_process_group.rank() * weight.shape[0])
        flat = _with_part_of_gradient(flat, dist_process_group.size())
    with _as_they_are(flat, weight):
        logprobs, entropy = linear_token_logprobs(
            flat, weight, labels, temperature=temperature, return_entropy=True, parallel=parallel, logits_dtype=dtype
        )
    if reduction == "sum":
        return logprobs.sum(), entropy
    return (logprobs.mean() if reduction == "mean" else logprobs), entropy


def _as_they_are(hidden: Tensor, weight: Tensor) -> AbstractContextManager[object]:
    """Without autocast, which would round fp32 operands; it stays where they need it, to have one dtype."""
    return torch.autocast(hidden.device.type, enabled=False) if hidden.dtype == weight.dtype else nullcontext()


def _with_part_of_gradient(hidden: Tensor, ranks: int) -> Tensor:
    """The same values; backward hands on 1/ranks of the gradient, which every rank has whole."""
    hidden = hidden.view_as(hidden)
    if hidden.requires_grad:
        hidden.register_hook(lambda gradient: gradient / ranks)
    return hidden
