"""What a training loop logs, from scores, weights and rewards; computed only when asked for."""

from __future__ import annotations

import torch
from torch import Tensor


def conspo_metrics(
    loss: Tensor,
    scores: Tensor,
    weights: Tensor,
    positive: Tensor,
    negative: Tensor,
    group_ids: Tensor,
    counts: Tensor | None,
    margin: Tensor,
    denominator: Tensor | None,
) -> dict[str, Tensor]:
    """The `conspo/...` metrics, 0-d tensors on the device of the scores; NaN where there is no value to average.

    Args:
        loss: 0-d, or the groups' losses: their mean over the valid ones is logged.
        scores: [S].
        weights: [S] dloss/dscores.
        positive, negative: [S] bool; a rollout that is neither is unscorable.
        group_ids: [S] int64, the group of each rollout.
        counts: [S] response tokens, or None: unknown.
        margin: 0-d.
        denominator: divisor of the weights; None: the number of valid groups.
    """
    dtype, index = scores.dtype, group_ids
    skipped = ~(positive | negative)

    def mean(values: Tensor, where: Tensor) -> Tensor:
        return torch.where(where, values, 0.0).sum() / where.sum()

    def per_group(where: Tensor) -> Tensor:
        # Sums of ones: exact, so their order does not matter.
        return torch.zeros_like(scores).index_add(0, index, where.to(dtype))

    positives, negatives = per_group(positive), per_group(negative)
    valid = (positives > 0) & (negatives > 0)
    positive, negative = positive & valid[index], negative & valid[index]
    num_groups = (per_group(torch.ones_like(positive)) > 0).sum()
    num_valid = valid.sum()
    if denominator is None:
        denominator = num_valid.clamp(min=1)
    q = -weights * positives[index] * denominator
    score_pos, score_neg = mean(scores, positive), mean(scores, negative)
    pairs = positives * negatives
    metrics = {
        "loss": loss if loss.dim() == 0 else loss.sum() / num_valid.clamp(min=1),
        "margin": margin,
        "score_pos_mean": score_pos,
        "score_neg_mean": score_neg,
        "score_gap": score_pos - score_neg,
        "score_std": within_group_std(scores, positive | negative, index),
        "ordered_pairs": (ordered_pairs(scores, positive, negative, index) / pairs.clamp(min=1)).sum() / num_valid,
        "pos_prob_mean": mean(1 - q, positive),
        "valid_group_fraction": num_valid.to(dtype) / num_groups,
        "weight_abs_max": weights.abs().max() if weights.numel() else weights.new_zeros(()),
        "skipped_rollouts": skipped.sum(),
    }
    if counts is not None:
        metrics["response_tokens"] = counts.sum()
    return {f"conspo/{name}": value.detach().to(dtype) for name, value in metrics.items()}


def within_group_std(scores: Tensor, where: Tensor, index: Tensor) -> Tensor:
    """0-d: the root of the mean squared distance of scores to their group's mean, over the rollouts `where` is true."""
    counts = torch.zeros_like(scores).index_add(0, index, where.to(scores.dtype))
    # In fp64: on a GPU the order of these additions is open, and must not reach the digits of fp32.
    sums = torch.zeros_like(scores, dtype=torch.float64).index_add(0, index, torch.where(where, scores, 0.0).double())
    means = sums / counts.clamp(min=1)
    squares = torch.where(where, scores - means[index], 0.0).square()
    return (squares.sum() / where.sum()).sqrt()


def ordered_pairs(scores: Tensor, positive: Tensor, negative: Tensor, index: Tensor) -> Tensor:
    """[S], by group: the (positive, negative) pairs of a group in which the positive has the greater score.

    O(S log S): in an order by group and score, a positive's pairs are the negatives of its group before it.
    """
    order = torch.argsort(positive, descending=True, stable=True)  # a tie is not ordered: the positive comes first
    order = order[torch.argsort(scores[order], stable=True)]
    order = order[torch.argsort(index[order], stable=True)]
    negatives = negative[order].to(torch.int64)
    before = negatives.cumsum(0)
    by_group = torch.zeros_like(index).index_add(0, index[order], negatives)
    before_group = by_group.cumsum(0) - by_group
    wins = torch.where((positive & ~scores.isnan())[order], before - before_group[index[order]], 0)
    return torch.zeros_like(scores).index_add(0, index[order], wins.to(scores.dtype))
