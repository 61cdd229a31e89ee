"""Which backend runs an op. An explicit name runs or raises; "auto" logs its choice once.

A backend is a line of BACKENDS and a folder (or module): a function `obstacle(device)`, and for every op of
`contract.py` a module (or object) of that name.
"""

from __future__ import annotations

import functools
import importlib
import logging
from typing import Any, Literal, overload

import torch

from .contract import GroupInfoNCE, LabelAlignment, Scale, SequenceScore, TokenLogprob

logger = logging.getLogger("conspo_kernels")

# The public name of each backend, and its module: relative to this package, or absolute.
BACKENDS = {
    "triton": ".triton",
    "native": ".native",
    "torch": ".eager",
}
_warned: set[tuple[torch.device, str]] = set()  # devices on which "auto" had to fall back, and why
PREFERRED = {"cuda": "triton", "cpu": "native"}  # where it can run; "torch" elsewhere


def check_implementation(value: Any) -> None:
    names = ("auto", *BACKENDS)
    if not isinstance(value, str) or value not in names:
        raise ValueError(f"implementation must be one of {', '.join(map(repr, names))}, got {value!r}")


def unavailable(implementation: str, device: torch.device) -> str | None:
    """Why an implementation cannot run on a device, or None."""
    reason: str | None = importlib.import_module(BACKENDS[implementation], __package__).obstacle(device)
    return reason


@functools.lru_cache(maxsize=64)
def choose(op: str, implementation: str, device: torch.device) -> str:
    """The implementation of an op for tensors on a device: "auto" is Triton on a GPU, native on a CPU, else PyTorch."""
    if implementation != "auto":
        reason = unavailable(implementation, device)
        if reason is not None:
            raise ValueError(f"implementation={implementation!r} cannot run {op} here: {reason}")
        return implementation
    preferred = PREFERRED.get(device.type, "torch")
    reason = unavailable(preferred, device)
    if reason is None:
        logger.info("%s on %s: implementation=%r", op, device, preferred)
        return preferred
    _log_fallback(op, device, preferred, reason)
    return "torch"


def _log_fallback(op: str, device: torch.device, preferred: str, reason: str) -> None:
    """A warning for the first op of a device, which says it of them all."""
    level = logging.INFO if (device, reason) in _warned else logging.WARNING
    _warned.add((device, reason))
    logger.log(level, "%s on %s: implementation='torch', not %r: %s", op, device, preferred, reason)


@overload
def kernels_for(op: Literal["token_logprob"], implementation: str, device: torch.device) -> TokenLogprob: ...
@overload
def kernels_for(op: Literal["sequence_score"], implementation: str, device: torch.device) -> SequenceScore: ...
@overload
def kernels_for(op: Literal["group_infonce"], implementation: str, device: torch.device) -> GroupInfoNCE: ...
@overload
def kernels_for(op: Literal["label_alignment"], implementation: str, device: torch.device) -> LabelAlignment: ...
@overload
def kernels_for(op: Literal["scale"], implementation: str, device: torch.device) -> Scale: ...
def kernels_for(op: str, implementation: str, device: torch.device) -> Any:
    """The functions that run an op for tensors on a device."""
    return _kernels_for(op, implementation, device)


@functools.lru_cache(maxsize=64)
def _kernels_for(op: str, implementation: str, device: torch.device) -> Any:
    name = BACKENDS[choose(op, implementation, device)]
    backend = importlib.import_module(name, __package__)
    return getattr(backend, op, None) or importlib.import_module(f"{name}.{op}", __package__)


def forget_choices() -> None:
    """Choose anew: what can run has changed."""
    choose.cache_clear()
    _kernels_for.cache_clear()
    _warned.clear()
