"""The rivals: what people write, or would write, in place of the library, each used as its authors mean it to be."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

TokenLogprobs = Callable[[Tensor, Tensor], Tensor]


class Rival(NamedTuple):
    """token_logprobs: logits [B, T, V] and labels [B, T] to log-probabilities [B, T], differentiable.

    rounds_to: the precision its softmax is kept in, None: that of the logits; what the correctness gate allows.
    """

    name: str
    token_logprobs: TokenLogprobs
    rounds_to: torch.dtype | None = torch.float32
    compiled: bool = False


def eager(logits: Tensor, labels: Tensor) -> Tensor:
    """In the dtype of the logits."""
    return torch.log_softmax(logits, dim=-1).gather(-1, labels[..., None])[..., 0]


def eager_fp32(logits: Tensor, labels: Tensor) -> Tensor:
    return eager(logits.float(), labels)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return -F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape)


def rivals(dtype: torch.dtype) -> Iterator[Rival]:
    """The rivals for logits of a dtype."""
    yield Rival("eager", eager, rounds_to=None)
    if dtype != torch.float32:
        yield Rival("eager, fp32", eager_fp32)
    yield Rival("F.cross_entropy", cross_entropy, rounds_to=None)
    yield Rival("torch.compile", eager_fp32, compiled=True)


def infonce(scores: Tensor, rewards: Tensor, group_size: int, tau: float, margin: float) -> Tensor:
    """The objective as one would write it on [groups, rollouts]; every group has to be valid."""
    s = scores.view(-1, group_size) / tau
    positive = rewards.view(-1, group_size) > 0.5
    negatives = s.masked_fill(positive, -torch.inf).logsumexp(1, keepdim=True)
    losses = F.softplus(negatives - s + margin / tau).masked_fill(~positive, 0.0).sum(1) / positive.sum(1)
    return tau * losses.mean()


def conspo_loss_of(token_logprobs: TokenLogprobs) -> Callable[[Tensor, Tensor, Tensor, int, float, float], Tensor]:
    """The loss on top of a rival's log-probabilities; every token is a response token."""

    def loss(logits: Tensor, labels: Tensor, rewards: Tensor, group_size: int, tau: float, margin: float) -> Tensor:
        return infonce(token_logprobs(logits, labels).float().mean(1), rewards, group_size, tau, margin)

    return loss
