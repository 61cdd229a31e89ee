"""Calls as users write them, for the type checker: what returns what. mypy reads this file; nothing runs it."""

from __future__ import annotations

import torch
from torch import Tensor

import conspo_kernels as ck
from conspo_kernels.backends import eager, native, triton
from conspo_kernels.backends.contract import Backend
from conspo_kernels.backends.triton import functions


def losses(logits: Tensor, hidden: Tensor, weight: Tensor, labels: Tensor, rewards: Tensor, mask: Tensor) -> Tensor:
    margin = ck.CosineMargin(target=0.5, warmup_ratio=0.5, total_steps=10)
    plain: Tensor = ck.conspo_loss(logits, labels, rewards, 4, shift=True, response_mask=mask, margin=margin(3))
    plain.backward()
    output: ck.ConSPOOutput = ck.conspo_loss(logits, labels, rewards, rewards.long(), return_metrics=True)
    gap: Tensor = output.metrics["conspo/score_gap"]
    linear: Tensor = ck.linear_conspo_loss(hidden, weight, labels, rewards, 4, workspace_mib=256, bias=None)
    linear_output: ck.ConSPOOutput = ck.linear_conspo_loss(hidden, weight, labels, rewards, 4, return_metrics=True)
    split: Tensor = ck.conspo_loss_from_scores(output.scores, rewards, 4, parallel=ck.Parallel(grad_reduction="sum"))
    return plain + gap + linear + linear_output.loss + split


def parts(logits: Tensor, hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    logprobs: Tensor = ck.token_logprobs(logits, labels, temperature=0.7, softcap=30.0)
    logprobs, entropy = ck.token_logprobs(logits, labels, return_entropy=True)
    linear: Tensor = ck.linear_token_logprobs(hidden, weight, labels, logits_dtype=torch.float32)
    more, more_entropy = ck.linear_token_logprobs(hidden, weight, labels, return_entropy=True)
    scores: Tensor = ck.sequence_scores(logprobs, labels)
    return scores.sum() + entropy.sum() + linear.sum() + more.sum() + more_entropy.sum()


def phases(logits: Tensor, hidden: Tensor, weight: Tensor, labels: Tensor, rewards: Tensor) -> Tensor:
    scores: Tensor = ck.conspo_scores(logits, labels)
    weights: ck.ConSPOWeights = ck.conspo_weights(scores, rewards, 4, tau=0.5)
    first: Tensor = ck.weighted_score_loss(logits, labels, weights.weights, scores=scores)
    second: ck.ConSPOOutput = ck.linear_weighted_score_loss(
        hidden, weight, labels, weights.weights, return_metrics=True
    )
    coefficients = torch.ones_like(labels, dtype=torch.float32)
    third: Tensor = ck.weighted_logprob_loss(logits, labels, coefficients, inplace=True)
    fourth: Tensor = ck.linear_weighted_logprob_loss(hidden, weight, labels, coefficients)
    return first + second.loss + third + fourth


def modules(logits: Tensor, hidden: Tensor, weight: Tensor, labels: Tensor, rewards: Tensor) -> Tensor:
    loss: Tensor = ck.ConSPOLoss(tau=0.5).forward(logits, labels, rewards, 4, margin=0.1)
    output: ck.ConSPOOutput = ck.LinearConSPOLoss(shift=True).forward(
        hidden, weight, labels, rewards, 4, return_metrics=True
    )
    return loss + output.loss


def backends() -> tuple[Backend, Backend, Backend]:
    """Each keeps the contract."""
    assert triton.infonce is functions.infonce  # so this file is read anew when those change: a star is not followed
    return eager, native, triton
