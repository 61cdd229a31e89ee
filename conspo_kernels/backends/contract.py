"""What a backend offers: one module (or object) per op, with the functions of these protocols.

A backend sees checked tensors on one device. Labels are indices or `IGNORED`; no mask, shift or packing reaches it but
the offsets of rollouts. Names: b sequences, t positions, v vocabulary, s rollouts, k groups.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..objective import Segments
from ..values import LogitTransform, Statistics


class TokenLogprob(Protocol):
    """Log-probabilities of labels, and their gradient.

    logits: [B, T, V], last stride 1, fp16, bf16, fp32 or fp64.  labels: [B, T] int64, contiguous.  Results are [B, T],
    fp32 (fp64 for fp64 logits), and 0 where the label is `IGNORED`.
    """

    def forward(self, logits: Tensor, labels: Tensor, transform: LogitTransform, with_entropy: bool) -> Statistics: ...

    def backward(
        self,
        grad_logits: Tensor,
        logits: Tensor,
        labels: Tensor,
        statistics: Statistics,
        grad_logprobs: Tensor,
        grad_entropy: Tensor | None,
        transform: LogitTransform,
    ) -> None:
        """Write the gradient of forward's outputs into `grad_logits` [B, T, V], which may be `logits` itself.

        `statistics.logprobs` is not read. A token whose coefficients are zero is not read, and its gradient is zero.
        """

    def forward_backward(
        self, grad_logits: Tensor, logits: Tensor, labels: Tensor, coefficients: Tensor, transform: LogitTransform
    ) -> Tensor:
        """logprobs, and into `grad_logits` (perhaps `logits`) the gradient of sum(coefficients * logprobs)."""


class SequenceScore(Protocol):
    """Mean log-probability of each rollout's response tokens, and its gradient.

    offsets: [S + 1] int64 into the flattened tokens, or None: the rows are the rollouts.
    """

    def forward(self, logprobs: Tensor, labels: Tensor, offsets: Tensor | None) -> tuple[Tensor, Tensor]:
        """logprobs, labels [B, T] -> scores [S], NaN where there is no response token; counts [S] int32."""

    def backward(self, grad_scores: Tensor, counts: Tensor, labels: Tensor, offsets: Tensor | None) -> Tensor:
        """The gradient of the scores, [S], spread over their tokens: [B, T], zero where ignored."""


class Rollouts(NamedTuple):
    """scores: [S].  rewards: [S], NaN = unscorable.  counts: [S] response tokens, or None: a NaN score is unscorable.

    segments: of ragged groups; None: groups of `group_size` consecutive rollouts.
    """

    scores: Tensor
    rewards: Tensor
    counts: Tensor | None
    segments: Segments | None
    group_size: int


class ContrastSettings(NamedTuple):
    """margin: 0-d.  num_groups: 0-d denominator of reduction "mean", or None: the number of valid groups."""

    tau: float
    margin: Tensor
    reward_threshold: float
    reduction: str
    num_groups: Tensor | None


class GroupLoss(NamedTuple):
    """loss: 0-d, or [K] for "none".  weights: [S] dloss/dscores.  roles: [S] int8, of `objective.Role`."""

    loss: Tensor
    weights: Tensor
    roles: Tensor


class GroupInfoNCE(Protocol):
    """The objective of `objective.py` and its gradient; everything is on the device of the scores."""

    def forward(self, rollouts: Rollouts, settings: ContrastSettings) -> GroupLoss: ...


class Scale(Protocol):
    """A gradient times the scalar that comes in."""

    def scale_(self, gradient: Tensor, factor: Tensor) -> None:
        """gradient *= factor (0-d), at no cost where the factor is 1."""


class Backend(Protocol):
    """A folder of `backends`, or a module."""

    def obstacle(self, device: torch.device) -> str | None:
        """Why the backend cannot run on a device, or None."""
