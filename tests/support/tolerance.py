"""Assertions with the tolerances of the gradient check."""

from __future__ import annotations

import torch
from torch import Tensor

from conspo_kernels.gradcheck.tolerance import allowed_error, grad_floor, value_floor

__all__ = ["assert_accurate", "grad_floor", "max_error", "value_floor"]


def max_error(actual: Tensor, exact: Tensor) -> float:
    """Largest absolute difference; NaN and infinities have to be in the same places."""
    actual, exact = actual.detach().double().cpu(), exact.detach().double().cpu()
    assert actual.shape == exact.shape, (actual.shape, exact.shape)
    special = ~exact.isfinite()
    torch.testing.assert_close(actual[special], exact[special], rtol=0, atol=0, equal_nan=True)
    return (actual - exact)[~special].abs().nan_to_num(nan=torch.inf).max().item() if (~special).any() else 0.0


def assert_accurate(actual: Tensor, eager: Tensor, exact: Tensor, floor: float, what: str) -> None:
    error, allowed = max_error(actual, exact), allowed_error(eager, exact, floor)
    assert error <= allowed, f"{what}: error {error:.3g}, allowed {allowed:.3g} (floor {floor:.3g})"
