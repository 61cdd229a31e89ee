"""Calls as users write them, for the type checker: what returns what. mypy reads this file; nothing runs it."""

from __future__ import annotations

import torch
from torch import Tensor

from conspo_kernels import (
    ConSPOLoss,
    ConSPOOutput,
    ConSPOWeights,
    CosineMargin,
    LinearConSPOLoss,
    Parallel,
    conspo_loss,
    conspo_loss_from_scores,
    conspo_scores,
    conspo_weights,
    linear_conspo_loss,
    linear_token_logprobs,
    linear_weighted_logprob_loss,
    linear_weighted_score_loss,
    sequence_scores,
    token_logprobs,
    weighted_logprob_loss,
    weighted_score_loss,
)


def losses(logits: Tensor, hidden: Tensor, weight: Tensor, labels: Tensor, rewards: Tensor, mask: Tensor) -> Tensor:
    margin = CosineMargin(target=0.5, warmup_ratio=0.5, total_steps=10)
    plain: Tensor = conspo_loss(logits, labels, rewards, 4, shift=True, response_mask=mask, margin=margin(3))
    plain.backward()
    output: ConSPOOutput = conspo_loss(logits, labels, rewards, rewards.long(), return_metrics=True)
    gap: Tensor = output.metrics["conspo/score_gap"]
    linear: Tensor = linear_conspo_loss(hidden, weight, labels, rewards, 4, workspace_mib=256, bias=None)
    linear_output: ConSPOOutput = linear_conspo_loss(hidden, weight, labels, rewards, 4, return_metrics=True)
    split: Tensor = conspo_loss_from_scores(output.scores, rewards, 4, parallel=Parallel(grad_reduction="sum"))
    return plain + gap + linear + linear_output.loss + split


def parts(logits: Tensor, hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    logprobs: Tensor = token_logprobs(logits, labels, temperature=0.7, softcap=30.0)
    logprobs, entropy = token_logprobs(logits, labels, return_entropy=True)
    linear: Tensor = linear_token_logprobs(hidden, weight, labels, logits_dtype=torch.float32)
    more, more_entropy = linear_token_logprobs(hidden, weight, labels, return_entropy=True)
    scores: Tensor = sequence_scores(logprobs, labels)
    return scores.sum() + entropy.sum() + linear.sum() + more.sum() + more_entropy.sum()


def phases(logits: Tensor, hidden: Tensor, weight: Tensor, labels: Tensor, rewards: Tensor) -> Tensor:
    scores: Tensor = conspo_scores(logits, labels)
    weights: ConSPOWeights = conspo_weights(scores, rewards, 4, tau=0.5)
    first: Tensor = weighted_score_loss(logits, labels, weights.weights, scores=scores)
    second: ConSPOOutput = linear_weighted_score_loss(hidden, weight, labels, weights.weights, return_metrics=True)
    coefficients = torch.ones_like(labels, dtype=torch.float32)
    third: Tensor = weighted_logprob_loss(logits, labels, coefficients, inplace=True)
    fourth: Tensor = linear_weighted_logprob_loss(hidden, weight, labels, coefficients)
    return first + second.loss + third + fourth


def modules(logits: Tensor, hidden: Tensor, weight: Tensor, labels: Tensor, rewards: Tensor) -> Tensor:
    loss: Tensor = ConSPOLoss(tau=0.5).forward(logits, labels, rewards, 4, margin=0.1)
    output: ConSPOOutput = LinearConSPOLoss(shift=True).forward(hidden, weight, labels, rewards, 4, return_metrics=True)
    return loss + output.loss
