"""Tiles of logits for the fused-linear path: which tokens take part, and z = hidden @ weight.T + bias of a tile.

Names: n tokens, v vocabulary, h hidden; z a tile of logits.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..values import ELSEWHERE, IGNORED
from . import gemm as gemms
from .tiling import Problem


class Head(NamedTuple):
    """weight [V, H] and bias [V] or None.  logits_dtype: of the tiles of logits."""

    weight: Tensor
    bias: Tensor | None
    logits_dtype: torch.dtype


class Tokens(NamedTuple):
    """hidden [N, H] and labels [N]; places: which of them take part, [n] int64, None: all."""

    hidden: Tensor
    labels: Tensor
    places: Tensor | None

    @classmethod
    def from_labels(cls, hidden: Tensor, labels: Tensor, keep: Tensor | None) -> Tokens:
        """Those with a label, where that costs no synchronisation: labels, or else `keep` [N] bool, on the CPU."""
        chosen = labels != IGNORED if labels.device.type == "cpu" else keep
        if chosen is None or chosen.all():
            return cls(hidden, labels, None)
        return cls(hidden, labels, chosen.nonzero()[:, 0].to(hidden.device, non_blocking=True))

    @property
    def number(self) -> int:
        return self.labels.shape[0] if self.places is None else self.places.shape[0]

    def problem(self, head: Head) -> Problem:
        vocab_size, hidden_size = head.weight.shape
        itemsize, wide = self.hidden.element_size(), head.logits_dtype.itemsize
        logit_bytes = wide if wide == itemsize else wide + itemsize
        return Problem(self.number, vocab_size, hidden_size, itemsize, self.places is not None, logit_bytes)

    def chosen(self, x: Tensor, rows: slice = slice(None)) -> Tensor:
        """Rows of a tensor [N, ...], of those that take part."""
        return x[rows] if self.places is None else x.index_select(0, self.places[rows])

    def spread(self, x: Tensor) -> Tensor:
        """[n, ...] back to [N, ...], zero where no part is taken."""
        if self.places is None:
            return x
        return x.new_zeros(self.labels.shape[0], *x.shape[1:]).index_copy_(0, self.places, x)


class LogitTiles:
    """Tiles of logits, one after another in one buffer."""

    def __init__(self, head: Head, rows: int, columns: int) -> None:
        self.head = head
        self.buffer = head.weight.new_empty(rows * columns, dtype=head.logits_dtype)

    def compute(self, hidden: Tensor, columns: slice) -> Tensor:
        """hidden [r, H] -> logits [r, c]."""
        weight, bias, _dtype = self.head
        size = (hidden.shape[0], columns.stop - columns.start)
        out = self.buffer[: size[0] * size[1]].view(size)
        return gemms.gemm(hidden, weight[columns].t(), out, None if bias is None else bias[columns])


def labels_in(labels: Tensor, columns: slice, vocab_size: int) -> Tensor:
    """Labels relative to a slice of the vocabulary."""
    if columns == slice(0, vocab_size):
        return labels
    inside = (labels >= columns.start) & (labels < columns.stop)
    return torch.where(inside, labels - columns.start, torch.where(labels == IGNORED, IGNORED, ELSEWHERE))
