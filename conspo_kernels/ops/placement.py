"""conspo::placed: a tensor on another device or in another dtype, as an op, so that torch.compile sees no transfer."""

from __future__ import annotations

import torch
from torch import Tensor

from ..registration import op
from ..transfer import to_device


def beside(x: Tensor, other: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """x on the device of another tensor; x itself where it is there already, in the dtype."""
    dtype = x.dtype if dtype is None else dtype
    return x if x.device == other.device and x.dtype == dtype else placed(x.detach(), other.device, dtype)


def _fake(x: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.empty(x.shape, device=device, dtype=dtype)


@op(_fake)
def placed(x: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """A copy of x, which is elsewhere or of another dtype, without waiting for the device."""
    return to_device(x, device, dtype)
