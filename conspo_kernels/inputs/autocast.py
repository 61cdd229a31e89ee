"""Tensors in the dtype that autocast multiplies in, as `F.linear` would have them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """What autocast multiplies in on a device, where it is on.

    "meta" has no autocast, and torch raises. It is named here because torch.compile of 2.11 does not trace
    `torch.amp.is_autocast_available`.
    """
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x as autocast casts the operands of a product; fp64 stays."""
    return x if x.dtype == torch.float64 else x.to(dtype)


def cast_weight(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """`cast` of a parameter [V, H]. Autocast casts it once and keeps the result until its outermost context ends.

    At 151,936 x 4,096 a cast moves 3.7 GB. torch has no function that reads its cache. `F.linear` does, and saves the
    cached weight for its backward. With an input of no rows it launches the cast and no more.
    """
    cacheable = weight.dtype == torch.float32 and weight.is_leaf and weight.requires_grad and weight._base is None
    if not cacheable or torch.compiler.is_compiling() or not torch.is_autocast_cache_enabled():
        return cast(weight, dtype)
    # With a graph even if the caller wants none: a weight cached without one would give no gradient later.
    with torch.enable_grad():
        rows = torch.empty(0, weight.shape[1], dtype=dtype, device=weight.device, requires_grad=True)
        saved = getattr(F.linear(rows, weight).grad_fn, "_saved_mat2", None)
        cached = None if saved is None else saved.t()
    if cached is None or cached.dtype != dtype or cached.shape != weight.shape or not cached.requires_grad:
        return cast(weight, dtype)  # another torch saves something else, or it was kept without a graph
    return cached if torch.is_grad_enabled() else cached.detach()
