"""The loss on prepared values: log-probabilities -> scores -> loss and weights -> metrics. Nothing is checked here."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .metrics import conspo_metrics
from .objective import Groups, Objective, Rollouts
from .ops.devices import moved
from .ops.infonce import infonce
from .ops.ranks import gather_rollouts, name_of, sum_over_ranks, whole_scores
from .ops.sequence_score import sequence_score
from .parallel import Parallel
from .sources import Source
from .values import IGNORED, Tokens


class ConSPOOutput(NamedTuple):
    """The result with `return_metrics=True`; all but the loss detached.

    loss: as without metrics.  metrics: 0-d tensors named `conspo/...`.  scores: [S].  logprobs: shaped like labels, or
    None where the loss was computed from scores.
    """

    loss: Tensor
    metrics: dict[str, Tensor]
    scores: Tensor
    logprobs: Tensor | None


class Evaluated(NamedTuple):
    """loss: 0-d, or as reduction "none" has it, with a graph.  Of rollouts, over all ranks: scores [S], weights [S],
    dloss/dscores, and counts [S] of response tokens.

    rollouts: as they were gathered.  local_indices: int64, which of them are this rank's; None: all.
    """

    loss: Tensor
    scores: Tensor
    counts: Tensor | None
    weights: Tensor
    rollouts: Rollouts
    local_indices: Tensor | None = None


def rollout_scores(logprobs: Tensor, tokens: Tokens, parallel: Parallel, implementation: str) -> tuple[Tensor, Tensor]:
    """Scores [S] of log-probabilities [B, T], and counts [S] of response tokens: of whole rollouts, over all ranks."""
    split = parallel.context is not None
    scores, counts = sequence_score(
        logprobs=logprobs.double() if split else logprobs,  # a rank's part of a mean is not rounded before it is added
        labels=tokens.labels,
        offsets=tokens.offsets,
        implementation=implementation,
    )
    if not split:
        return scores, counts
    scores, counts = whole_scores(
        scores=scores, counts=counts, group=name_of(parallel.context), factor=parallel.context_factor
    )
    return scores.to(logprobs.dtype), counts


def loss_of_tokens(
    source: Source, tokens: Tokens, rollouts: Rollouts, objective: Objective, return_metrics: bool
) -> Tensor | ConSPOOutput:
    """The loss of rollouts with log-probabilities from a source."""
    logprobs, _entropy = source.logprobs(tokens)
    parallel, implementation = source.parallel, source.implementation
    if parallel.context is None and parallel.data is None:
        result = _evaluate(logprobs, tokens.labels, tokens.offsets, rollouts, objective, implementation)
        scores = result.scores
    else:
        scores, counts = rollout_scores(logprobs, tokens, parallel, implementation)
        counts = counts if tokens.counts is None else tokens.counts
        result = loss_of_scores(scores, counts, rollouts, objective, parallel, implementation)
    if not return_metrics:
        return result.loss
    if parallel.data is None and tokens.counts is not None:
        result = result._replace(counts=tokens.counts)
    metrics = metrics_of(result, objective)
    if tokens.num_dropped is not None:
        number = tokens.num_dropped
        if parallel.data is not None:
            number = sum_over_ranks(x=number, group=name_of(parallel.data))
        metrics["conspo/uncomputed_rollouts"] = number.to(scores.dtype)
    return ConSPOOutput(result.loss, metrics, scores.detach(), logprobs.detach().view(tokens.shape))


def loss_of_scores(
    scores: Tensor,
    counts: Tensor | None,
    rollouts: Rollouts,
    objective: Objective,
    parallel: Parallel,
    implementation: str,
) -> Evaluated:
    """The loss of scores [S], rollouts of one token.  counts: [S] response tokens; None: a NaN score has none."""
    local_indices = None
    if parallel.data is not None:
        scores, counts, rollouts, local_indices = _gathered(scores, counts, rollouts, objective, parallel)
    labels = torch.where(scores.isnan() if counts is None else counts <= 0, IGNORED, 0)
    result = _evaluate(scores[:, None], labels[:, None], None, rollouts, objective, implementation)
    return result._replace(counts=counts, local_indices=local_indices)


def _evaluate(
    logprobs: Tensor,
    labels: Tensor,
    offsets: Tensor | None,
    rollouts: Rollouts,
    objective: Objective,
    implementation: str,
) -> Evaluated:
    rewards, groups = rollouts
    loss, scores, counts, weights = infonce(
        logprobs=logprobs,
        labels=labels,
        offsets=offsets,
        rewards=rewards,
        group_size=groups.size,
        group_ids=groups.ids,
        group_order=groups.order,
        group_offsets=groups.offsets,
        margin=objective.margin,
        num_groups=objective.num_groups,
        tau=objective.tau,
        reward_threshold=objective.reward_threshold,
        reduction=objective.reduction,
        implementation=implementation,
    )
    if objective.reduction == "none" and groups.size == 0:
        loss = _at_first_rollouts(loss, groups)
    return Evaluated(loss, scores, counts, weights, rollouts)


def _at_first_rollouts(losses: Tensor, groups: Groups) -> Tensor:
    """Losses of groups [K] -> [S], each at its group's first rollout, 0 at the others."""
    ids, order, offsets = (moved(x, losses.device) for x in groups[1:] if x is not None)
    first = order[offsets[ids]] == torch.arange(len(ids), device=losses.device)
    return torch.where(first, losses[ids], 0.0)


def _gathered(
    scores: Tensor, counts: Tensor | None, rollouts: Rollouts, objective: Objective, parallel: Parallel
) -> tuple[Tensor, Tensor | None, Rollouts, Tensor]:
    """The rollouts of all ranks, and the indices of this rank's among them."""
    rewards, groups = rollouts
    # Rewards are compared before they travel, in their own dtype: dtypes, and so rounding, may differ by rank.
    sign = torch.where(rewards > float(objective.reward_threshold), torch.inf, -torch.inf)
    all_scores, rewards, all_counts, ids, local_indices = gather_rollouts(
        scores=scores,
        rewards=torch.where(rewards.isnan(), torch.nan, sign),
        counts=counts,
        ids=groups.ids,
        group_size=groups.size,
        group=name_of(parallel.data),
        factor=parallel.data_factor,
    )
    if groups.ids is not None:
        groups = Groups.of_ids(ids)
    return all_scores, None if counts is None else all_counts, Rollouts(rewards, groups), local_indices


def metrics_of(result: Evaluated, objective: Objective) -> dict[str, Tensor]:
    """What a training loop logs."""
    scores, counts, (rewards, groups) = result.scores.detach(), result.counts, result.rollouts
    device, dtype = scores.device, scores.dtype
    rollouts = Rollouts(moved(rewards, device), groups)
    has_tokens = ~scores.isnan() if counts is None else counts > 0
    ids = groups.ids
    if ids is None:
        ids = torch.arange(scores.shape[0], device=device) // groups.size
    denominator = objective.num_groups
    if denominator is not None:
        denominator = moved(denominator, device, dtype)
    elif objective.reduction != "mean":
        denominator = scores.new_ones(())
    return conspo_metrics(
        result.loss,
        scores,
        result.weights,
        *rollouts.sides(has_tokens, objective.reward_threshold),
        moved(ids, device),
        counts,
        moved(objective.margin, device, dtype),
        denominator,
    )
