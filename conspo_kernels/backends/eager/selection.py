"""Numbers of the tokens that take part, put together and back in their places: PyTorch."""

from __future__ import annotations

from torch import Tensor


def gather(tensors: list[Tensor], places: Tensor) -> list[Tensor]:
    """[N] each -> [n] each, those at rising places [n]."""
    return [x.index_select(0, places) for x in tensors]


def spread(tensors: list[Tensor], places: Tensor, total: int) -> list[Tensor]:
    """[n] each -> [N] each, at rising places [n], zero elsewhere."""
    return [x.new_zeros(total).index_copy_(0, places, x) for x in tensors]
