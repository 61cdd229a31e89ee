"""ConSPO in TRL 1.16: `ConSPOConfig` and `ConSPOTrainer` on `GRPOTrainer`; `fused_loss_head` for any of its trainers.

TRL is imported when `ConSPOConfig` or `ConSPOTrainer` is first asked for, or the loss head is first replaced: importing
this module imports nothing of it.
"""

from __future__ import annotations

from typing import Any

from . import config, trainer
from .loss_head import disable_fused_loss_head, enable_fused_loss_head, fused_loss_head

__all__ = [
    "ConSPOConfig",
    "ConSPOTrainer",
    "disable_fused_loss_head",
    "enable_fused_loss_head",
    "fused_loss_head",
]


def __getattr__(name: str) -> Any:
    if name == "ConSPOConfig":
        return config.config_class()
    if name == "ConSPOTrainer":
        return trainer.trainer_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
