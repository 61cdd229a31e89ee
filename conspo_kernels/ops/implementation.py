"""Which implementation of an op runs. An explicit name runs or raises; "auto" logs its choice once."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import os
from typing import Any

import torch

from ..kernels import native

logger = logging.getLogger("conspo_kernels")

HAS_TRITON = importlib.util.find_spec("triton") is not None
executed = False  # Triton's kernels run on CPU tensors as compiled PTX: set by `ptx.compiled`
BEST = {"cuda": "triton", "cpu": "native"}  # where it can run; "torch" elsewhere


def _interpreting() -> bool:
    """Whether Triton's kernels run on the CPU: decided when Triton defines them, by the environment."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def unavailable(implementation: str, device: torch.device) -> str | None:
    """Why an implementation cannot run on a device, or None."""
    if implementation == "torch":
        return None
    if implementation == "native":
        if device.type != "cpu":
            return f"the native kernels run on CPU tensors, the tensors are on {device}"
        return native.OBSTACLE
    if not HAS_TRITON:
        return "Triton is not installed"
    if device.type != "cuda" and not _interpreting() and not executed:
        return f"Triton runs on CUDA tensors (or, for tests, with TRITON_INTERPRET=1), the tensors are on {device}"
    return None


@functools.lru_cache(maxsize=64)
def choose(op: str, implementation: str, device: torch.device) -> str:
    """The implementation of an op for tensors on a device: "auto" is Triton on a GPU, native on a CPU, else PyTorch."""
    if implementation != "auto":
        reason = unavailable(implementation, device)
        if reason is not None:
            raise ValueError(f"implementation={implementation!r} cannot run {op} here: {reason}")
        return implementation
    best = BEST.get(device.type, "torch")
    reason = unavailable(best, device)
    if reason is None:
        logger.info("%s on %s: implementation=%r", op, device, best)
        return best
    # An extension that was built and does not load is a surprise, one that was never built is not.
    level = logging.WARNING if best == "native" and native.BUILT else logging.INFO
    logger.log(level, "%s on %s: implementation='torch', not %r: %s", op, device, best, reason)
    return "torch"


@functools.lru_cache(maxsize=64)
def twin(op: str, implementation: str, device: torch.device) -> Any:
    """What runs an op: a module of `kernels`, or the part of `kernels.native` that is one op's."""
    chosen = choose(op, implementation, device)
    if chosen == "native":
        return getattr(native, op)
    return importlib.import_module(f"..kernels.{op}_{chosen}", __package__)
