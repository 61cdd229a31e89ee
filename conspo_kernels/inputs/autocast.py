"""Tensors in the dtype that autocast multiplies in, as `F.linear` would have them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """What autocast multiplies in on a device, where it is on; some devices ("meta") have none, and torch raises."""
    if not torch.amp.is_autocast_available(device.type) or not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x as autocast casts the operands of a product; fp64 stays."""
    return x if x.dtype == torch.float64 else x.to(dtype)


def cast_weight(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The same of a parameter [V, H], which autocast casts once and keeps until its outermost context ends.

    At 151,936 x 4,096 a cast moves 3.7 GB. torch has no function that looks into its cache; but `F.linear` does, and
    saves the weight that it found for its backward. Of no rows at all it launches nothing beside the cast.
    """
    kept = weight.dtype == torch.float32 and weight.is_leaf and weight.requires_grad and weight._base is None
    if not kept or torch.compiler.is_compiling() or not torch.is_autocast_cache_enabled():
        return cast(weight, dtype)
    # With a graph, also where the caller wants none: what is kept without one would give the weight no gradient later.
    with torch.enable_grad():
        rows = torch.empty(0, weight.shape[1], dtype=dtype, device=weight.device, requires_grad=True)
        saved = getattr(F.linear(rows, weight).grad_fn, "_saved_mat2", None)
        found = None if saved is None else saved.t()
    if found is None or found.dtype != dtype or found.shape != weight.shape or not found.requires_grad:
        return cast(weight, dtype)  # another torch saves something else, or it was kept without a graph
    return found if torch.is_grad_enabled() else found.detach()
