"""Scores without a graph: of all rollouts of a group that is split over micro-batches, for ranking, for logs."""

from __future__ import annotations

import torch
from torch import Tensor

from .logprobs import TokenOptions, label_logprobs, layout_scores


@torch.no_grad()
def conspo_scores(
    logits: Tensor,
    labels: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    mask: Tensor | None = None,
    shift: bool = False,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    implementation: str = "auto",
) -> Tensor:
    """Scores of rollouts, without a graph.

    s[i] = (1 / n_i) * sum_t logp[i, t].

    Args:
        As `conspo_loss`.

    Returns:
        [S] fp32 (fp64 for fp64 logits), NaN for a rollout without response tokens. No gradient flows through them; for
        scores with one, call `sequence_scores(token_logprobs(...), ...)`.

    Raises:
        TypeError, ValueError: as `token_logprobs`.

    Cost: one read of the logits; O(N) memory.

    Source: arXiv:2605.12969.
    """
    options = TokenOptions(mask, cu_seqlens, shift, ignore_index, implementation, temperature, logit_scale, softcap)
    logprobs, _entropy, layout = label_logprobs(logits, labels, options, needed_for="scores")
    return layout_scores(logprobs, layout, options)[0]
