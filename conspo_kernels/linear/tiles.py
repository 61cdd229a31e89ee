"""Tiles of logits for the fused-linear path: which tokens take part, and z = hidden @ weight.T + bias of a tile.

Names: n tokens, v vocabulary, h hidden; z a tile of logits.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from ..values import IGNORED, PerToken
from . import gemm as gemms
from .tiling import ALIGNMENT, Problem

ROW_BYTES = 16  # the fast GEMMs of a GPU take no operand whose rows begin between multiples of it
DEFAULT_MULTIPROCESSORS = 132  # of an H100, where no GPU says its own number


@functools.lru_cache(maxsize=16)
def multiprocessors(device: torch.device) -> int:
    """0 for a CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 0 if device.type == "cpu" else DEFAULT_MULTIPROCESSORS


class Head(NamedTuple):
    """weight [V, H] and bias [V] or None.  logits_dtype: of the tiles of logits."""

    weight: Tensor
    bias: Tensor | None
    logits_dtype: torch.dtype

    def narrows(self, needs_bias: bool) -> bool:
        """Whether kernels write gradients in a narrower dtype than that of the logits.

        Not where the bias needs one: that is summed before the gradient is rounded.
        """
        return self.logits_dtype != self.weight.dtype and not needs_bias

    def row_stride(self, columns: int) -> int:
        """From one row of logits to the next, in elements: on a GPU whole cache lines, so that V may be odd.

        With a bias rows of whole 16 bytes stay as they are, because torch adds it in a GEMM's epilogue only where the
        result is contiguous. Else it is copied to the result first, one write and one read of the logits: an eighth of
        a GEMM at H 4096, less than three GEMMs whose operands are not aligned.
        """
        if self.weight.device.type == "cpu":
            return columns
        epilogue = self.bias is not None and self.logits_dtype == self.weight.dtype
        if epilogue and columns * self.logits_dtype.itemsize % ROW_BYTES == 0:
            return columns
        return -(-columns // ALIGNMENT) * ALIGNMENT

    def new_logits(self, rows: int, columns: int, dtype: torch.dtype | None = None) -> Tensor:
        """[rows, columns], not filled; the last row has its padding too."""
        stride = self.row_stride(columns)
        flat = self.weight.new_empty(rows * stride, dtype=dtype or self.logits_dtype)
        return flat.as_strided((rows, columns), (stride, 1))

    def operand(self, gradient: Tensor) -> Tensor:
        """A tile of gradients in the dtype that it is multiplied in. One that is wider is lost."""
        return gradient if gradient.dtype == self.weight.dtype else rounded_over(gradient, self.weight.dtype)


def second_halves(z: Tensor, dtype: torch.dtype) -> Tensor:
    """Room for the gradient of fp32 logits z [r, columns] in 16 bits: the second half of the bytes of each row.

    A kernel that walks a row from its end overwrites only what it has read: the gradient of an element lies half as far
    from the end as the element.
    """
    stride = z.stride(0)
    return z.view(dtype).as_strided(z.shape, (2 * stride, 1), 2 * z.storage_offset() + stride)


def rounded_over(z: Tensor, dtype: torch.dtype) -> Tensor:
    """fp32 z [r, columns] in 16 bits, in the first half of its own memory.

    Rows k to 2k go where rows k/2 to k were, which have moved by then.
    """
    out = z.view(dtype).as_strided(z.shape, (z.stride(0), 1), 2 * z.storage_offset())
    out[:1] = z[:1].to(dtype)
    done = 1
    while done < z.shape[0]:
        rows = slice(done, 2 * done)
        out[rows].copy_(z[rows])
        done *= 2
    return out


class RowSelection(NamedTuple):
    """hidden [N, H]; of the tokens that take part labels [n], and indices [n] int64, their indices. None: all."""

    hidden: Tensor
    labels: Tensor
    indices: Tensor | None

    @classmethod
    def from_labels(cls, hidden: Tensor, labels: Tensor, indices: Tensor | None) -> RowSelection:
        """labels [N] on the CPU: the tokens with a label take part. Elsewhere: those at `indices`, or all for None."""
        if labels.device.type == "cpu":
            active = labels != IGNORED
            indices = None if active.all() else active.nonzero()[:, 0]
        elif indices is not None and indices.shape[0] == labels.shape[0]:
            indices = None
        if indices is not None:
            labels = labels.index_select(0, indices)
        return cls(hidden, labels, indices)

    @property
    def number(self) -> int:
        return self.labels.shape[0]

    def problem(self, head: Head) -> Problem:
        vocab_size, hidden_size = head.weight.shape
        return Problem(
            self.number, vocab_size, hidden_size, self.hidden.element_size(), self.indices is not None,
            head.logits_dtype.itemsize, multiprocessors(self.hidden.device),
        )  # fmt: skip

    def gather(self, x: Tensor) -> Tensor:
        """[N] -> [n], of those that take part."""
        return x if self.indices is None else x.index_select(0, self.indices)

    def gather_all(self, values: PerToken) -> PerToken:
        return type(values)(*(None if x is None else self.gather(x) for x in values))  # type: ignore[arg-type]

    def hidden_rows(self, rows: slice = slice(None)) -> Tensor:
        """[r, H] of those that take part."""
        return self.hidden[rows] if self.indices is None else self.hidden.index_select(0, self.indices[rows])

    def scatter(self, x: Tensor) -> Tensor:
        """[n] or [n, H] back to [N] or [N, H], zero where no part is taken."""
        if self.indices is None:
            return x
        return x.new_zeros(self.hidden.shape[0], *x.shape[1:]).index_copy_(0, self.indices, x)

    def scatter_all(self, values: PerToken) -> PerToken:
        return type(values)(*(None if x is None else self.scatter(x) for x in values))  # type: ignore[arg-type]


class LogitTiles:
    """Tiles of logits, one after another in one buffer.

    narrow: logits are wider than the operands of the GEMMs, and kernels write gradients in the dtype of these.
    """

    def __init__(self, head: Head, rows: int, columns: int, narrow: bool = False) -> None:
        self.head, self.narrow = head, narrow
        self.buffer = head.weight.new_empty(rows * head.row_stride(columns), dtype=head.logits_dtype)

    def compute(self, hidden: Tensor, columns: slice) -> Tensor:
        """hidden [r, H] -> logits [r, columns]."""
        weight, bias, _dtype = self.head
        width = columns.stop - columns.start
        out = self.buffer.as_strided((hidden.shape[0], width), (self.head.row_stride(width), 1))
        return gemms.gemm(hidden, weight[columns].t(), out, None if bias is None else bias[columns])

    def gradient(self, z: Tensor) -> Tensor:
        """Room for the gradient of a tile z [r, columns], in its own memory."""
        return second_halves(z, self.head.weight.dtype) if self.narrow else z
