"""conspo::linear_logprob: token log-probabilities from hidden states and the lm_head weight, logits never materialised.

The modes, and what each costs, are those of `linear/modes.py`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..backends.registry import backend_for
from ..linear import modes
from ..linear.modes import Needs, Run
from ..linear.tiles import Head, Tokens
from ..linear.tiling import workspace_of
from ..values import IGNORED, LogitTransform, Statistics, Upstream
from . import flops
from .ranks import local_labels, statistics_over_ranks, sum_over_ranks
from .registration import asked_for, device_guard, op, traced, without_derivative
from .token_logprob import statistics_like, tensors_of


def run_of(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    places: Tensor | None,
    logits_dtype: torch.dtype,
    transform: list[float],
    workspace: int,
    implementation: str,
) -> Run:
    """The arguments of an op as the modes take them."""
    return Run(
        kernels=backend_for(implementation, hidden.device).token_logprob,
        tokens=Tokens.from_labels(hidden, labels, places),
        head=Head(weight, bias, logits_dtype),
        transform=LogitTransform.from_numbers(transform),
        workspace=workspace,
    )


def default_workspace(device: torch.device) -> int:
    """Bytes for tiles of logits: by the size of a device's memory, not by what is free of it, as sums depend on it."""
    total = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0
    return workspace_of(total)


# What `torch.compiler.assume_constant_result` does. That function imports dynamo, and with it Triton, which has to be
# imported later: `gradcheck` first decides whether Triton interprets.
default_workspace._dynamo_marked_constant = True  # type: ignore[attr-defined]


def or_empty(x: Tensor | None, like: Tensor) -> Tensor:
    """x, or for None a new empty tensor: an op returns tensors only, and no tensor twice."""
    return like.new_empty(0) if x is None else x


def fake_gradients(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, like: Tensor, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    inputs = (hidden, weight, bias)
    hidden_grad, weight_grad, bias_grad = (
        torch.empty_like(x, memory_format=torch.contiguous_format) if needed and x is not None else like.new_empty(0)
        for x, needed in zip(inputs, needs, strict=True)
    )
    return hidden_grad, weight_grad, bias_grad


def _fake(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    hidden, weight, _bias, labels, _places, _weight_grad, logits_dtype, _transform, with_entropy, mode, *_ = args
    stored = hidden.new_empty(0)
    if mode == "store":
        stored = hidden.new_empty(labels.shape[0], weight.shape[0], dtype=logits_dtype)
    elif mode == "frozen":
        stored = hidden.new_empty(labels.shape[0], hidden.shape[1])
        logprobs, *_ = statistics_like(hidden, labels, with_entropy)
        entropy, row_max, log_sum = (logprobs.new_empty(0) for _ in range(3))
        return logprobs, entropy, row_max, log_sum, stored
    return *statistics_like(hidden, labels, with_entropy), stored


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, bias, labels, places, weight_grad, ctx.logits_dtype, ctx.transform, with_entropy, *others = inputs
    ctx.mode, ctx.workspace, ctx.implementation, start, ctx.vocab_group, _batch_invariant = others
    if ctx.vocab_group:
        labels = local_labels(labels, start, weight.shape[0])
    _logprobs, entropy, row_max, log_sum, stored = output
    if ctx.mode == "frozen":
        ctx.save_for_backward(stored)
    else:
        ctx.save_for_backward(hidden, weight, bias, labels, places, row_max, log_sum, entropy)
        # Not saved: the first backward overwrites the logits, and lets go of them; the backward of another micro-batch
        # may have added to `weight_grad` meanwhile.
        ctx.stored = stored if ctx.mode == "store" else None
        ctx.weight_grad, ctx.weight_node = weight_grad, weight.grad_fn
    ctx.mark_non_differentiable(row_max, log_sum, stored, *(() if with_entropy else (entropy,)))
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None, *_: object) -> tuple[Any, ...]:
    others = (None,) * 12
    needs = list(ctx.needs_input_grad[:3])
    if not any(needs) or (grad_logprobs is None and grad_entropy is None):
        return None, None, None, *others
    if ctx.mode == "frozen":
        assert grad_logprobs is not None  # this mode has no entropy
        (stored,) = ctx.saved_tensors
        return without_derivative(scaled_rows(stored, grad_logprobs)), None, None, *others
    hidden, weight, bias, labels, places, row_max, log_sum, entropy = ctx.saved_tensors
    if ctx.weight_grad is not None and not traced(row_max):
        needs[1] = needs[1] and asked_for(ctx.weight_node)
    if grad_logprobs is None:
        grad_logprobs = torch.zeros_like(row_max)
    stored, ctx.stored = ctx.stored, None  # a second backward computes the logits again
    overwrites = stored is not None and not traced(stored)
    backward = linear_logprob_backward_ if overwrites else linear_logprob_backward
    upstream = [grad_logprobs] if grad_entropy is None else [grad_logprobs, grad_entropy]
    with torch.no_grad():
        grads = backward(
            stored, ctx.weight_grad, hidden, weight, bias, labels, places, [row_max, log_sum, entropy], upstream, needs,
            ctx.logits_dtype, ctx.transform, ctx.workspace, ctx.implementation,
        )  # fmt: skip
    if ctx.vocab_group and needs[0]:
        grads = (sum_over_ranks(grads[0], ctx.vocab_group), *grads[1:])
    returned = (needs[0], needs[1] and ctx.weight_grad is None, needs[2])
    given = (without_derivative(grad) if wanted else None for grad, wanted in zip(grads, returned, strict=True))
    return *given, *others


@op(_fake, setup_context=_setup_context, backward=_backward, flops=flops.forward)
def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    places: Tensor | None,
    weight_grad: Tensor | None,
    logits_dtype: torch.dtype,
    transform: list[float],
    with_entropy: bool,
    mode: str,
    workspace: int,
    implementation: str,
    vocab_start: int,
    vocab_group: str,
    batch_invariant: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Log-probabilities, entropy (empty unless asked for), the statistics (max, log-sum) and what the mode stores.

    Args:
        hidden: [N, H].
        weight: [V, H].
        bias: [V] or None.
        labels: [N] int64, an index or `IGNORED`.
        places: [n] int64, rising: indices of the tokens to compute. None: all, or on a CPU those with a label.
        weight_grad: [V, H] fp32 (fp64). Forward does not touch it. Backward adds the gradient of weight to it, and
            returns none.
        logits_dtype: of the tiles of logits.
        mode: "none", "recompute", "store" or "frozen".
        workspace: bytes for tiles of logits.
        vocab_start, vocab_group: as in `token_logprob`, of the rows of weight and bias; not in mode "frozen". The
            gradient of hidden, which every rank has whole, is summed over them.
        batch_invariant: a token's results do not depend on the others; not in mode "store".

    Returns:
        logprobs, entropy, row_max, log_sum: [N] fp32, or fp64 for fp64 hidden; 0 where ignored. Of mode "frozen" the
            last two are empty.
        stored: [N, V] for "store", [N, H] for "frozen", else empty.
    """
    del weight_grad
    stored = hidden.new_empty(0)

    def forward(labels: Tensor) -> Statistics:
        nonlocal stored
        run = run_of(hidden, weight, bias, labels, places, logits_dtype, transform, workspace, implementation)
        with device_guard(hidden):
            if mode == "store":
                statistics, stored = modes.forward_store(run, with_entropy)
            elif mode == "frozen":
                logprobs, stored = modes.forward_frozen(run, batch_invariant)
                statistics = Statistics(logprobs, None, logprobs.new_empty(0), logprobs.new_empty(0))
            else:
                statistics = modes.forward_none(run, with_entropy, batch_invariant)
            return statistics

    if not vocab_group:
        return *tensors_of(forward(labels)), stored
    size, scale = weight.shape[0], LogitTransform.from_numbers(transform).scale
    return *tensors_of(statistics_over_ranks(forward, labels, vocab_start, size, scale, vocab_group)), stored


def _fake_backward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    _stored, weight_grad, hidden, weight, bias, _labels, _places, statistics, _upstream, needs, *_ = args
    return fake_gradients(hidden, weight, bias, statistics[0], [needs[0], needs[1] and weight_grad is None, needs[2]])


# Two ops for all backwards; they differ in whether stored logits are overwritten. Without them and without weight_grad
# both are functional.
@op(_fake_backward, mutates=("weight_grad",), flops=flops.backward)
def linear_logprob_backward(
    stored: Tensor | None,
    weight_grad: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    places: Tensor | None,
    statistics: list[Tensor],
    upstream: list[Tensor],
    needs: list[bool],
    logits_dtype: torch.dtype,
    transform: list[float],
    workspace: int,
    implementation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias, empty where `needs` says no.

    stored: the logits [N, V], or None: they are computed again.  weight_grad: [V, H] that the gradient of weight is
    added to; then none is returned.
    """
    run = _backward_run(
        stored, hidden, weight, bias, labels, places, upstream, logits_dtype, transform, workspace, implementation
    )
    return _gradients(run, stored, False, weight_grad, statistics, upstream, needs)


@op(_fake_backward, mutates=("stored", "weight_grad"), flops=flops.backward)
def linear_logprob_backward_(
    stored: Tensor | None,
    weight_grad: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    places: Tensor | None,
    statistics: list[Tensor],
    upstream: list[Tensor],
    needs: list[bool],
    logits_dtype: torch.dtype,
    transform: list[float],
    workspace: int,
    implementation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The same; the gradient of stored logits is written over them."""
    run = _backward_run(
        stored, hidden, weight, bias, labels, places, upstream, logits_dtype, transform, workspace, implementation
    )
    return _gradients(run, stored, True, weight_grad, statistics, upstream, needs)


def _backward_run(
    stored: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    places: Tensor | None,
    upstream: list[Tensor],
    *settings: Any,
) -> Run:
    if stored is None and labels.device.type == "cpu":  # a token without an incoming gradient needs no logits
        wanted = torch.stack([x != 0 for x in upstream]).any(0)
        labels = torch.where(wanted, labels, IGNORED)
    return run_of(hidden, weight, bias, labels, places, *settings)


def _gradients(
    run: Run,
    stored: Tensor | None,
    overwrite: bool,
    weight_grad: Tensor | None,
    statistics: list[Tensor],
    upstream: list[Tensor],
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    row_max, log_sum, entropy = statistics
    incoming = Upstream(*(x.contiguous() for x in upstream))
    # Log-probabilities are not read.
    saved = Statistics(row_max, None if incoming.entropy is None else entropy, row_max, log_sum)
    with device_guard(row_max):
        if stored is None:
            grads = modes.backward_recompute(run, saved, incoming, Needs(*needs), weight_grad)
        else:
            grads = modes.backward_store(run, saved, stored, overwrite, incoming, Needs(*needs))
    hidden_grad, new_weight_grad, bias_grad = (or_empty(grad, row_max) for grad in grads)
    return hidden_grad, new_weight_grad, bias_grad


def _fake_scaled(rows: Tensor, *_: object) -> Tensor:
    return torch.empty_like(rows)


@op(_fake_scaled)
def scaled_rows(rows: Tensor, factors: Tensor) -> Tensor:
    """rows [N, H] times factors [N], rounded once; 0 where a factor is 0, whatever the row."""
    out = torch.mul(rows, factors[:, None], out=torch.empty_like(rows))
    return out.masked_fill_((factors == 0)[:, None], 0)
