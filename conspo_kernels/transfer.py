"""From the host to a device, without waiting and without a race."""

from __future__ import annotations

import torch
from torch import Tensor

PINNED = frozenset({"cuda"})  # devices that copy asynchronously from pinned memory


def staged(x: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy in pinned memory."""
    return torch.empty(x.shape, dtype=dtype, device="cpu", pin_memory=True).copy_(x)


def to_device(x: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """x on a device; x itself where it is there already.

    A copy from pageable memory may make the driver wait for the device. One from the caller's pinned memory is
    under way when the call returns, and a caller who fills that memory again changes what arrives. So the host first
    copies into pinned memory of its own, which torch's allocator does not hand out again before the copy is over.
    """
    dtype = x.dtype if dtype is None else dtype
    if x.device.type == "cpu" and device.type in PINNED:
        return staged(x, dtype).to(device, non_blocking=True)
    return x.to(device, dtype)
