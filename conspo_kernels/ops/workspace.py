"""The workspace of the fused-linear path: how large it is, and whether it holds all logits."""

from __future__ import annotations

import torch
from torch import Tensor

from ..linear.tiles import Head
from ..linear.tiling import workspace_of


def default_workspace(device: torch.device) -> int:
    """Bytes for tiles of logits: a share of all memory of a device, not of its free part, as sums depend on it."""
    total = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0
    return workspace_of(total)


# What `torch.compiler.assume_constant_result` does. That function imports dynamo, and with it Triton, which has to be
# imported later: `gradcheck` first decides whether Triton interprets.
default_workspace._dynamo_marked_constant = True  # type: ignore[attr-defined]


def logits_fit(hidden: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, workspace: int) -> bool:
    """Whether the workspace holds the logits of all tokens: mode "store"."""
    row = Head(weight, bias, dtype).row_stride(weight.shape[0]) * dtype.itemsize
    return hidden.shape[0] * row <= workspace
