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
from ..linear.tiles import Head, RowSelection
from ..values import IGNORED, LogitTransform, local_labels
from . import flops
from .ranks import statistics_over_ranks, sum_over_ranks
from .registration import asked_for, op, saved_tensors, traced
from .token_logprob import incoming_of, statistics_like, tensors_of


def run_of(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    indices: Tensor | None,
    logits_dtype: torch.dtype,
    transform: list[float],
    workspace: int,
    implementation: str,
) -> Run:
    """The arguments of an op as the modes take them."""
    return Run(
        backend=backend_for(implementation, hidden.device),
        tokens=RowSelection.from_labels(hidden, labels, indices),
        head=Head(weight, bias, logits_dtype),
        transform=LogitTransform(*transform),
        workspace=workspace,
    )


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


def _fake(it: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    logprobs, entropy, row_max, log_sum = statistics_like(it.hidden, it.labels, it.with_entropy)
    stored = it.hidden.new_empty(0)
    if it.mode == "store":
        stored = Head(it.weight, it.bias, it.logits_dtype).new_logits(it.labels.shape[0], it.weight.shape[0])
    elif it.mode == "frozen":
        stored = torch.empty_like(it.hidden, memory_format=torch.contiguous_format)
        entropy, row_max, log_sum = (logprobs.new_empty(0) for _ in range(3))
    return logprobs, entropy, row_max, log_sum, stored


def _save(ctx: Any, it: Any, output: tuple[Tensor, ...]) -> None:
    ctx.mode, ctx.vocab_group = it.mode, it.vocab_group
    ctx.settings = {
        "logits_dtype": it.logits_dtype,
        "transform": it.transform,
        "workspace": it.workspace,
        "implementation": it.implementation,
    }
    labels = local_labels(it.labels, it.vocab_start, it.weight.shape[0]) if it.vocab_group else it.labels
    _logprobs, entropy, row_max, log_sum, stored = output
    if it.mode == "frozen":
        ctx.save_for_backward(stored)
    else:
        ctx.save_for_backward(it.hidden, it.weight, it.bias, labels, it.indices, row_max, log_sum, entropy)
        # Not saved: the first backward overwrites the logits, and lets go of them; the backward of another micro-batch
        # may have added to `weight_grad` meanwhile.
        ctx.stored = stored if it.mode == "store" else None
        ctx.weight_grad, ctx.weight_node = it.weight_grad, it.weight.grad_fn
    ctx.mark_non_differentiable(row_max, log_sum, stored, *(() if it.with_entropy else (entropy,)))
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None, *_: object) -> dict[str, Any]:
    needs = list(ctx.needs_input_grad[:3])
    if not any(needs) or (grad_logprobs is None and grad_entropy is None):
        return {}
    if ctx.mode == "frozen":
        assert grad_logprobs is not None  # this mode has no entropy
        (stored,) = saved_tensors(ctx)
        grad_hidden = scaled_rows(rows=stored, factors=grad_logprobs.detach())
        return {"hidden": sum_over_ranks(x=grad_hidden, group=ctx.vocab_group) if ctx.vocab_group else grad_hidden}
    hidden, weight, bias, labels, indices, row_max, log_sum, entropy = saved_tensors(ctx)
    if ctx.weight_grad is not None and not traced(row_max):
        needs[1] = needs[1] and asked_for(ctx.weight_node)
    stored, ctx.stored = ctx.stored, None  # a second backward computes the logits again
    with torch.no_grad():
        grads = linear_logprob_backward(
            hidden=hidden,
            weight=weight,
            bias=bias,
            labels=labels,
            indices=indices,
            row_max=row_max,
            log_sum=log_sum,
            entropy=None if grad_entropy is None else entropy,
            grad_logprobs=torch.zeros_like(row_max) if grad_logprobs is None else grad_logprobs,
            grad_entropy=grad_entropy,
            needs=needs,
            stored=stored,
            grad_logits=None if traced(stored) else stored,
            weight_grad=ctx.weight_grad,
            **ctx.settings,
        )
    if ctx.vocab_group and needs[0]:
        grads = (sum_over_ranks(x=grads[0], group=ctx.vocab_group), *grads[1:])
    returned = (needs[0], needs[1] and ctx.weight_grad is None, needs[2])
    return {name: x for name, x, needed in zip(("hidden", "weight", "bias"), grads, returned, strict=True) if needed}


@op(_fake, save=_save, backward=_backward, flops=flops.forward)
def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    indices: Tensor | None,
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
        indices: [n] int64, rising: indices of the tokens to compute. None: all, or on a CPU those with a label.
        weight_grad: [V, H] fp32 (fp64). Forward does not touch it. Backward adds the gradient of weight to it, and
            returns none.
        logits_dtype: of the tiles of logits.
        mode: "none", "recompute", "store" or "frozen".
        workspace: bytes for tiles of logits.
        vocab_start, vocab_group: as in `token_logprob`, of the rows of weight and bias. The gradient of hidden, which
            every rank has whole, is summed over them.
        batch_invariant: a token's results do not depend on the others; not in mode "store".

    Returns:
        logprobs, entropy, row_max, log_sum: [N] fp32, or fp64 for fp64 hidden; 0 where ignored. Of mode "frozen" the
            last two are empty.
        stored: [N, V] for "store", [N, H] for "frozen", else empty.
    """
    del weight_grad
    size = weight.shape[0]
    local = local_labels(labels, vocab_start, size) if vocab_group else labels
    run = run_of(hidden, weight, bias, local, indices, logits_dtype, transform, workspace, implementation)
    statistics, stored = modes.forward(run, mode, with_entropy, batch_invariant, split=bool(vocab_group))
    if vocab_group:
        whole = statistics_over_ranks(statistics, labels, local, vocab_start, size, run.transform.scale, vocab_group)
        if mode == "frozen":
            modes.complete_frozen(stored, statistics, whole, local, weight, run.transform)
            whole = modes.logprobs_alone(whole.logprobs)
        statistics = whole
    return *tensors_of(statistics), stored


def _fake_backward(it: Any) -> tuple[Tensor, Tensor, Tensor]:
    needs = [it.needs[0], it.needs[1] and it.weight_grad is None, it.needs[2]]
    return fake_gradients(it.hidden, it.weight, it.bias, it.row_max, needs)


@op(_fake_backward, mutates=("grad_logits", "weight_grad"), flops=flops.backward)
def linear_logprob_backward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    indices: Tensor | None,
    row_max: Tensor,
    log_sum: Tensor,
    entropy: Tensor | None,
    grad_logprobs: Tensor,
    grad_entropy: Tensor | None,
    needs: list[bool],
    stored: Tensor | None,
    grad_logits: Tensor | None,
    weight_grad: Tensor | None,
    logits_dtype: torch.dtype,
    transform: list[float],
    workspace: int,
    implementation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias, empty where `needs` says no.

    row_max, log_sum, entropy, grad_logprobs, grad_entropy: as of `token_logprob_backward`.  stored: the logits [N, V],
    or None: they are computed again.  grad_logits: `stored` again, if their gradient may overwrite them, or None.
    weight_grad: [V, H] that the gradient of weight is added to; then none is returned.
    """
    labels = _labels_with_gradient(labels, stored, grad_logprobs, grad_entropy)
    run = run_of(hidden, weight, bias, labels, indices, logits_dtype, transform, workspace, implementation)
    incoming = incoming_of(row_max, log_sum, entropy, grad_logprobs, grad_entropy)
    if stored is None:
        grads = modes.backward_recompute(run, incoming, Needs(*needs), weight_grad)
    else:
        grads = modes.backward_store(run, incoming, stored, grad_logits is not None, Needs(*needs))
    hidden_grad, new_weight_grad, bias_grad = (or_empty(grad, row_max) for grad in grads)
    return hidden_grad, new_weight_grad, bias_grad


def _labels_with_gradient(
    labels: Tensor, stored: Tensor | None, grad_logprobs: Tensor, grad_entropy: Tensor | None
) -> Tensor:
    """On a CPU a token without an incoming gradient needs no logits."""
    if stored is not None or labels.device.type != "cpu":
        return labels
    needed = grad_logprobs != 0
    if grad_entropy is not None:
        needed |= grad_entropy != 0
    return torch.where(needed, labels, IGNORED)


@op(lambda it: torch.empty_like(it.rows))
def scaled_rows(rows: Tensor, factors: Tensor) -> Tensor:
    """rows [N, H] times factors [N], rounded once; 0 where a factor is 0, whatever the row."""
    out = torch.mul(rows, factors[:, None], out=torch.empty_like(rows))
    return out.masked_fill_((factors == 0)[:, None], 0)
