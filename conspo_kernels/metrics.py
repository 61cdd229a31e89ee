"""What a training loop logs, from scores, weights and roles; computed only when asked for."""

from __future__ import annotations

import torch
from torch import Tensor


def conspo_metrics(
    loss: Tensor,
    margin: Tensor,
    scores: Tensor,
    weights: Tensor,
    positive: Tensor,
    negative: Tensor,
    unscorable: Tensor,
    slots: Tensor,
    denominator: Tensor | None,
    counts: Tensor | None,
) -> dict[str, Tensor]:
    """The `conspo/...` metrics, 0-d tensors on the device of the scores; NaN where there is no value to average.

    Args:
        loss: 0-d, or the groups' losses: their mean over the valid ones is logged.
        margin: 0-d.
        scores: [S].
        weights: [S] dloss/dscores.
        positive: [S] bool, in a valid group.
        negative: [S] bool, in a valid group.
        unscorable: [S] bool.
        slots: [S] int64, the group of each rollout.
        denominator: what the weights were divided by, or None: the number of valid groups.
        counts: [S] response tokens, or None: not known.
    """
    dtype = scores.dtype

    def mean(values: Tensor, where: Tensor) -> Tensor:
        return torch.where(where, values, 0.0).sum() / where.sum()

    def per_group(where: Tensor) -> Tensor:
        # Sums of ones: exact, so their order does not matter.
        return torch.zeros_like(scores).index_add(0, slots, where.to(dtype))

    positives = per_group(positive)
    num_groups = (per_group(torch.ones_like(positive)) > 0).sum()
    num_valid = (positives > 0).sum()
    if denominator is None:
        denominator = num_valid.clamp(min=1)
    q = -weights * positives[slots] * denominator
    score_pos, score_neg = mean(scores, positive), mean(scores, negative)
    metrics = {
        "loss": loss if loss.dim() == 0 else loss.sum() / num_valid.clamp(min=1),
        "margin": margin,
        "score_pos_mean": score_pos,
        "score_neg_mean": score_neg,
        "score_gap": score_pos - score_neg,
        "pos_prob_mean": mean(1 - q, positive),
        "valid_group_fraction": num_valid.to(dtype) / num_groups,
        "weight_abs_max": weights.abs().max() if weights.numel() else weights.new_zeros(()),
        "skipped_rollouts": unscorable.sum(),
    }
    if counts is not None:
        metrics["response_tokens"] = counts.sum()
    return {f"conspo/{name}": value.detach().to(dtype) for name, value in metrics.items()}
