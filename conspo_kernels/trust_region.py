"""A bound on how far several updates on one batch of rollouts go, which the objective does not have."""

from __future__ import annotations

import torch
from torch import Tensor

from .inputs import check


@torch.no_grad()
def trust_region(coefficients: Tensor, logprobs: Tensor, old_logprobs: Tensor, epsilon: float | None) -> Tensor:
    """Coefficients without those of tokens that have already gone far enough the way the gradient pushes them.

        ratio = exp(logprobs - old_logprobs)
        c -> 0   where c < 0 and ratio > 1 + epsilon, or c > 0 and ratio < 1 - epsilon;   else c

    As a loss falls, a negative coefficient raises a token's probability and a positive one lowers it. A clipped
    surrogate's gradient is zero at the same tokens. A token that has left the interval against its gradient keeps its
    coefficient, which brings it back.

    Args:
        coefficients: c = dloss/dlogprobs, of any shape, floating point: what `weighted_logprob_loss` takes.
        logprobs: of the policy now, shaped like coefficients.
        old_logprobs: of the policy that sampled, shaped like coefficients.
        epsilon: the ratio may leave 1 by so much, positive and finite; from 1 on nothing bounds it below. None: no
            trust region, the coefficients as they are.

    Returns:
        Shaped like coefficients, in their dtype, without a graph. Where every ratio is 1 it has the same bits.

    Raises:
        TypeError: an argument is no tensor, or epsilon no number.
        ValueError: shapes or devices differ, coefficients require a gradient, or epsilon is not positive and finite.

    Cost: reads three numbers per token and writes one; O(N) memory.

    Source: the clip of arXiv:1707.06347, as a condition on coefficients; not part of ConSPO's paper.
    """
    check.trust_region(coefficients, logprobs, old_logprobs, epsilon)
    if epsilon is None:
        return coefficients
    ratio = (logprobs - old_logprobs).exp()
    risen, fallen = ratio > 1 + epsilon, ratio < 1 - epsilon
    return coefficients.masked_fill((coefficients < 0) & risen | (coefficients > 0) & fallen, 0)
