"""The fused-linear path's loop over tiles of logits, for every implementation.

GEMMs by torch, z = hidden @ weight.T + bias for a tile; its statistics, and in backward its gradient in place, by the
token_logprob twin that is handed in. Names: n tokens (those without gradient left out), v vocabulary, h hidden; z a
tile of logits. GEMM: 2 * N * H * V operations.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import gemm as gemms
from .gemm import Sum, slices
from .known_coefficients import forward_backward as at_known_coefficients
from .tiling import Problem, Tile, backward_tile, fixed_tile, row_tile
from .transform import LogitTransform

IGNORED, ELSEWHERE = -2, -1  # labels of a tile: of no token, and of a token whose label lies in another tile


class Head(NamedTuple):
    """weight [V, H] and bias [V] or None."""

    weight: Tensor
    bias: Tensor | None


class Tokens(NamedTuple):
    """hidden [N, H] and labels [N]; places: which of them take part, [n] int64, None: all."""

    hidden: Tensor
    labels: Tensor
    places: Tensor | None

    @classmethod
    def of(cls, hidden: Tensor, labels: Tensor, ignore_index: int, keep: Tensor | None) -> Tokens:
        """Those with a label, where that costs no synchronisation: labels, or else `keep` [N] bool, on the CPU."""
        active = labels != ignore_index
        # A label outside of the vocabulary, looked at on a CPU only, is not to be taken for IGNORED.
        labels = torch.where(active, labels.clamp(min=ELSEWHERE), IGNORED)
        chosen = active if labels.device.type == "cpu" else keep
        if chosen is None or chosen.all():
            return cls(hidden, labels, None)
        return cls(hidden, labels, chosen.nonzero()[:, 0].to(hidden.device, non_blocking=True))

    @property
    def number(self) -> int:
        return self.labels.shape[0] if self.places is None else self.places.shape[0]

    def problem(self, head: Head) -> Problem:
        vocab_size, hidden_size = head.weight.shape
        return Problem(self.number, vocab_size, hidden_size, self.hidden.element_size(), self.places is not None)

    def chosen(self, x: Tensor, rows: slice = slice(None)) -> Tensor:
        """Rows of a tensor [N, ...], of those that take part."""
        return x[rows] if self.places is None else x.index_select(0, self.places[rows])

    def spread(self, x: Tensor) -> Tensor:
        """[n, ...] back to [N, ...], zero where no part is taken."""
        if self.places is None:
            return x
        return x.new_zeros(self.labels.shape[0], *x.shape[1:]).index_copy_(0, self.places, x)


class Gradients(NamedTuple):
    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


class Needs(NamedTuple):
    hidden: bool
    weight: bool
    bias: bool


class Logits:
    """Tiles of logits in one buffer."""

    def __init__(self, tokens: Tokens, head: Head, tile: Tile, buffer: Tensor | None = None) -> None:
        self.tokens, self.head = tokens, head
        if buffer is None:
            buffer = tokens.hidden.new_empty(min(tile.rows, tokens.number) * min(tile.columns, head.weight.shape[0]))
        self.buffer = buffer.flatten()

    def tile(self, hidden: Tensor, columns: slice) -> Tensor:
        """hidden [r, H] -> [r, c]."""
        weight, bias = self.head
        size = (hidden.shape[0], columns.stop - columns.start)
        out = self.buffer[: size[0] * size[1]].view(size)
        return gemms.gemm(hidden, weight[columns].t(), out, None if bias is None else bias[columns])


class Forward(NamedTuple):
    """[N] each, entropy None unless asked for; stored: what the mode keeps for backward."""

    logprobs: Tensor
    entropy: Tensor | None
    row_max: Tensor
    log_sum: Tensor
    stored: Tensor | None


def forward(
    kernels: Any, tokens: Tokens, head: Head, transform: LogitTransform, with_entropy: bool, mode: str, workspace: int,
    batch_invariant: bool = False,
) -> Forward:  # fmt: skip
    """One GEMM; a second in mode "frozen", for the gradient of hidden with coefficients of one.

    batch_invariant: every GEMM has the same shape, of `fixed_tile`, the last one padded; not in mode "store".
    stored: "store": the logits [N, V], of which the first n rows are filled.  "frozen": [N, H].
    """
    problem = tokens.problem(head)
    vocab_size, hidden_size = head.weight.shape
    everything = slice(0, vocab_size)
    stored = None
    if mode == "store":
        tile = Tile(problem.num_tokens, vocab_size)
        stored = tokens.hidden.new_empty(tokens.labels.shape[0], vocab_size)
    else:
        tile = fixed_tile(problem, workspace) if batch_invariant else row_tile(problem, workspace)
    padded = tokens.hidden.new_zeros(tile.rows, hidden_size) if batch_invariant else None
    if mode == "frozen":
        stored = tokens.hidden.new_empty(problem.num_tokens, hidden_size)
    buffer = stored if mode == "store" else None
    if batch_invariant:
        buffer = tokens.hidden.new_empty(tile.rows, vocab_size)
    logits = Logits(tokens, head, tile, buffer)
    parts: list[list[Tensor]] = []
    for rows in slices(problem.num_tokens, tile.rows):
        hidden = tokens.chosen(tokens.hidden, rows)
        if padded is not None:
            padded[: len(hidden)] = hidden
            z = logits.tile(padded, everything)[None, : len(hidden)]
        else:
            z = logits.tile(hidden, everything)[None]
        labels = tokens.chosen(tokens.labels, rows)[None]
        found = kernels.forward(z, labels, IGNORED, transform, with_entropy)
        parts.append([x[0] for x in found if x is not None])
        if mode == "frozen":
            assert stored is not None
            ones = torch.ones_like(found[0])
            kernels.backward(z, z, labels, found[2], found[3], None, ones, None, IGNORED, transform)
            gemms.gemm(z[0], head.weight, stored[rows])
    acc = torch.float64 if tokens.hidden.dtype == torch.float64 else torch.float32
    nothing = [torch.empty(0, dtype=acc, device=tokens.hidden.device)] * (4 if with_entropy else 3)
    columns = [tokens.spread(torch.cat(column)) for column in zip(*(parts or [nothing]), strict=True)]
    entropy = columns.pop(1) if with_entropy else None
    if mode == "frozen":
        assert stored is not None
        stored = tokens.spread(stored)
    return Forward(columns[0], entropy, columns[1], columns[2], stored)


def backward(
    kernels: Any, tokens: Tokens, head: Head, transform: LogitTransform, found: Forward, grad_logprobs: Tensor,
    grad_entropy: Tensor | None, needs: Needs, workspace: int, weight_grad: Tensor | None = None,
) -> Gradients:  # fmt: skip
    """From statistics: one GEMM for the logits (none where they were stored), and one for each of dH and dW.

    weight_grad: [V, H] that the gradient of weight is added to; then none is returned.
    """
    problem = tokens.problem(head)
    vocab_size, hidden_size = head.weight.shape
    stored = found.stored
    if stored is None:
        tile = backward_tile(problem, workspace, needs.hidden, needs.weight)
    else:
        tile = Tile(problem.num_tokens, vocab_size)
    logits = Logits(tokens, head, tile, stored)
    row_slices = list(slices(problem.num_tokens, tile.rows))
    column_slices = list(slices(vocab_size, tile.columns))
    new = tokens.hidden.new_empty
    sums = {}
    if needs.hidden:
        sums["hidden"] = Sum(new(problem.num_tokens, hidden_size), len(column_slices))
    grad_weight = new(vocab_size, hidden_size) if needs.weight and weight_grad is None else None
    grad_bias = torch.zeros(vocab_size, dtype=found.row_max.dtype, device=logits.buffer.device) if needs.bias else None
    for c, columns in enumerate(column_slices):
        weight = head.weight[columns]
        # A slice of dW is summed over the tiles of rows before the next slice begins.
        slice_sum = None
        if grad_weight is not None:
            slice_sum = Sum(grad_weight[columns], len(row_slices))
        elif needs.weight and weight_grad is not None:
            slice_sum = Sum.onto(weight_grad[columns])
        for r, rows in enumerate(row_slices):
            hidden = tokens.chosen(tokens.hidden, rows)
            if stored is None:
                z = logits.tile(hidden, columns)
            else:
                z = logits.buffer[: problem.num_tokens * vocab_size].view(problem.num_tokens, vocab_size)

            def of_rows(x: Tensor | None, rows: slice = rows) -> Tensor | None:
                return None if x is None else tokens.chosen(x, rows)[None]

            labels = _labels_in(tokens.chosen(tokens.labels, rows), columns)
            kernels.backward(
                z[None], z[None], labels[None], of_rows(found.row_max), of_rows(found.log_sum),
                None if grad_entropy is None else of_rows(found.entropy), of_rows(grad_logprobs), of_rows(grad_entropy),
                IGNORED, transform,
            )  # fmt: skip
            if needs.hidden:
                sums["hidden"].add(rows, c == 0, z, weight)
            if slice_sum is not None:
                slice_sum.add(slice(None), r == 0, z.t(), hidden)
            if grad_bias is not None:
                grad_bias[columns] += z.sum(0, dtype=grad_bias.dtype)
        if slice_sum is not None:
            slice_sum.result()
    if not row_slices and grad_weight is not None:
        grad_weight.zero_()
    grad_hidden = tokens.spread(sums["hidden"].result()) if needs.hidden else None
    return Gradients(grad_hidden, grad_weight, None if grad_bias is None else grad_bias.to(tokens.hidden.dtype))


def forward_backward(
    kernels: Any, tokens: Tokens, head: Head, transform: LogitTransform, coefficients: Tensor, needs: Needs,
    workspace: int,
) -> tuple[Tensor, Gradients]:  # fmt: skip
    """logprobs [N], and the gradients of sum(coefficients * logprobs), in one walk: three GEMMs."""
    problem = tokens.problem(head)
    vocab_size, hidden_size = head.weight.shape
    tile = row_tile(problem, workspace)
    logits = Logits(tokens, head, tile)
    row_slices = list(slices(problem.num_tokens, tile.rows))
    new = tokens.hidden.new_empty
    logprobs = []
    grad_hidden = new(problem.num_tokens, hidden_size) if needs.hidden else None
    weight_sum = Sum(new(vocab_size, hidden_size), len(row_slices)) if needs.weight else None
    grad_bias = torch.zeros(vocab_size, dtype=coefficients.dtype, device=logits.buffer.device) if needs.bias else None
    for r, rows in enumerate(row_slices):
        hidden = tokens.chosen(tokens.hidden, rows)
        z = logits.tile(hidden, slice(0, vocab_size))
        labels, c = tokens.chosen(tokens.labels, rows)[None], tokens.chosen(coefficients, rows)[None]
        logprobs.append(at_known_coefficients(kernels, z[None], z[None], labels, c, IGNORED, transform)[0])
        if grad_hidden is not None:
            gemms.gemm(z, head.weight, grad_hidden[rows])
        if weight_sum is not None:
            weight_sum.add(slice(None), r == 0, z.t(), hidden)
        if grad_bias is not None:
            grad_bias += z.sum(0, dtype=grad_bias.dtype)
    if not row_slices and weight_sum is not None:
        weight_sum.total.zero_()
    return tokens.spread(torch.cat(logprobs) if logprobs else coefficients.new_empty(0)), Gradients(
        None if grad_hidden is None else tokens.spread(grad_hidden),
        None if weight_sum is None else weight_sum.result(),
        None if grad_bias is None else grad_bias.to(tokens.hidden.dtype),
    )


def _labels_in(labels: Tensor, columns: slice) -> Tensor:
    """Labels relative to a slice of the vocabulary."""
    inside = (labels >= columns.start) & (labels < columns.stop)
    return torch.where(inside, labels - columns.start, torch.where(labels == IGNORED, IGNORED, ELSEWHERE))
