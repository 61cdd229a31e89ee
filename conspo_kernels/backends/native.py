"""The functions of `contract.Backend` in C++ (`csrc/cpu`), for CPU tensors; only this module imports the extension.

Threads share the rows of logits, and a row is summed in parts of fixed length; the tokens of a rollout are summed one
after another in fp64. `align`, `scale_` and the sums with known weights are PyTorch's.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..objective import Objective, Rollouts
from ..values import IGNORED, Incoming, LogitRows, LogitTransform, Statistics, response_counts
from . import eager
from .eager import align as align
from .eager import masked_coefficients as masked_coefficients
from .eager import scale_ as scale_
from .eager import weighted_sum as weighted_sum

BUILT = importlib.util.find_spec(".._C", __package__) is not None
_C: Any = None


def _why_not_built() -> str:
    """What `setup.py` wrote down; without it these are sources, which may hide an installed package."""
    package = Path(__file__).resolve().parent.parent
    note = package / "not_built.txt"
    if note.exists():
        return note.read_text(encoding="utf-8")
    for folder in map(Path, filter(None, sys.path)):
        if (folder / package.name).is_dir() and (folder / package.name).resolve() != package:
            installed = f"not the package installed in {folder}"
            return f"Python takes the sources in {package.parent}, {installed}: start elsewhere"
    return "the package is used as it lies, it was not installed"


def _load() -> str | None:
    """Import the extension; why it cannot be used, or None. Each release of torch has its own binary interface."""
    global _C
    if not BUILT:
        return f"this installation has no native extension: {_why_not_built()}"
    try:
        _C = importlib.import_module(".._C", __package__)
    except ImportError as error:
        return f"the native extension does not load ({error}); install it again, for torch {torch.__version__}"
    if _C.torch_version.split(".")[:2] != torch.__version__.split(".")[:2]:
        return (
            f"the native extension was built for torch {_C.torch_version}, this is {torch.__version__}: install again"
        )
    return None


OBSTACLE = _load()

REDUCTIONS = {"mean": 0, "sum": 1, "none": 2}


def obstacle(device: torch.device) -> str | None:
    """Why the extension cannot run on a device, or None."""
    if device.type != "cpu":
        return f"the native kernels run on CPU tensors, the tensors are on {device}"
    return OBSTACLE


def instruction_sets() -> list[str]:
    """The instruction sets that this CPU has and the extension was compiled for, the best last."""
    return _C.instruction_sets() if OBSTACLE is None else []


def instruction_set() -> str | None:
    """The instruction set that runs, or None without the extension."""
    return _C.instruction_set() if OBSTACLE is None else None


def _numbers(transform: LogitTransform) -> tuple[float, float, bool]:
    return transform.inner, transform.scale, transform.softcap is not None


def token_logprob_forward(rows: LogitRows, with_entropy: bool, out: Statistics | None = None) -> Statistics:
    found = Statistics(*_C.token_logprob_forward(*rows[:2], *_numbers(rows.transform), with_entropy))
    return found if out is None else found.copied_to(out)


def token_logprob_backward(grad_logits: Tensor, rows: LogitRows, incoming: Incoming) -> None:
    row_max, log_sum, grad_logprobs, entropy, grad_entropy = incoming
    logits, labels, numbers = rows.logits, rows.labels_in_slice(), _numbers(rows.transform)
    _C.token_logprob_backward(
        grad_logits, logits, labels, row_max, log_sum, entropy, grad_logprobs, grad_entropy, *numbers
    )


def token_logprob_forward_backward(
    grad_logits: Tensor, rows: LogitRows, coefficients: Tensor, out: Tensor | None = None
) -> Tensor:
    logprobs: Tensor = _C.token_logprob_forward_backward(
        grad_logits, *rows[:2], coefficients, *_numbers(rows.transform)
    )
    return logprobs if out is None else out.copy_(logprobs)


def sequence_score_forward(logprobs: Tensor, labels: Tensor, offsets: Tensor | None) -> tuple[Tensor, Tensor]:
    scores, counts = _C.sequence_score_forward(logprobs, labels, offsets)
    return scores, counts


def sequence_score_backward(
    weights: Tensor, counts: Tensor, labels: Tensor, offsets: Tensor | None, factor: Tensor | None = None
) -> Tensor:
    grad_scores = weights if factor is None or eager.is_one(factor) else eager.scaled(weights, factor)
    grad: Tensor = _C.sequence_score_backward(grad_scores, counts, labels, offsets)
    return grad


def token_coefficients(weights: Tensor, labels: Tensor, offsets: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    counts = response_counts(labels, offsets)
    spread: Tensor = _C.sequence_score_backward(weights, counts, labels, offsets)
    return spread, counts, torch.where(spread != 0, labels, IGNORED)


def infonce(scores: Tensor, counts: Tensor, rollouts: Rollouts, objective: Objective) -> tuple[Tensor, Tensor]:
    rewards, (size, _ids, order, offsets) = rollouts
    tau, margin, threshold, reduction, num_groups = objective
    number = None if num_groups is None else num_groups.item()
    loss, weights = _C.group_infonce_forward(
        scores, rewards, counts, order, offsets, size, margin.item(), number, tau, threshold, REDUCTIONS[reduction]
    )
    return loss, weights
