"""Which backend runs the ops. An explicit name runs or raises; "auto" logs its choice once.

A backend is a line of BACKENDS and a folder (or module) that is a `contract.Backend`.
"""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Sequence
from typing import cast

import torch

from .contract import Backend

logger = logging.getLogger("conspo_kernels")

# The public name of each backend, and its module: relative to this package, or absolute.
BACKENDS = {
    "triton": ".triton",
    "native": ".native",
    "torch": ".eager",
}
FUNCTIONS = [name for name in vars(Backend) if not name.startswith("_")]
PREFERRED = {"cuda": "triton", "cpu": "native"}  # where it can run; "torch" elsewhere


def _backend(implementation: str) -> Backend:
    return cast("Backend", importlib.import_module(BACKENDS[implementation], __package__))


def _refuse_without(functions: Sequence[str], implementation: str) -> None:
    missing = [name for name in functions if not hasattr(_backend(implementation), name)]
    if missing:
        raise TypeError(f"backend {implementation!r} lacks functions of its contract, backends/contract.py: {missing}")


def unavailable(implementation: str, device: torch.device) -> str | None:
    """Why an implementation cannot run on a device, or None."""
    _refuse_without(["obstacle"], implementation)
    return _backend(implementation).obstacle(device)


@functools.lru_cache(maxsize=64)
def choose(implementation: str, device: torch.device) -> str:
    """The implementation for tensors on a device: "auto" is Triton on a GPU, native on a CPU, else PyTorch."""
    if implementation != "auto":
        reason = unavailable(implementation, device)
        if reason is not None:
            raise ValueError(f"implementation={implementation!r} cannot run here: {reason}")
        return implementation
    preferred = PREFERRED.get(device.type, "torch")
    reason = unavailable(preferred, device)
    if reason is None:
        logger.info("on %s: implementation=%r", device, preferred)
        return preferred
    logger.warning("on %s: implementation='torch', not %r: %s", device, preferred, reason)
    return "torch"


@functools.lru_cache(maxsize=64)
def backend_for(implementation: str, device: torch.device) -> Backend:
    """What runs the ops for tensors on a device."""
    chosen = choose(implementation, device)
    _refuse_without(FUNCTIONS, chosen)
    return _backend(chosen)


def forget_choices() -> None:
    """Choose anew: what can run has changed."""
    choose.cache_clear()
    backend_for.cache_clear()
