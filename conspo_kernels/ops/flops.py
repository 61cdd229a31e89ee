"""Operations of the fused-linear ops, as `torch.utils.flop_counter` counts them: those of the GEMMs that a mode makes.

A formula takes the named arguments of its op. Names: n tokens that take part, v vocabulary, h hidden size.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..linear.tiles import Head, RowSelection
from ..linear.tiling import fixed_tile
from ..values import IGNORED
from .registration import traced


def _taking_part(it: Any, *upstream: Tensor | None) -> int:
    """How many tokens the GEMMs have, as `RowSelection` chooses them. Fake labels have no values: all of them."""
    if it.labels.device.type != "cpu":
        return it.labels.shape[0] if it.indices is None else it.indices.shape[0]
    if traced(it.labels):
        return int(it.labels.shape[0])
    active = it.labels != IGNORED
    gradients = [x != 0 for x in upstream if x is not None]
    return int((active & torch.stack(gradients).any(0)).sum() if gradients else active.sum())


def _product(n: int, it: Any) -> int:
    return 2 * n * it.weight.shape[0] * it.hidden.shape[1]


def forward(it: Any) -> int:
    """Of `linear_logprob`: logits, and in mode "frozen" the gradient of hidden. Invariant tiles are padded."""
    n = rows = _taking_part(it)
    if it.batch_invariant:
        problem = RowSelection(it.hidden, it.labels, it.indices).problem(Head(it.weight, None, it.logits_dtype))
        size = fixed_tile(problem, it.workspace).rows
        rows = math.ceil(n / size) * size
    return _product(rows + (n if it.mode == "frozen" else 0), it)


def backward(it: Any) -> int:
    """Of `linear_logprob_backward`: logits that were not stored, and the gradients of hidden and weight."""
    n = _taking_part(it, *(() if it.stored is not None else (it.grad_logprobs, it.grad_entropy)))
    return ((it.stored is None) + it.needs[0] + it.needs[1]) * _product(n, it)


def forward_backward(it: Any) -> int:
    """Of `linear_logprob_forward_backward`: logits, and the gradients of hidden and weight."""
    return (1 + it.needs[0] + it.needs[1]) * _product(_taking_part(it), it)
