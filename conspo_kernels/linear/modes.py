"""The modes of the fused-linear path: one function for the forward of each, and for its backward.

    mode         when                                                         GEMMs of 2 * N * H * V operations
    none         no gradient                                                  1
    recompute    default: backward computes the logits again                  1 + 3
    store        all logits fit the workspace and are kept for backward       1 + 2
    frozen       neither weight nor bias needs a gradient: that of hidden,    2 + 0
                 for coefficients of one, in the forward. Of a split
                 vocabulary: within this rank's part; scaled once the sums
                 over all ranks are known
    known        the coefficients are known beforehand (`forward_backward`)   3 + 0

GEMMs by torch; the statistics of a tile of logits, and its gradient in place, by the backend that is handed in.
Names: n tokens that take part, of N; r tokens of a tile; v vocabulary, h hidden size; z a tile of logits [r, columns],
dz its gradient in the dtype of the GEMMs, in the same memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..backends.contract import Backend
from ..values import Incoming, LogitRows, LogitTransform, PerToken, Statistics, accumulated
from . import gemm as gemms
from .gemm import Sum, slices
from .tiles import Head, LogitTiles, RowSelection, second_halves
from .tiling import Tile, backward_tile, fixed_tile, row_tile


class Run(NamedTuple):
    """The arguments that all modes share.  workspace: bytes for tiles of logits."""

    backend: Backend
    tokens: RowSelection
    head: Head
    transform: LogitTransform
    workspace: int


class Needs(NamedTuple):
    """Which gradients are needed."""

    hidden: bool
    weight: bool
    bias: bool


class Gradients(NamedTuple):
    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


def forward(run: Run, mode: str, with_entropy: bool, batch_invariant: bool, split: bool) -> tuple[Statistics, Tensor]:
    """Statistics [N], and what the mode stores.  split: labels and head are of a part of the vocabulary."""
    if mode == "store":
        return forward_store(run, with_entropy)
    if mode == "frozen":
        return forward_frozen_part(run, batch_invariant) if split else forward_frozen(run, batch_invariant)
    return forward_none(run, with_entropy, batch_invariant), run.tokens.hidden.new_empty(0)


def forward_none(run: Run, with_entropy: bool, batch_invariant: bool = False) -> Statistics:
    """Statistics [N], one GEMM: also the forward of mode "recompute"."""
    statistics = _empty(run, with_entropy)
    tile = _row_tile(run, Needs(False, False, False), batch_invariant)
    for rows, _hidden, z, _grad in _row_tiles(run, tile, batch_invariant):
        run.backend.token_logprob_forward(_logit_rows(run, z, rows), with_entropy, _tile_of(statistics, rows))
    return run.tokens.scatter_all(statistics)


def forward_store(run: Run, with_entropy: bool) -> tuple[Statistics, Tensor]:
    """Statistics [N], and the logits [N, V], of which the first n rows are filled."""
    tokens, head, everything = run.tokens, run.head, slice(0, run.tokens.number)
    stored = head.new_logits(tokens.hidden.shape[0], head.weight.shape[0])
    z = gemms.gemm(tokens.hidden_rows(), head.weight.t(), stored[everything], head.bias)
    statistics = _empty(run, with_entropy)
    run.backend.token_logprob_forward(_logit_rows(run, z, everything), with_entropy, _tile_of(statistics, everything))
    return tokens.scatter_all(statistics), stored


def forward_frozen(run: Run, batch_invariant: bool = False) -> tuple[Statistics, Tensor]:
    """Log-probabilities [N], and the gradient of hidden [N, H] for coefficients of one: two GEMMs."""
    hidden = run.tokens.hidden
    ones = hidden.new_ones(hidden.shape[0], dtype=accumulated(hidden.dtype))
    logprobs, gradients = forward_backward(run, ones, Needs(True, False, False), batch_invariant=batch_invariant)
    assert gradients.hidden is not None
    return logprobs_alone(logprobs), gradients.hidden


def logprobs_alone(logprobs: Tensor) -> Statistics:
    """Of mode "frozen", whose backward needs no statistics."""
    return Statistics(logprobs, None, logprobs.new_empty(0), logprobs.new_empty(0))


def forward_frozen_part(run: Run, batch_invariant: bool = False) -> tuple[Statistics, Tensor]:
    """`forward_frozen` of a part of a vocabulary, as if it were all: statistics [N], and that gradient. Two GEMMs.

    Where the label is in another part, the gradient is that of the softmax alone.
    """
    tokens, head = run.tokens, run.head
    grad_hidden = tokens.hidden.new_empty(tokens.number, tokens.hidden.shape[1])
    statistics = _empty(run, with_entropy=False)
    ones = torch.ones_like(statistics.logprobs)
    tile = _row_tile(run, Needs(True, False, False), batch_invariant)
    for rows, _hidden, z, grad in _row_tiles(run, tile, batch_invariant, head.narrows(needs_bias=False)):
        logit_rows, part = _logit_rows(run, z, rows), _tile_of(statistics, rows)
        run.backend.token_logprob_forward(logit_rows, False, part)
        run.backend.token_logprob_backward(grad[None], logit_rows, part.incoming(ones[None, rows]))
        gemms.gemm(head.operand(grad), head.weight, grad_hidden[rows])
    return tokens.scatter_all(statistics), tokens.scatter(grad_hidden)


def complete_frozen(
    gradient: Tensor, part: Statistics, whole: Statistics, labels: Tensor, weight: Tensor, transform: LogitTransform
) -> None:
    """From a part's own gradient [N, H] its share of the whole gradient, whose parts then add up, in place.

    Within the part the gradient is slope * w[label] - sum_v p_v slope_v w_v. With f = the part's share of the row's
    probability, p is f times as large, and the label's term is not: f * gradient + (1 - f) * slope * w[label], which
    cancels nowhere. labels: [N] in this part, else ELSEWHERE.
    """
    scale = transform.scale
    # A part whose logits are all -inf has no share, and no gradient of its own.
    below = torch.where(part.row_max == whole.row_max, 0.0, part.row_max - whole.row_max)
    log_share = below * scale + part.log_sum - whole.log_sum
    share = log_share.exp()
    slope = torch.full_like(share, scale)
    if transform.softcap is not None:
        u = part.row_max + (part.logprobs + part.log_sum) / scale
        # A label whose logit is -inf stays so, whatever the softcap: it has no slope.
        slope *= torch.where(whole.logprobs == -torch.inf, 0.0, (1 - u * u) * transform.inner)
    label_factor = torch.where(labels >= 0, -torch.expm1(log_share) * slope, 0.0)
    for rows in slices(gradient.shape[0], gemms.PRODUCT_BYTES // (gradient.shape[1] * share.element_size())):
        scaled = gradient[rows] * share[rows, None]
        scaled.masked_fill_((share[rows] == 0)[:, None], 0)
        at_label = weight.index_select(0, labels[rows].clamp(min=0))
        gradient[rows] = scaled.addcmul_(label_factor[rows, None], at_label.to(scaled.dtype))


def backward_store(run: Run, incoming: Incoming, stored: Tensor, overwrite: bool, needs: Needs) -> Gradients:
    """From the logits that were stored: two GEMMs.  overwrite: their gradient is written over them."""
    tokens, head, everything = run.tokens, run.head, slice(0, run.tokens.number)
    z = grad = stored[everything]
    dtype = head.weight.dtype if head.narrows(needs.bias) else z.dtype
    if not overwrite:
        grad = head.new_logits(z.shape[0], z.shape[1], dtype)
    elif dtype != z.dtype:
        grad = second_halves(z, dtype)
    incoming = _tile_of(tokens.gather_all(incoming), everything)
    run.backend.token_logprob_backward(grad[None], _logit_rows(run, z, everything), incoming)
    grad_bias = _bias_sum(grad).to(tokens.hidden.dtype) if needs.bias else None
    dz = head.operand(grad)
    hidden = tokens.hidden_rows()
    grad_hidden = gemms.gemm(dz, head.weight, torch.empty_like(hidden)) if needs.hidden else None
    weight_sum = Sum(torch.empty_like(head.weight, memory_format=torch.contiguous_format), 1) if needs.weight else None
    if weight_sum is not None:
        weight_sum.add(slice(None), True, dz.t(), hidden)
    return Gradients(
        None if grad_hidden is None else tokens.scatter(grad_hidden),
        None if weight_sum is None else weight_sum.result(),
        grad_bias,
    )


def backward_recompute(run: Run, incoming: Incoming, needs: Needs, weight_grad: Tensor | None = None) -> Gradients:
    """From the statistics: a GEMM for the logits, and one for each of the gradients of hidden and weight.

    weight_grad: [V, H] that the gradient of weight is added to; then none is returned.
    """
    tokens, head = run.tokens, run.head
    incoming = tokens.gather_all(incoming)
    vocab_size, hidden_size = head.weight.shape
    tile = backward_tile(tokens.problem(head), run.workspace, needs.hidden, needs.weight)
    narrow = head.narrows(needs.bias)
    logits = LogitTiles(head, min(tile.rows, tokens.number), min(tile.columns, vocab_size), narrow)
    row_slices, column_slices = list(slices(tokens.number, tile.rows)), list(slices(vocab_size, tile.columns))
    new = tokens.hidden.new_empty
    hidden_sum = Sum(new(tokens.number, hidden_size), len(column_slices)) if needs.hidden else None
    grad_weight = new(vocab_size, hidden_size) if needs.weight and weight_grad is None else None
    grad_bias = incoming.row_max.new_zeros(vocab_size) if needs.bias else None
    for columns in column_slices:
        # A slice of dW is summed over the tiles of rows before the next slice begins.
        weight_sum = None
        if grad_weight is not None:
            weight_sum = Sum(grad_weight[columns], len(row_slices))
        elif needs.weight and weight_grad is not None:
            weight_sum = Sum.onto(weight_grad[columns])
        for rows in row_slices:
            hidden = tokens.hidden_rows(rows)
            z = logits.compute(hidden, columns)
            logit_rows = LogitRows(z[None], tokens.labels[None, rows], run.transform, columns.start)
            grad = logits.gradient(z)
            run.backend.token_logprob_backward(grad[None], logit_rows, _tile_of(incoming, rows))
            if grad_bias is not None:
                grad_bias[columns] += _bias_sum(grad)
            dz = head.operand(grad)
            if hidden_sum is not None:
                hidden_sum.add(rows, columns.start == 0, dz, head.weight[columns])
            if weight_sum is not None:
                weight_sum.add(slice(None), rows.start == 0, dz.t(), hidden)
        if weight_sum is not None:
            weight_sum.result()
    return Gradients(
        None if hidden_sum is None else tokens.scatter(hidden_sum.result()),
        grad_weight,
        None if grad_bias is None else grad_bias.to(tokens.hidden.dtype),
    )


def forward_backward(
    run: Run, coefficients: Tensor, needs: Needs, wide_weight_grad: bool = False, batch_invariant: bool = False
) -> tuple[Tensor, Gradients]:
    """logprobs [N], and the gradients of sum(coefficients * logprobs), in one walk: three GEMMs at most.

    wide_weight_grad: that of weight in the dtype that it is summed in.
    """
    tokens, head = run.tokens, run.head
    vocab_size, hidden_size = head.weight.shape
    coefficients = tokens.gather(coefficients)
    logprobs = torch.empty_like(coefficients)
    tile = _row_tile(run, needs, batch_invariant)
    new, terms = tokens.hidden.new_empty, math.ceil(tokens.number / max(1, tile.rows))
    grad_hidden = new(tokens.number, hidden_size) if needs.hidden else None
    dtype = coefficients.dtype if wide_weight_grad else head.weight.dtype
    weight_sum = Sum(new(vocab_size, hidden_size, dtype=dtype), terms) if needs.weight else None
    grad_bias = coefficients.new_zeros(vocab_size) if needs.bias else None
    for rows, hidden, z, grad in _row_tiles(run, tile, batch_invariant, head.narrows(needs.bias)):
        c, logit_rows = coefficients[None, rows], _logit_rows(run, z, rows)
        run.backend.token_logprob_forward_backward(grad[None], logit_rows, c, logprobs[None, rows])
        if grad_bias is not None:
            grad_bias += _bias_sum(grad)
        dz = head.operand(grad)
        if grad_hidden is not None:
            gemms.gemm(dz, head.weight, grad_hidden[rows])
        if weight_sum is not None:
            weight_sum.add(slice(None), rows.start == 0, dz.t(), hidden)
    return tokens.scatter(logprobs), Gradients(
        None if grad_hidden is None else tokens.scatter(grad_hidden),
        None if weight_sum is None else weight_sum.result(),
        None if grad_bias is None else grad_bias.to(tokens.hidden.dtype),
    )


def _row_tile(run: Run, needs: Needs, batch_invariant: bool = False) -> Tile:
    """A tile for a walk that computes the gradients in `needs` beside the logits."""
    problem = run.tokens.problem(run.head)
    if batch_invariant:
        return fixed_tile(problem, run.workspace)
    return row_tile(problem, run.workspace, needs.hidden, needs.weight)


def _row_tiles(
    run: Run, tile: Tile, batch_invariant: bool = False, narrow: bool = False
) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
    """Tiles of whole rows, one after another in one buffer.

    Yields the slice of tokens, their hidden states [r, H], their logits [r, V], and room for the gradient of these.

    batch_invariant: every GEMM has one shape, the last one padded, so that a token's results do not depend on others.
    """
    tokens = run.tokens
    everything = slice(0, tile.columns)
    most = tile.rows if batch_invariant else min(tile.rows, tokens.number)
    logits = LogitTiles(run.head, most, tile.columns, narrow)
    padded = tokens.hidden.new_zeros(tile.rows, tokens.hidden.shape[1]) if batch_invariant else None
    for rows in slices(tokens.number, tile.rows):
        hidden = tokens.hidden_rows(rows)
        if padded is None:
            z = logits.compute(hidden, everything)
        else:
            padded[: len(hidden)] = hidden
            z = logits.compute(padded, everything)[: len(hidden)]
        yield rows, hidden, z, logits.gradient(z)


def _logit_rows(run: Run, z: Tensor, rows: slice) -> LogitRows:
    """Whole rows of logits z [r, V] as the kernels take them: [1, r, V]."""
    return LogitRows(z[None], run.tokens.labels[None, rows], run.transform)


def _bias_sum(z: Tensor) -> Tensor:
    return z.sum(0, dtype=accumulated(z.dtype))


def _empty(run: Run, with_entropy: bool) -> Statistics:
    """Statistics [n] to be filled."""
    hidden = run.tokens.hidden
    return Statistics.empty((run.tokens.number,), accumulated(hidden.dtype), hidden.device, with_entropy)


def _tile_of(values: PerToken, rows: slice) -> PerToken:
    """Statistics or incoming gradients of a tile, as the kernels take them: [1, r]."""
    return type(values)(*(None if x is None else x[None, rows] for x in values))  # type: ignore[arg-type]
