"""The twins in C++ (`csrc/cpu`), for CPU tensors; the only module that imports the extension.

`token_logprob`, `sequence_score` and `group_infonce` stand for the modules that the other twins are: the same functions
with the same signatures.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..objective import Segments
from .transform import LogitTransform

BUILT = importlib.util.find_spec("conspo_kernels._C") is not None
_C: Any = None


def _load() -> str | None:
    """Import the extension; why it cannot be used, or None. Each release of torch has its own binary interface."""
    global _C
    if not BUILT:
        return "this installation has no native extension"
    try:
        _C = importlib.import_module("conspo_kernels._C")
    except ImportError as error:
        return f"the native extension does not load ({error}); install it again, for torch {torch.__version__}"
    if _C.torch_version.split(".")[:2] != torch.__version__.split(".")[:2]:
        return (
            f"the native extension was built for torch {_C.torch_version}, this is {torch.__version__}: install again"
        )
    return None


OBSTACLE = _load()

REDUCTIONS = {"mean": 0, "sum": 1, "none": 2}


@dataclass
class Twin:
    """The functions of one op."""

    forward: Callable[..., Any]
    backward: Callable[..., Any] | None = None
    forward_backward: Callable[..., Any] | None = None


def instruction_sets() -> list[str]:
    """The instruction sets that this CPU has and the extension was compiled for, the best last."""
    return _C.instruction_sets() if OBSTACLE is None else []


def instruction_set() -> str | None:
    """The one that runs."""
    return _C.instruction_set() if OBSTACLE is None else None


def _numbers(transform: LogitTransform) -> tuple[float, float, bool]:
    return transform.inner, transform.scale, transform.softcap is not None


def _token_logprob_forward(
    logits: Tensor, labels: Tensor, ignore_index: int, transform: LogitTransform, with_entropy: bool
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """logits [B, T, V], labels [B, T] contiguous -> logprobs, entropy or None, row_max, log_sum, each [B, T]."""
    return _C.token_logprob_forward(logits, labels.long(), ignore_index, *_numbers(transform), with_entropy)


def _token_logprob_backward(
    grad_logits: Tensor,
    logits: Tensor,
    labels: Tensor,
    row_max: Tensor,
    log_sum: Tensor,
    entropy: Tensor | None,
    grad_logprobs: Tensor,
    grad_entropy: Tensor | None,
    ignore_index: int,
    transform: LogitTransform,
) -> None:
    """Write the gradient of forward's outputs into `grad_logits` [B, T, V], which may be `logits` itself."""
    _C.token_logprob_backward(
        grad_logits, logits, labels.long(), row_max, log_sum, entropy, grad_logprobs, grad_entropy, ignore_index,
        *_numbers(transform),
    )  # fmt: skip


def _token_logprob_forward_backward(
    grad_logits: Tensor, logits: Tensor, labels: Tensor, coefficients: Tensor, ignore_index: int,
    transform: LogitTransform,
) -> Tensor:  # fmt: skip
    """logprobs [B, T], and into `grad_logits`, which may be `logits`, the gradient of sum(coefficients * logprobs)."""
    return _C.token_logprob_forward_backward(
        grad_logits, logits, labels.long(), coefficients, ignore_index, *_numbers(transform)
    )


def _sequence_score_forward(
    logprobs: Tensor, labels: Tensor, offsets: Tensor | None, ignore_index: int
) -> tuple[Tensor, Tensor]:
    """logprobs, labels [B, T], offsets [S+1] or None -> scores [S] (NaN where empty), counts [S] int32."""
    return _C.sequence_score_forward(logprobs, labels.long(), offsets, ignore_index)


def _sequence_score_backward(
    grad_scores: Tensor, counts: Tensor, labels: Tensor, offsets: Tensor | None, ignore_index: int
) -> Tensor:
    """The gradient of the scores, [S], spread over their tokens: [B, T], zero where ignored."""
    return _C.sequence_score_backward(grad_scores, counts, labels.long(), offsets, ignore_index)


def _group_infonce_forward(
    scores: Tensor,
    rewards: Tensor,
    counts: Tensor | None,
    segments: Segments | None,
    group_size: int,
    margin: Tensor,
    num_groups: Tensor | None,
    tau: float,
    reward_threshold: float,
    reduction: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Scores [S] -> loss ([], or [K] for "none"), weights [S] and roles [S]: see `ops/group_infonce.py`."""
    order, offsets = (None, None) if segments is None else segments[:2]
    return _C.group_infonce_forward(
        scores, rewards, counts, order, offsets, group_size, margin.item(),
        None if num_groups is None else num_groups.item(), tau, reward_threshold, REDUCTIONS[reduction],
    )  # fmt: skip


token_logprob = Twin(_token_logprob_forward, _token_logprob_backward, _token_logprob_forward_backward)
sequence_score = Twin(_sequence_score_forward, _sequence_score_backward)
group_infonce = Twin(_group_infonce_forward)
