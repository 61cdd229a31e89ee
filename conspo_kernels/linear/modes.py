"""The modes of the fused-linear path: one function for the forward of each, and for its backward.

    mode         when                                                         GEMMs of 2 * N * H * V operations
    none         no gradient                                                  1
    recompute    default: backward computes the logits again                  1 + 3
    store        all logits fit the workspace and are kept for backward       1 + 2
    frozen       neither weight nor bias needs a gradient: that of hidden,    2 + 0
                 for coefficients of one, in the forward
    known        the coefficients are there beforehand (`known_gradient`)     3 + 0

GEMMs by torch; the statistics of a tile of logits, and its gradient in place, by the kernels that are handed in.
Names: n tokens (those without gradient left out), v vocabulary, h hidden; z a tile of logits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..backends.contract import TokenLogprob
from ..values import LogitRows, LogitTransform, Statistics, Upstream
from . import gemm as gemms
from .gemm import Sum, operand, slices
from .tiles import Head, LogitTiles, Tokens, labels_in
from .tiling import Tile, backward_tile, fixed_tile, row_tile


class Run(NamedTuple):
    """What every mode works with.  workspace: bytes for tiles of logits."""

    kernels: TokenLogprob
    tokens: Tokens
    head: Head
    transform: LogitTransform
    workspace: int


class Needs(NamedTuple):
    """Which gradients are wanted."""

    hidden: bool
    weight: bool
    bias: bool


class Gradients(NamedTuple):
    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


def forward_none(run: Run, with_entropy: bool, batch_invariant: bool = False) -> Statistics:
    """Statistics [N], one GEMM: also the forward of mode "recompute"."""
    parts = [
        run.kernels.forward(_logit_rows(run, z, rows), with_entropy)
        for rows, _hidden, z in _row_tiles(run, batch_invariant)
    ]
    return _joined(run, parts, with_entropy)


def forward_store(run: Run, with_entropy: bool) -> tuple[Statistics, Tensor]:
    """Statistics [N], and the logits [N, V], of which the first n rows are filled."""
    tokens, head = run.tokens, run.head
    stored = tokens.hidden.new_empty(tokens.labels.shape[0], head.weight.shape[0], dtype=head.logits_dtype)
    z = gemms.gemm(tokens.chosen(tokens.hidden), head.weight.t(), stored[: tokens.number], head.bias)
    statistics = run.kernels.forward(_logit_rows(run, z, slice(0, tokens.number)), with_entropy)
    return _joined(run, [statistics], with_entropy), stored


def forward_frozen(run: Run, batch_invariant: bool = False) -> tuple[Statistics, Tensor]:
    """Statistics [N], and the gradient of hidden [N, H] for coefficients of one: two GEMMs."""
    tokens, head = run.tokens, run.head
    grad_hidden = tokens.hidden.new_empty(tokens.number, tokens.hidden.shape[1])
    parts = []
    for rows, _hidden, z in _row_tiles(run, batch_invariant):
        logit_rows = _logit_rows(run, z, rows)
        statistics = run.kernels.forward(logit_rows, with_entropy=False)
        run.kernels.backward(z[None], logit_rows, statistics, Upstream(torch.ones_like(statistics.logprobs)))
        gemms.gemm(operand(z, head.weight), head.weight, grad_hidden[rows])
        parts.append(statistics)
    return _joined(run, parts, with_entropy=False), tokens.spread(grad_hidden)


def backward_store(run: Run, statistics: Statistics, stored: Tensor, upstream: Upstream, needs: Needs) -> Gradients:
    """From the logits that were stored, over which their gradient is written: two GEMMs."""
    tokens, head = run.tokens, run.head
    everything = slice(0, tokens.number)
    z = stored[: tokens.number]
    _write_gradient(run, everything, _logit_rows(run, z, everything), statistics, upstream)
    grad_bias = _bias_sum(z).to(tokens.hidden.dtype) if needs.bias else None
    z, hidden = operand(z, head.weight), tokens.chosen(tokens.hidden)
    grad_hidden = gemms.gemm(z, head.weight, torch.empty_like(hidden)) if needs.hidden else None
    weight_sum = Sum(torch.empty_like(head.weight, memory_format=torch.contiguous_format), 1) if needs.weight else None
    if weight_sum is not None:
        weight_sum.add(slice(None), True, z.t(), hidden)
    return Gradients(
        None if grad_hidden is None else tokens.spread(grad_hidden),
        None if weight_sum is None else weight_sum.result(),
        grad_bias,
    )


def backward_recompute(
    run: Run, statistics: Statistics, upstream: Upstream, needs: Needs, weight_grad: Tensor | None = None
) -> Gradients:
    """From the statistics: a GEMM for the logits, and one for each of the gradients of hidden and weight.

    weight_grad: [V, H] that the gradient of weight is added to; then none is returned.
    """
    tokens, head = run.tokens, run.head
    vocab_size, hidden_size = head.weight.shape
    tile = backward_tile(tokens.problem(head), run.workspace, needs.hidden, needs.weight)
    logits = LogitTiles(head, min(tile.rows, tokens.number), min(tile.columns, vocab_size))
    row_slices, column_slices = list(slices(tokens.number, tile.rows)), list(slices(vocab_size, tile.columns))
    new = tokens.hidden.new_empty
    hidden_sum = Sum(new(tokens.number, hidden_size), len(column_slices)) if needs.hidden else None
    grad_weight = new(vocab_size, hidden_size) if needs.weight and weight_grad is None else None
    grad_bias = statistics.row_max.new_zeros(vocab_size) if needs.bias else None
    for columns in column_slices:
        # A slice of dW is summed over the tiles of rows before the next slice begins.
        weight_sum = None
        if grad_weight is not None:
            weight_sum = Sum(grad_weight[columns], len(row_slices))
        elif needs.weight and weight_grad is not None:
            weight_sum = Sum.onto(weight_grad[columns])
        for rows in row_slices:
            hidden = tokens.chosen(tokens.hidden, rows)
            z = logits.compute(hidden, columns)
            labels = labels_in(tokens.chosen(tokens.labels, rows), columns, vocab_size)[None]
            _write_gradient(run, rows, LogitRows(z[None], labels, run.transform), statistics, upstream)
            if grad_bias is not None:
                grad_bias[columns] += _bias_sum(z)
            z = operand(z, head.weight)
            if hidden_sum is not None:
                hidden_sum.add(rows, columns.start == 0, z, head.weight[columns])
            if weight_sum is not None:
                weight_sum.add(slice(None), rows.start == 0, z.t(), hidden)
        if weight_sum is not None:
            weight_sum.result()
    return Gradients(
        None if hidden_sum is None else tokens.spread(hidden_sum.result()),
        grad_weight,
        None if grad_bias is None else grad_bias.to(tokens.hidden.dtype),
    )


def forward_known(run: Run, coefficients: Tensor, needs: Needs) -> tuple[Tensor, Gradients]:
    """logprobs [N], and the gradients of sum(coefficients * logprobs), in one walk: three GEMMs at most."""
    tokens, head = run.tokens, run.head
    vocab_size, hidden_size = head.weight.shape
    new, terms = tokens.hidden.new_empty, math.ceil(tokens.number / max(1, _row_tile(run).rows))
    grad_hidden = new(tokens.number, hidden_size) if needs.hidden else None
    weight_sum = Sum(new(vocab_size, hidden_size), terms) if needs.weight else None
    grad_bias = coefficients.new_zeros(vocab_size) if needs.bias else None
    logprobs = []
    for rows, hidden, z in _row_tiles(run):
        c = tokens.chosen(coefficients, rows)[None]
        logprobs.append(run.kernels.forward_backward(z[None], _logit_rows(run, z, rows), c)[0])
        if grad_bias is not None:
            grad_bias += _bias_sum(z)
        z = operand(z, head.weight)
        if grad_hidden is not None:
            gemms.gemm(z, head.weight, grad_hidden[rows])
        if weight_sum is not None:
            weight_sum.add(slice(None), rows.start == 0, z.t(), hidden)
    whole = torch.cat(logprobs or [coefficients.new_empty(0)]) if len(logprobs) != 1 else logprobs[0]
    return tokens.spread(whole), Gradients(
        None if grad_hidden is None else tokens.spread(grad_hidden),
        None if weight_sum is None else weight_sum.result(),
        None if grad_bias is None else grad_bias.to(tokens.hidden.dtype),
    )


def _row_tile(run: Run, batch_invariant: bool = False) -> Tile:
    problem = run.tokens.problem(run.head)
    return fixed_tile(problem, run.workspace) if batch_invariant else row_tile(problem, run.workspace)


def _row_tiles(run: Run, batch_invariant: bool = False) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Tiles of whole rows, all in one buffer: which tokens [r], their hidden states [r, H] and logits [r, V].

    batch_invariant: every GEMM has one shape, the last one padded, so that a token's results do not depend on others.
    """
    tokens, tile = run.tokens, _row_tile(run, batch_invariant)
    everything = slice(0, tile.columns)
    logits = LogitTiles(run.head, tile.rows if batch_invariant else min(tile.rows, tokens.number), tile.columns)
    padded = tokens.hidden.new_zeros(tile.rows, tokens.hidden.shape[1]) if batch_invariant else None
    for rows in slices(tokens.number, tile.rows):
        hidden = tokens.chosen(tokens.hidden, rows)
        if padded is None:
            yield rows, hidden, logits.compute(hidden, everything)
        else:
            padded[: len(hidden)] = hidden
            yield rows, hidden, logits.compute(padded, everything)[: len(hidden)]


def _logit_rows(run: Run, z: Tensor, rows: slice) -> LogitRows:
    """Whole rows of logits z [r, V] as the kernels take them: [1, r, V]."""
    return LogitRows(z[None], run.tokens.chosen(run.tokens.labels, rows)[None], run.transform)


def _write_gradient(run: Run, rows: slice, logit_rows: LogitRows, statistics: Statistics, upstream: Upstream) -> None:
    """Write the gradient over a tile of logits [1, r, c], from statistics and incoming gradients [N]."""

    def of_rows(x: Tensor | None) -> Tensor | None:
        return None if x is None else run.tokens.chosen(x, rows)[None]

    entropy = None if upstream.entropy is None else statistics.entropy
    row_max, log_sum, grad_logprobs = (
        run.tokens.chosen(x, rows)[None] for x in (statistics.row_max, statistics.log_sum, upstream.logprobs)
    )
    tile = Statistics(row_max, of_rows(entropy), row_max, log_sum)  # log-probabilities are not read
    run.kernels.backward(logit_rows.logits, logit_rows, tile, Upstream(grad_logprobs, of_rows(upstream.entropy)))


def _bias_sum(z: Tensor) -> Tensor:
    return z.sum(0, dtype=torch.float64 if z.dtype == torch.float64 else torch.float32)


def _joined(run: Run, parts: list[Statistics], with_entropy: bool) -> Statistics:
    """[1, r] of tiles -> [N]."""
    hidden = run.tokens.hidden
    acc = torch.float64 if hidden.dtype == torch.float64 else torch.float32

    def whole(column: list[Tensor]) -> Tensor:
        return run.tokens.spread(torch.cat(column, 1)[0] if column else torch.empty(0, dtype=acc, device=hidden.device))

    logprobs, row_max, log_sum = (
        whole([getattr(part, name) for part in parts]) for name in ("logprobs", "row_max", "log_sum")
    )
    entropy = whole([part.entropy for part in parts if part.entropy is not None]) if with_entropy else None
    return Statistics(logprobs, entropy, row_max, log_sum)
