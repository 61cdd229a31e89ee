"""A gradient times the scalar that comes in: PyTorch."""

from __future__ import annotations

from torch import Tensor


def scale_(gradient: Tensor, factor: Tensor) -> None:
    """gradient *= factor (0-d), at no cost where the factor is 1 and can be looked at without waiting."""
    if factor.device.type != "cpu" or factor.item() != 1:
        gradient.mul_(factor)
