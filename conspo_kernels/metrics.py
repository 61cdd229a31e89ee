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

    positives, negatives = per_group(positive), per_group(negative)
    num_groups = (per_group(torch.ones_like(positive)) > 0).sum()
    num_valid = (positives > 0).sum()
    if denominator is None:
        denominator = num_valid.clamp(min=1)
    q = -weights * positives[slots] * denominator
    score_pos, score_neg = mean(scores, positive), mean(scores, negative)
    pairs = positives * negatives
    metrics = {
        "loss": loss if loss.dim() == 0 else loss.sum() / num_valid.clamp(min=1),
        "margin": margin,
        "score_pos_mean": score_pos,
        "score_neg_mean": score_neg,
        "score_gap": score_pos - score_neg,
        "score_std": within_group_std(scores, positive | negative, slots),
        "ordered_pairs": (ordered_pairs(scores, positive, negative, slots) / pairs.clamp(min=1)).sum() / num_valid,
        "pos_prob_mean": mean(1 - q, positive),
        "valid_group_fraction": num_valid.to(dtype) / num_groups,
        "weight_abs_max": weights.abs().max() if weights.numel() else weights.new_zeros(()),
        "skipped_rollouts": unscorable.sum(),
    }
    if counts is not None:
        metrics["response_tokens"] = counts.sum()
    return {f"conspo/{name}": value.detach().to(dtype) for name, value in metrics.items()}


def within_group_std(scores: Tensor, where: Tensor, slots: Tensor) -> Tensor:
    """0-d: the root of the mean squared distance of scores to their group's mean, over the rollouts `where` is true."""
    counts = torch.zeros_like(scores).index_add(0, slots, where.to(scores.dtype))
    # In fp64: on a GPU the order of these additions is open, and must not reach the digits of fp32.
    sums = torch.zeros_like(scores, dtype=torch.float64).index_add(0, slots, torch.where(where, scores, 0.0).double())
    means = sums / counts.clamp(min=1)
    squares = torch.where(where, scores - means[slots], 0.0).square()
    return (squares.sum() / where.sum()).sqrt()


def ordered_pairs(scores: Tensor, positive: Tensor, negative: Tensor, slots: Tensor) -> Tensor:
    """[S], by slot: the (positive, negative) pairs of a group in which the positive has the greater score.

    O(S log S): in an order by group and score, a positive's pairs are the negatives of its group before it.
    """
    order = torch.argsort(positive, descending=True, stable=True)  # a tie is not ordered: the positive comes first
    order = order[torch.argsort(scores[order], stable=True)]
    order = order[torch.argsort(slots[order], stable=True)]
    negatives = negative[order].to(torch.int64)
    before = negatives.cumsum(0)
    by_slot = torch.zeros_like(slots).index_add(0, slots[order], negatives)
    before_group = by_slot.cumsum(0) - by_slot
    wins = torch.where((positive & ~scores.isnan())[order], before - before_group[slots[order]], 0)
    return torch.zeros_like(scores).index_add(0, slots[order], wins.to(scores.dtype))
