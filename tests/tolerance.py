"""How right is right: no worse than twice what eager PyTorch reaches in the same dtype, plus a floor of rounding."""

from __future__ import annotations

import torch
from torch import Tensor


def value_floor(exact: Tensor, accumulate: torch.dtype) -> float:
    """A few roundings of the accumulator, relative to the largest number that took part."""
    scale = exact[exact.isfinite()].abs().max().item() if exact.isfinite().any() else 0.0
    return 8 * torch.finfo(accumulate).eps * max(1.0, scale)


def grad_floor(exact: Tensor, dtype: torch.dtype, scores: Tensor, tau: float) -> float:
    """Relative to the largest gradient: a rounding to its dtype, and that of a score, which weights see / tau."""
    if not exact.numel():
        return 0.0
    size = scores[scores.isfinite()].abs().max().item() if scores.isfinite().any() else 0.0
    relative = torch.finfo(dtype).eps + torch.finfo(torch.float32).eps * size / tau
    return relative * exact.abs().max().item() + torch.finfo(dtype).tiny  # subnormals may be flushed


def max_error(actual: Tensor, exact: Tensor) -> float:
    """Largest absolute difference; NaN and infinities have to be in the same places."""
    actual, exact = actual.detach().double().cpu(), exact.detach().double().cpu()
    assert actual.shape == exact.shape, (actual.shape, exact.shape)
    special = ~exact.isfinite()
    torch.testing.assert_close(actual[special], exact[special], rtol=0, atol=0, equal_nan=True)
    return (actual - exact)[~special].abs().nan_to_num(nan=torch.inf).max().item() if (~special).any() else 0.0


def assert_accurate(actual: Tensor, eager: Tensor, exact: Tensor, floor: float, what: str) -> None:
    error = max_error(actual, exact)
    finite = exact.isfinite()
    eager_error = (eager.detach().double().cpu() - exact)[finite].abs().nan_to_num(nan=0.0)
    allowed = 2 * (eager_error.max().item() if eager_error.numel() else 0.0) + floor
    assert error <= allowed, f"{what}: error {error:.3g}, allowed {allowed:.3g} (floor {floor:.3g})"
