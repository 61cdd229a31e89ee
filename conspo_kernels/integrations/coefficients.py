"""ConSPO in a trainer that shows rewards in one place and log-probabilities in another: coefficients carry it across.

ConSPO depends on the parameters through the scores alone, so with w = dloss/ds, computed once from the
log-probabilities of all rollouts of a step,

    sum_i w_i s_i = sum_i sum_t (w_i / n_i) logp[i, t]

has its gradient, however the rollouts are spread over mini-batches, micro-batches and ranks. A trainer's "advantages"
carry -w_i / n_i, times what the trainer divides by; its policy loss is linear: the sum of -advantage * logp. Trainers
differ in where all log-probabilities are known, and in what they divide by: one module each.

From the second update on a batch on the weights are those of older scores. Where scores have moved by ds since then,
weights would have by about ds / tau: at tau = 10 and 0.1 nats by one per cent. `summed_loss` says how far it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from conspo_kernels import ConSPOWeights, Parallel, conspo_weights, sequence_scores, trust_region

Margin = float | Callable[[float], float]


@dataclass(frozen=True)
class Objective:
    """ConSPO's settings, and its weights for what a trainer knows of a step.

    Args:
        tau: temperature of the contrast, > 0.
        margin: nats per token; or a schedule, step -> margin, such as `CosineMargin`.
        reward_threshold: a rollout is positive where its reward is above.
    """

    tau: float = 10.0
    margin: Margin = 0.0
    reward_threshold: float = 0.5

    def weights(
        self,
        logprobs: Tensor,
        response_mask: Tensor,
        rewards: Tensor,
        groups: int | Tensor,
        *,
        cu_seqlens: Tensor | None = None,
        step: float | None = None,
        parallel: Parallel | None = None,
    ) -> ConSPOWeights:
        """dloss/dscores of rollouts whose log-probabilities are known: phase 1 of `conspo_kernels.two_phase`.

        Args:
            logprobs: [S, T] padded, or [N] packed with `cu_seqlens` [S + 1], of all response tokens, at the parameters
                that the step begins with.
            response_mask: shaped like logprobs, zero = no response token.
            rewards, groups, parallel: as `conspo_weights`.
            step: the training step, counted from 0, for a margin that is a schedule.

        Returns:
            Weights [S], loss and metrics.

        Raises:
            ValueError: a response token's log-probability is NaN; the margin is a schedule and there is no step.
            TypeError, ValueError: as `sequence_scores` and `conspo_weights`.

        Source: arXiv:2605.12969.
        """
        mask = response_mask.bool()
        if bool(torch.isnan(logprobs).logical_and(mask).any()):
            raise ValueError("a log-probability of a response token is NaN: there are no scores to weigh")
        scores = masked_scores(logprobs.detach(), mask, cu_seqlens, parallel)
        return conspo_weights(
            scores, rewards, groups, tau=self.tau, margin=self._margin_at(step),
            reward_threshold=self.reward_threshold, parallel=parallel, return_metrics=True,
        )  # fmt: skip

    def _margin_at(self, step: float | None) -> float:
        if not callable(self.margin):
            return self.margin
        if step is None:
            raise ValueError(f"margin is a schedule ({self.margin!r}), so step must be a number, got None")
        return self.margin(step)


def masked_scores(
    logprobs: Tensor, mask: Tensor, cu_seqlens: Tensor | None = None, parallel: Parallel | None = None
) -> Tensor:
    """[S] means of rollouts, padded or packed, over the tokens whose mask is not zero; NaN where there is none."""
    labels = torch.zeros_like(mask, dtype=torch.int64)
    return sequence_scores(logprobs, labels, response_mask=mask, cu_seqlens=cu_seqlens, parallel=parallel)


def token_advantages(weights: Tensor, response_mask: Tensor, scale: float) -> Tensor:
    """-scale * w_i / n_i on the response tokens of padded rollouts, zero elsewhere.

    Args:
        weights: [S] dloss/dscores.
        response_mask: [S, T], zero = no response token.
        scale: what the trainer divides the sum over rollouts by.

    Returns:
        [S, T], dtype of the weights.
    """
    mask = response_mask.bool()
    per_token = -scale * weights / mask.sum(dim=1).clamp(min=1)
    return torch.where(mask, per_token[:, None], torch.zeros_like(per_token)[:, None])


def linear_loss(
    logprobs: Tensor, advantages: Tensor, old_logprobs: Tensor | None = None, epsilon: float | None = None
) -> Tensor:
    """-advantage * logp per token; exactly zero, whatever logp is, where the advantage is.

    Args:
        old_logprobs: shaped like logprobs, of the policy that sampled; needed for a trust region.
        epsilon: of `trust_region`; None, as in the paper: none.
    """
    advantages = trusted_advantages(logprobs, advantages, old_logprobs, epsilon)
    return torch.where(advantages != 0, -advantages * logprobs, torch.zeros_like(logprobs))


def check_trust_region(epsilon: float | None) -> None:
    """Raises ValueError where a trainer's option is out of range, before a batch is spent on it."""
    if epsilon is not None and not 0 < epsilon < math.inf:
        raise ValueError(f"trust_region must be positive and finite, or None, got {epsilon!r}")


def trusted_advantages(
    logprobs: Tensor, advantages: Tensor, old_logprobs: Tensor | None, epsilon: float | None
) -> Tensor:
    """Advantages, zero where the trust region stops the gradient of a token."""
    if epsilon is None:
        return advantages
    if old_logprobs is None:
        raise ValueError("a trust region needs old_logprobs, of the policy that sampled, got None")
    return -trust_region(-advantages.detach(), logprobs.detach(), old_logprobs, epsilon)


def summed_loss(
    logprobs: Tensor,
    advantages: Tensor,
    old_logprobs: Tensor,
    response_mask: Tensor,
    *,
    tau: float = 10.0,
    epsilon: float | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The sum of `linear_loss` over response tokens, and what every integration logs of weights that grow old.

    Args:
        logprobs, advantages, old_logprobs, response_mask: [b, T] padded, or [N] packed with `cu_seqlens` [b + 1].
            old_logprobs: those that the weights come from.
        tau, epsilon: of the objective and the trust region.

    Returns:
        The sum, 0-d, and metrics without a graph, 0-d each:
        `conspo/score_drift`: the largest change of a rollout's score, in nats per token.
        `conspo/weight_drift`: that divided by tau, about the relative change of a weight that it stands for.
        `conspo/trust_region_fraction`: of the response tokens with an advantage, the share that was stopped.
    """
    mask = response_mask.bool()
    # Masked before the product: behind it an advantage of NaN under the mask would reach the gradient, as 0 * NaN.
    advantages = torch.where(mask, advantages, 0.0)
    trusted = trusted_advantages(logprobs, advantages, old_logprobs, epsilon)
    loss = linear_loss(logprobs, trusted).sum()
    with torch.no_grad():
        changes = torch.where(mask, logprobs.float() - old_logprobs.float(), 0.0)
        empty = masked_scores(torch.ones_like(changes), mask, cu_seqlens).isnan()
        drifts = masked_scores(changes, mask, cu_seqlens).abs().masked_fill(empty, 0.0)
        drift = drifts.max() if drifts.numel() else drifts.sum()
        used = advantages != 0
        share = (used & (trusted == 0)).sum() / used.sum().clamp(min=1)
    return loss, {
        "conspo/score_drift": drift,
        "conspo/weight_drift": drift / tau,
        "conspo/trust_region_fraction": share.to(drift.dtype),
    }


def mean_change(logprobs: Tensor, old_logprobs: Tensor, response_mask: Tensor) -> Tensor:
    """0-d: the mean of old - new over response tokens, which trainers log as their KL; 0 where there is none."""
    mask = response_mask.bool()
    changes = torch.where(mask, (old_logprobs - logprobs).detach(), 0.0)
    return changes.sum() / mask.sum().clamp(min=1)


def numbers(metrics: Mapping[str, Tensor]) -> dict[str, float]:
    """0-d tensors as Python's numbers, with one synchronisation."""
    return dict(zip(metrics, torch.stack([x.double() for x in metrics.values()]).tolist(), strict=True))


def group_ids(names: Sequence[Hashable]) -> Tensor:
    """[S] int64: equal where the names of the prompts (strings, UUIDs) are."""
    known: dict[Hashable, int] = {}
    return torch.tensor([known.setdefault(name, len(known)) for name in names], dtype=torch.int64)
