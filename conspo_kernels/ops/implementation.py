"""Which implementation of an op runs. An explicit name runs or raises; "auto" logs its choice once."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import os
from types import ModuleType

import torch

logger = logging.getLogger("conspo_kernels")

HAS_TRITON = importlib.util.find_spec("triton") is not None


def _interpreting() -> bool:
    """Whether Triton's kernels run on the CPU: decided when Triton defines them, by the environment."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def unavailable(implementation: str, device: torch.device) -> str | None:
    """Why an implementation cannot run on a device, or None."""
    if implementation == "torch":
        return None
    if implementation == "native":
        return "this build has no native extension"
    if not HAS_TRITON:
        return "Triton is not installed"
    if device.type != "cuda" and not _interpreting():
        return f"Triton runs on CUDA tensors (or, for tests, with TRITON_INTERPRET=1), the tensors are on {device}"
    return None


@functools.lru_cache(maxsize=64)
def choose(op: str, implementation: str, device: torch.device) -> str:
    """The implementation of an op for tensors on a device: "auto" means Triton on a GPU, PyTorch elsewhere."""
    if implementation != "auto":
        reason = unavailable(implementation, device)
        if reason is not None:
            raise ValueError(f"implementation={implementation!r} cannot run {op} here: {reason}")
        return implementation
    chosen = "triton" if device.type == "cuda" and unavailable("triton", device) is None else "torch"
    logger.info("%s on %s: implementation=%r", op, device, chosen)
    return chosen


@functools.lru_cache(maxsize=64)
def twin(op: str, implementation: str, device: torch.device) -> ModuleType:
    """The module of `kernels` that runs an op."""
    return importlib.import_module(f"..kernels.{op}_{choose(op, implementation, device)}", __package__)
