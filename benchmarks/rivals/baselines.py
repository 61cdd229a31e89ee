"""What people write in plain PyTorch in place of the library, each used as its authors mean it to be."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = -100
TokenLogprobs = Callable[[Tensor, Tensor], Tensor]


class Rival(NamedTuple):
    """token_logprobs: logits [B, T, V] and labels [B, T] to log-probabilities [B, T], differentiable.

    rounds_to: the precision its softmax is kept in, None: that of the logits; what the correctness gate allows.
    ignores: takes labels of -100 itself; the others are given label 0 there, and their result is masked.
    with_entropy: the same to log-probabilities and entropies, stacked; None where it has none.
    softcap: what the two above cap the logits with.
    package: what has to be installed, None where PyTorch is enough.
    in_forward: it computes the gradient in forward, so that a backward alone would time next to nothing.
    """

    name: str
    token_logprobs: TokenLogprobs
    rounds_to: torch.dtype | None = torch.float32
    compiled: bool = False
    ignores: bool = False
    with_entropy: TokenLogprobs | None = None
    softcap: float | None = None
    package: str | None = None
    in_forward: bool = False


def log_softmax(logits: Tensor, softcap: float | None) -> Tensor:
    """Of the logits [B, T, V] as the model's head caps them."""
    return torch.log_softmax(logits if softcap is None else softcap * torch.tanh(logits / softcap), dim=-1)


def eager(logits: Tensor, labels: Tensor, softcap: float | None = None) -> Tensor:
    """In the dtype of the logits."""
    return log_softmax(logits, softcap).gather(-1, labels[..., None])[..., 0]


def eager_fp32(logits: Tensor, labels: Tensor, softcap: float | None = None) -> Tensor:
    return eager(logits.float(), labels, softcap)


def eager_entropy(logits: Tensor, labels: Tensor, softcap: float | None = None) -> Tensor:
    """Log-probabilities and entropies, stacked."""
    y = log_softmax(logits, softcap)
    return torch.stack([y.gather(-1, labels[..., None])[..., 0], -(y.exp() * y).sum(-1)])


def eager_entropy_fp32(logits: Tensor, labels: Tensor, softcap: float | None = None) -> Tensor:
    return eager_entropy(logits.float(), labels, softcap)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return -F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape)


def rivals(dtype: torch.dtype, softcap: float | None = None) -> Iterator[Rival]:
    """The rivals for logits of a dtype."""

    def rival(name: str, logprobs: TokenLogprobs, entropy: TokenLogprobs, **about: Any) -> Rival:
        capped = [partial(function, softcap=softcap) for function in (logprobs, entropy)]
        return Rival(name, capped[0], with_entropy=capped[1], softcap=softcap, **about)

    yield rival("eager", eager, eager_entropy, rounds_to=None)
    if dtype != torch.float32:
        yield rival("eager, fp32", eager_fp32, eager_entropy_fp32)
    yield Rival("F.cross_entropy", cross_entropy, rounds_to=None, ignores=True)
    yield rival("torch.compile", eager_fp32, eager_entropy_fp32, compiled=True)


def infonce(scores: Tensor, rewards: Tensor, group_size: int, tau: float, margin: float) -> Tensor:
    """The objective as one would write it on [groups, rollouts]: the mean over groups with right and wrong ones."""
    s = scores.view(-1, group_size) / tau
    positive = rewards.view(-1, group_size) > 0.5
    valid = positive.any(1) & ~positive.all(1)
    negatives = s.masked_fill(positive & valid[:, None], -torch.inf).logsumexp(1, keepdim=True)
    counted = positive & valid[:, None]
    losses = F.softplus(negatives - s + margin / tau).masked_fill(~counted, 0.0).sum(1) / positive.sum(1).clamp(min=1)
    return tau * losses.sum() / valid.sum().clamp(min=1)


def scores_of(logprobs: Tensor, mask: Tensor | None) -> Tensor:
    """Means over the response tokens; mask [B, T] is None where all are."""
    if mask is None:
        return logprobs.mean(1)
    return logprobs.masked_fill(~mask, 0.0).sum(1) / mask.sum(1)


def conspo_loss_of(token_logprobs: TokenLogprobs) -> Callable[..., Tensor]:
    """The loss on top of a rival's log-probabilities."""

    def loss(
        logits: Tensor,
        labels: Tensor,
        mask: Tensor | None,
        rewards: Tensor,
        group_size: int,
        tau: float,
        margin: float,
    ) -> Tensor:
        scores = scores_of(token_logprobs(logits, labels).float(), mask)
        return infonce(scores, rewards, group_size, tau, margin)

    return loss


def masked(token_logprobs: TokenLogprobs) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
    """Zero where the mask is; entropies, stacked on log-probabilities, too."""

    def logprobs(logits: Tensor, labels: Tensor, mask: Tensor | None) -> Tensor:
        logprobs = token_logprobs(logits, labels)
        return logprobs if mask is None else logprobs.masked_fill(~mask, 0.0)

    return logprobs
