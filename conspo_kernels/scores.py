"""From log-probabilities of tokens to scores of rollouts."""

from __future__ import annotations

from torch import Tensor

from .inputs.parallel import Parallel
from .inputs.tokens import TokenLayout
from .ops.ranks import name_of, sum_over_ranks, whole_scores
from .ops.sequence_score import sequence_score


def rollout_scores(
    logprobs: Tensor, tokens: TokenLayout, parallel: Parallel, implementation: str
) -> tuple[Tensor, Tensor]:
    """Scores [S] of log-probabilities [B, T], and counts [S] of response tokens: of whole rollouts, over all ranks."""
    split = parallel.context is not None
    summed = logprobs.double() if split else logprobs  # a rank's part of a mean is not rounded before it is added
    scores, counts = sequence_score(summed, tokens.labels, tokens.offsets, implementation)
    if not split:
        return scores, counts
    scores, counts = whole_scores(scores, counts, name_of(parallel.context), parallel.context_factor)
    return scores.to(logprobs.dtype), counts


def response_counts(tokens: TokenLayout, parallel: Parallel) -> Tensor:
    """[S] int32 response tokens of whole rollouts."""
    counts = tokens.counts()
    return counts if parallel.context is None else sum_over_ranks(counts, name_of(parallel.context))
