"""What people write in plain PyTorch in place of the library, each used as its authors mean it to be."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = -100
TokenLogprobs = Callable[[Tensor, Tensor], Tensor]


class Rival(NamedTuple):
    """token_logprobs: logits [B, T, V] and labels [B, T] to log-probabilities [B, T], differentiable.

    rounds_to: the precision its softmax is kept in, None: that of the logits; what the correctness gate allows.
    ignores: takes labels of -100 itself; the others are given label 0 there, and their result is masked.
    package: what has to be installed, None where PyTorch is enough.
    """

    name: str
    token_logprobs: TokenLogprobs
    rounds_to: torch.dtype | None = torch.float32
    compiled: bool = False
    ignores: bool = False
    package: str | None = None


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
    yield Rival("F.cross_entropy", cross_entropy, rounds_to=None, ignores=True)
    yield Rival("torch.compile", eager_fp32, compiled=True)


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
    """Zero where the mask is."""

    def logprobs(logits: Tensor, labels: Tensor, mask: Tensor | None) -> Tensor:
        found = token_logprobs(logits, labels)
        return found if mask is None else found.masked_fill(~mask, 0.0)

    return logprobs
