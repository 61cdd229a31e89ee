"""Tolerances: no worse than twice what eager PyTorch reaches in the same dtype, plus a floor of rounding.

`command.py` has them as a table. The gradient check and the tests take their tolerances from here.
"""

from __future__ import annotations

import torch
from torch import Tensor

RELATIVE_FP64 = 1e-10
LOGPROB_ERROR = 1e-5  # whatever the dtype, for |logits| <= 50


def max_error(actual: Tensor, exact: Tensor) -> float:
    """The largest absolute difference; infinite where NaN and infinities are not in the same places."""
    actual, exact = actual.detach().double().cpu(), exact.detach().double().cpu()
    special = ~exact.isfinite()
    if actual.shape != exact.shape or not torch.equal(actual.isnan(), exact.isnan()):
        return torch.inf
    if not torch.equal(actual[special].nan_to_num(), exact[special].nan_to_num()):
        return torch.inf
    return (actual - exact)[~special].abs().max().item() if (~special).any() else 0.0


def magnitude(*values: Tensor) -> float:
    """The largest finite magnitude."""
    return max((v[v.isfinite()].abs().max().item() for v in values if v.isfinite().any()), default=0.0)


def value_floor(exact: Tensor, accumulate: torch.dtype, size: float = 0.0) -> float:
    """A few roundings of the accumulator, relative to the largest number that took part."""
    return 8 * torch.finfo(accumulate).eps * max(1.0, magnitude(exact), size)


def grad_floor(exact: Tensor, dtype: torch.dtype, scores: Tensor, tau: float) -> float:
    """Relative to the largest gradient: a rounding to its dtype, and that of a score, which weights see / tau."""
    relative = torch.finfo(dtype).eps + torch.finfo(torch.float32).eps * magnitude(scores) / tau
    return relative * magnitude(exact) + torch.finfo(dtype).tiny  # subnormals may be flushed


def allowed_error(eager: Tensor, exact: Tensor, floor: float) -> float:
    """Twice the error of eager PyTorch, and a floor. Where eager PyTorch fails altogether, it gives no licence."""
    error = max_error(eager, exact)
    return 2 * (error if error < torch.inf else 0.0) + floor
