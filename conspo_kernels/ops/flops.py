"""Operations of the fused-linear ops, as `torch.utils.flop_counter` counts them: those of the GEMMs that a mode makes.

A formula takes the arguments of its op. Names: n tokens that take part, v vocabulary, h hidden size.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..linear.tiles import Head, Tokens
from ..linear.tiling import fixed_tile
from ..values import IGNORED
from .registration import traced


def _taking_part(labels: Tensor, places: Tensor | None, upstream: list[Tensor] | None = None) -> int:
    """How many tokens the GEMMs have, as `Tokens.from_labels` chooses them. Fake labels have no values: all of them."""
    if labels.device.type != "cpu":
        return labels.shape[0] if places is None else places.shape[0]
    if traced(labels):
        return labels.shape[0]
    active = labels != IGNORED
    for_nothing = [] if upstream is None else [x == 0 for x in upstream]
    return int((active & ~torch.stack(for_nothing).all(0)).sum() if for_nothing else active.sum())


def _product(n: int, hidden: Tensor, weight: Tensor) -> int:
    return 2 * n * weight.shape[0] * hidden.shape[1]


def forward(*args: Any, out_val: object = None) -> int:
    """Of `linear_logprob`: logits, and in mode "frozen" the gradient of hidden. Invariant tiles are padded."""
    del out_val
    hidden, weight, _bias, labels, places, _weight_grad, logits_dtype, _transform, _entropy, mode, workspace, *_ = args
    n = rows = _taking_part(labels, places)
    if args[-1]:  # batch_invariant
        problem = Tokens(hidden, labels, places).problem(Head(weight, None, logits_dtype))
        size = fixed_tile(problem, workspace).rows
        rows = math.ceil(n / size) * size
    return _product(rows + (n if mode == "frozen" else 0), hidden, weight)


def backward(*args: Any, out_val: object = None) -> int:
    """Of `linear_logprob_backward`: logits that were not stored, and the gradients of hidden and weight."""
    del out_val
    stored, _weight_grad, hidden, weight, _bias, labels, places, _statistics, upstream, needs, *_ = args
    n = _taking_part(labels, places, upstream if stored is None else None)
    return ((stored is None) + needs[0] + needs[1]) * _product(n, hidden, weight)


def known(*args: Any, out_val: object = None) -> int:
    """Of `linear_logprob_known`: logits, and the gradients of hidden and weight."""
    del out_val
    hidden, weight, _bias, labels, places, _coefficients, needs, *_ = args
    return (1 + needs[0] + needs[1]) * _product(_taking_part(labels, places), hidden, weight)
