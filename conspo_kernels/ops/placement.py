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
    """A copy of x on the device, in the dtype, made without waiting for the device."""
    return to_device(x, device, dtype)


def _fake_places(keep: Tensor, device: torch.device) -> Tensor:
    number = torch.library.get_ctx().new_dynamic_size(min=0, max=keep.shape[0])
    return torch.empty(number, dtype=torch.int64, device=device)


@op(_fake_places)
def token_places(keep: Tensor, device: torch.device) -> Tensor:
    """[n] int64 on a device: the indices at which `keep` [N] bool, on the CPU, is True."""
    return to_device(keep.nonzero()[:, 0], device)
