"""The ops in PyTorch, for any device: implementation="torch"."""

from __future__ import annotations

import torch

from .. import contract
from . import group_infonce, label_alignment, scale, sequence_score, token_logprob

# For the type checker: these modules keep the contract.
_: contract.Ops = (token_logprob, sequence_score, group_infonce, scale, label_alignment)


def obstacle(device: torch.device) -> str | None:
    """Why PyTorch cannot run on a device: it can."""
    del device
    return None
