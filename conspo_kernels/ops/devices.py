"""Tensors from the host to a device, or to another dtype: without waiting, without a race, and, where torch.compile has
to see no transfer, as ops.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .registration import op

PINNED = frozenset({"cuda"})  # devices that copy asynchronously from pinned memory


def staged(x: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy in pinned memory."""
    return torch.empty(x.shape, dtype=dtype, device="cpu", pin_memory=True).copy_(x)


def to_device(x: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """x on a device; x itself where it is there already.

    A copy from pageable memory may make the driver wait for the device. One from the caller's pinned memory is
    under way when the call returns, and a caller who fills that memory again changes what arrives. So the host first
    copies into pinned memory of its own, which torch's allocator does not hand out again before the copy is over.

    Raises:
        ValueError: a CUDA graph is being captured: the host's copy is no part of it.
    """
    dtype = x.dtype if dtype is None else dtype
    if x.device.type == "cpu" and device.type in PINNED:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise ValueError(
                "a CUDA graph would replay the values of its capture: rewards, groups, weights, coefficients and "
                f"cu_seqlens must be on {device} while it is captured, got one of shape {list(x.shape)} on the CPU"
            )
        return staged(x, dtype).to(device, non_blocking=True)
    return x.to(device, dtype)


def constant(value: float | Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """A number as a 0-d tensor, so that another value does not compile another program; tensors stay live.

    In eager mode it stays on the CPU: a kernel takes it as an argument, and no launch copies it.
    """
    if isinstance(value, Tensor):
        return value.detach().resolve_neg()
    if torch.compiler.is_compiling():
        # Dynamo turns a float that is added to a tensor into an input of the graph, and one that fills it into a guard.
        return torch.zeros((), dtype=dtype, device=device) + value
    return torch.full((), value, dtype=dtype, device="cpu")


def moved(x: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """x, detached, on a device and in a dtype; x itself where nothing changes."""
    dtype = x.dtype if dtype is None else dtype
    return x if x.device == device and x.dtype == dtype else copied_to(x=x.detach(), device=device, dtype=dtype)


@op(lambda it: torch.empty(it.x.shape, device=it.device, dtype=it.dtype))
def copied_to(x: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """A copy of x on the device, in the dtype, made without waiting for the device; contiguous whatever x is."""
    return to_device(x, device, dtype).contiguous()


def _fake_indices(it: Any) -> Tensor:
    number = torch.library.get_ctx().new_dynamic_size(min=0, max=it.mask.shape[0])
    return torch.empty(number, dtype=torch.int64, device=it.device)


@op(_fake_indices)
def true_indices(mask: Tensor, device: torch.device) -> Tensor:
    """[n] int64 on a device: the indices at which `mask` [N] bool, on the CPU, is True."""
    return to_device(mask.nonzero()[:, 0], device)
