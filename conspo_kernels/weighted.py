"""The sum of weighted scores of a micro-batch: what the losses of phase 2 have in common."""

from __future__ import annotations

import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from . import check
from .layout import TokenLayout
from .ops.sequence_score import sequence_score_backward
from .tokens import TokenOptions, layout_scores, token_counts

# Nats per token. The same parameters score the same tokens alike but for rounding: in bf16 a model's logits move by a
# hundredth when its batch does, and the mean over the tokens of a rollout by less.
DRIFT_TOLERANCE = 0.01


class WeightedScores(NamedTuple):
    """weights [S] beside the tokens.  phase_one: [S] the scores that they were computed from, or None."""

    weights: Tensor
    counts: Tensor
    phase_one: Tensor | None
    layout: TokenLayout
    options: TokenOptions

    @classmethod
    def of(
        cls, weights: Tensor, phase_one: Tensor | None, layout: TokenLayout, options: TokenOptions, dtype: torch.dtype
    ) -> WeightedScores:
        """From the doors' arguments; dtype: of logits or hidden states."""
        counts = token_counts(layout, options)
        check.weights(weights, counts, phase_one)
        acc = torch.float64 if dtype == torch.float64 else torch.float32
        weights = weights.detach().to(counts.device, acc, non_blocking=True)
        if phase_one is not None:
            phase_one = phase_one.detach().to(counts.device, acc, non_blocking=True)
        return cls(weights, counts, phase_one, layout, options)

    def coefficients(self) -> Tensor:
        """[B, T], of each token's log-probability."""
        weights, layout, options = self.weights * self.options.context_factor, self.layout, self.options
        return sequence_score_backward(
            weights, self.counts, layout.labels, layout.offsets, options.ignore_index, options.implementation
        )

    def sum(self, logprobs: Tensor) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """sum_i weights[i] * s_i of log-probabilities [B, T], its metrics, and the scores [S].

        What has no weight or no tokens is not looked at.
        """
        scores, _counts = layout_scores(logprobs, self.layout, self.options)
        used = (self.weights != 0) & (self.counts > 0)
        value = torch.where(used, self.weights * scores, 0.0).sum()
        metrics = {"conspo/response_tokens": self.counts.sum().to(scores.dtype)}
        if self.phase_one is not None:
            drift = torch.where(used, (scores.detach() - self.phase_one).abs(), 0.0)
            metrics["conspo/score_drift"] = drift.max() if drift.numel() else drift.sum()
            self._warn(metrics["conspo/score_drift"])
        return value, metrics, scores.detach()

    def _warn(self, drift: Tensor) -> None:
        """Where the number is at hand: on a GPU it would have to be waited for."""
        if drift.device.type == "cpu" and not torch.compiler.is_compiling() and not drift <= DRIFT_TOLERANCE:
            warnings.warn(
                f"scores drifted by {drift.item():.3g} nats per token since phase 1 (more than {DRIFT_TOLERANCE}): the "
                "gradient is that of other parameters, of dropout left on, or of another temperature or mask",
                RuntimeWarning,
                stacklevel=4,
            )
