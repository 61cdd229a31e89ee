"""ConSPO in TRL 1.16: `ConSPOConfig` and `ConSPOTrainer`, exact groups on `GRPOTrainer`.

TRL is imported when one of them is first asked for: importing this module imports nothing of it.
"""

from __future__ import annotations

from typing import Any

from . import config, trainer

__all__ = [
    "ConSPOConfig",
    "ConSPOTrainer",
]


def __getattr__(name: str) -> Any:
    if name == "ConSPOConfig":
        return config.config_class()
    if name == "ConSPOTrainer":
        return trainer.trainer_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
