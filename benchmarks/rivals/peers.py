"""The rivals in other packages that start from logits. A package is imported when its rival is first called.

Signatures were read in the sources of trl 1.16, liger-kernel 0.8.5, fla-core 0.6.0, quack-kernels 0.6.5, flash-attn 2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.rivals.baselines import IGNORE, Rival


class GroupLoss(NamedTuple):
    """A whole loss of another algorithm on the same logits, labels and rewards.

    loss: logits [B, T, V], labels [B, T] and advantages [B] to a scalar, differentiable.
    of_logprobs: the same loss from log-probabilities [B, T], for the gate; None as mask where all tokens count.
    """

    name: str
    loss: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
    of_logprobs: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    package: str


def peers(device: torch.device, inplace: bool, softcap: float | None = None) -> Iterator[Rival]:
    """The packages that compute log-probabilities on a device; in place where the op is and they can."""

    def trl_selective(logits: Tensor, labels: Tensor) -> Tensor:
        from trl.trainer.utils import selective_log_softmax

        return selective_log_softmax(logits, labels)

    if device.type != "cuda":
        yield Rival("TRL selective_log_softmax", trl_selective, rounds_to=None, package="trl")
        return

    def trl_entropy(logits: Tensor, labels: Tensor) -> Tensor:
        from trl.kernels import selective_log_softmax_and_entropy  # what selective_log_softmax calls on a GPU

        return torch.stack(selective_log_softmax_and_entropy(logits, labels)[:2])

    def trl_kernel(logits: Tensor, labels: Tensor) -> Tensor:
        from trl.kernels import selective_log_softmax_and_entropy

        return selective_log_softmax_and_entropy(logits, labels)[0]

    def flash_attn(logits: Tensor, labels: Tensor) -> Tensor:
        from flash_attn.ops.triton.cross_entropy import cross_entropy_loss

        losses, _z = cross_entropy_loss(logits.flatten(0, 1), labels.flatten(), inplace_backward=inplace)
        return -losses.view(labels.shape)

    def fla(logits: Tensor, labels: Tensor) -> Tensor:
        from fla.modules.fused_cross_entropy import cross_entropy_loss

        rows = logits.flatten(0, 1)
        losses, _z = cross_entropy_loss(rows, labels.flatten(), logit_softcapping=softcap, inplace_backward=inplace)
        return -losses.view(labels.shape)

    def liger(logits: Tensor, labels: Tensor) -> Tensor:
        """Its gradient is computed in forward, always over the logits."""
        from liger_kernel.ops.cross_entropy import LigerCrossEntropyFunction

        output = LigerCrossEntropyFunction.apply(
            logits.flatten(0, 1), labels.flatten(), None, IGNORE, 0.0, 0.0, "none", softcap
        )
        return -output[0].view(labels.shape)

    def quack(logits: Tensor, labels: Tensor) -> Tensor:
        from quack.cross_entropy import cross_entropy

        rows = logits.flatten(0, 1)
        losses = cross_entropy(rows, labels.flatten(), reduction="none", inplace_backward=inplace)
        return -losses.view(labels.shape)

    yield Rival("TRL kernel", trl_kernel, with_entropy=trl_entropy, package="trl")
    yield Rival("flash-attn cross-entropy", flash_attn, ignores=True, package="flash_attn")
    yield Rival("FLA cross-entropy", fla, ignores=True, softcap=softcap, package="fla")
    yield Rival(
        "Liger cross-entropy", liger, rounds_to=None, ignores=True, softcap=softcap, package="liger_kernel",
        in_forward=True,
    )  # fmt: skip
    yield Rival("quack cross_entropy", quack, ignores=True, package="quack")


def group_losses(device: torch.device) -> Iterator[GroupLoss]:
    """Liger's GRPO. It takes logits with one position more than labels; here the last label is left out instead.

    Without `old_logp` the ratio is one, so the loss is a mean of advantages, and its gradient that of the policy's.
    """
    if device.type != "cuda":
        return

    def grpo(level: str) -> Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]:
        def loss(logits: Tensor, labels: Tensor, advantages: Tensor, mask: Tensor | None) -> Tensor:
            from liger_kernel.transformers.grpo_loss import triton_grpo_loss

            mask = None if mask is None else mask[:, :-1].int().contiguous()
            output, _metrics = triton_grpo_loss(
                logits, None, None, labels[:, :-1].contiguous(), advantages, mask, temperature=1.0, beta=0.0,
                inplace=True, loss_type="grpo", importance_sampling_level=level, reduce=True,
            )  # fmt: skip
            return output

        return loss

    yield GroupLoss("Liger GRPO, sequence", grpo("sequence"), grpo_of_logprobs, "liger_kernel")
    yield GroupLoss("Liger GRPO, token", grpo("token"), grpo_of_logprobs, "liger_kernel")


def grpo_of_logprobs(logprobs: Tensor, advantages: Tensor, mask: Tensor | None) -> Tensor:
    """On policy, token by token, over all labels but the last: the same gradient as by sequence."""
    logprobs = logprobs[:, :-1]
    mask = torch.ones_like(logprobs, dtype=torch.bool) if mask is None else mask[:, :-1]
    per_token = -(logprobs - logprobs.detach()).exp() * advantages[:, None]
    return ((per_token * mask).sum(1) / mask.sum(1).clamp(min=1)).mean()


def advantages_of(rewards: Tensor, group_size: int) -> Tensor:
    """GRPO's: rewards less the group's mean, over its deviation."""
    grouped = rewards.view(-1, group_size)
    return ((grouped - grouped.mean(1, keepdim=True)) / (grouped.std(1, keepdim=True) + 1e-4)).flatten()
