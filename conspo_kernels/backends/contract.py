"""What a backend offers: the functions of `Backend`.

A backend sees checked tensors on one device. Labels are indices or `IGNORED`; no mask, shift or packing reaches it but
the offsets of rollouts: [S + 1] int32 or int64 into the flattened tokens, or None: the rows are the rollouts. Results
per token are [B, T], fp32 (fp64 for fp64 inputs), and 0 where the label is `IGNORED`. Names: b sequences, t positions,
v vocabulary, s rollouts, k groups.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from ..objective import Objective, Rollouts
from ..values import Incoming, LogitRows, Statistics


class Backend(Protocol):
    """A module, or a folder of `backends`."""

    def obstacle(self, device: torch.device) -> str | None:
        """Why the backend cannot run on a device, or None."""

    def align(
        self, labels: Tensor, response_mask: Tensor | None, offsets: Tensor | None, shift: bool, absent: int
    ) -> Tensor:
        """Users' labels in the one form that every other op takes: [B, T] int64, of the rows that predict them.

        `IGNORED` where there is no response token.

        labels: [B, T] integers; one that equals `absent` is no label; others below 0 become `ELSEWHERE`.
        response_mask: [B, T], zero = no response token.  offsets: of packed labels [1, N].
        shift: labels are the input ids: position t gets the label of t + 1 of its own sequence.
        """

    def token_logprob_forward(self, rows: LogitRows, with_entropy: bool, out: Statistics | None = None) -> Statistics:
        """Log-probabilities of labels, and what their gradient needs.

        out: contiguous, to write the results to; whole rows of logits.
        """

    def token_logprob_backward(self, grad_logits: Tensor, rows: LogitRows, incoming: Incoming) -> None:
        """Write the gradient of forward's outputs into `grad_logits` [B, T, V], which may be `rows.logits` itself.

        Its dtype may be 16 bits wide where the logits have 32. Then a row of it may lie in the second half of the row's
        own memory: a row is walked from its end, so that only what was read is overwritten, by one program alone. A
        token whose coefficients are zero is not read, and its gradient is zero. The logits may be a slice of the
        columns.
        """

    def token_logprob_forward_backward(
        self, grad_logits: Tensor, rows: LogitRows, coefficients: Tensor, out: Tensor | None = None
    ) -> Tensor:
        """logprobs, and into `grad_logits`, as of backward, the gradient of sum(coefficients * logprobs)."""

    def sequence_score_forward(self, logprobs: Tensor, labels: Tensor, offsets: Tensor | None) -> tuple[Tensor, Tensor]:
        """Means [S] of logprobs, labels [B, T], NaN where there is no response token; and counts [S] int32 of these."""

    def sequence_score_backward(
        self, weights: Tensor, counts: Tensor, labels: Tensor, offsets: Tensor | None, factor: Tensor | None = None
    ) -> Tensor:
        """The gradient of the scores, weights [S], at their tokens [B, T].

        factor: 0-d, of all weights but those of zero, whatever it is.
        """

    def token_coefficients(
        self, weights: Tensor, labels: Tensor, offsets: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """weights [S] over counts, at their tokens [B, T]; counts [S] int32; labels, `IGNORED` where that is 0."""

    def masked_coefficients(self, coefficients: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Coefficients [B, T], zero where ignored; the labels, `IGNORED` where the coefficient is zero."""

    def weighted_sum(self, values: Tensor, weights: Tensor, counts: Tensor | None) -> Tensor:
        """The sum (0-d) of weights times values, of any one shape, without those whose weight (or count) is zero."""

    def infonce(
        self, scores: Tensor, counts: Tensor, rollouts: Rollouts, objective: Objective
    ) -> tuple[Tensor, Tensor]:
        """Loss and weights as of `objective.infonce`; everything is on the device of the scores.

        scores: [S] fp32 or fp64, NaN where counts [S] int32 are 0: without response tokens.
        """

    def scale_(self, gradient: Tensor, factor: Tensor) -> None:
        """gradient *= factor (0-d, the scalar that comes in from backward), at no cost where the factor is 1."""
