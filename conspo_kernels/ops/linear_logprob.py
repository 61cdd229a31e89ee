"""conspo::linear_logprob: token log-probabilities from hidden states and the lm_head weight, logits never materialised.

Modes, each the least number of GEMMs (2 * N * H * V operations) for what is known and needed:

    none       1   no gradient
    recompute  4   backward computes the logits again
    store      3   all logits fit the workspace and are kept for backward
    frozen     2   neither weight nor bias needs a gradient: that of hidden for coefficients of one, in the forward
    known      3   `linear_known`: the coefficients are there beforehand, all gradients in the forward
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

from ..kernels import linear_tiles
from ..kernels.linear_tiles import IGNORED, Forward, Head, Needs, Tokens
from ..kernels.transform import LogitTransform
from .derivative import without_derivative
from .implementation import twin
from .ranks import labels_here, statistics_of_all, sum_over_ranks
from .token_logprob import check_labels


@torch.library.custom_op("conspo::linear_logprob", mutates_args=())
def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    keep: Tensor | None,
    weight_grad: Tensor | None,
    ignore_index: int,
    temperature: float,
    logit_scale: float,
    softcap: float | None,
    with_entropy: bool,
    mode: str,
    workspace: int,
    implementation: str,
    vocab_start: int = 0,
    vocab_group: str = "",
    batch_invariant: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Log-probabilities, entropy (empty unless asked for), the statistics (max, log-sum) and what the mode stores.

    Args:
        hidden: [N, H].
        weight: [V, H].
        bias: [V] or None.
        labels: [N] int64.
        keep: [N] bool on the CPU, False for tokens whose log-probability nobody wants; None: not known.
        weight_grad: [V, H] fp32 (fp64), untouched here: backward adds the gradient of weight to it, and returns none.
        mode: "none", "recompute", "store" or "frozen".
        workspace: bytes for tiles of logits.
        vocab_start, vocab_group: as in `token_logprob`, of the rows of weight and bias; not in mode "frozen". The
            gradient of hidden, which every rank has whole, is summed over them.
        batch_invariant: a token's results do not depend on the others; not in mode "store".

    Returns:
        logprobs, entropy, row_max, log_sum: [N] fp32, or fp64 for fp64 hidden; 0 where ignored.
        stored: [N, V] for "store", [N, H] for "frozen", else empty.
    """
    transform = LogitTransform(temperature, logit_scale, softcap)
    kernels = twin("token_logprob", implementation, hidden.device)
    stored = None

    def forward(labels: Tensor, ignore_index: int) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        nonlocal stored
        with torch.cuda.device_of(hidden):
            tokens = Tokens.of(hidden, labels, ignore_index, keep)
            *found, stored = linear_tiles.forward(
                kernels, tokens, Head(weight, bias), transform, with_entropy, mode, workspace, batch_invariant
            )
        return tuple(found)  # type: ignore[return-value]

    if vocab_group:
        logprobs, entropy, row_max, log_sum = statistics_of_all(
            forward, labels, ignore_index, vocab_start, weight.shape[0], transform.scale, vocab_group
        )
    else:
        check_labels(labels, ignore_index, weight.shape[0])
        logprobs, entropy, row_max, log_sum = forward(labels, ignore_index)
    return logprobs, or_empty(entropy, logprobs), row_max, log_sum, or_empty(stored, logprobs)


def or_empty(x: Tensor | None, like: Tensor) -> Tensor:
    """An op returns tensors, and no tensor twice."""
    return like.new_empty(0) if x is None else x


@linear_logprob.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    keep: Tensor | None,
    weight_grad: Tensor | None,
    ignore_index: int,
    temperature: float,
    logit_scale: float,
    softcap: float | None,
    with_entropy: bool,
    mode: str,
    workspace: int,
    implementation: str,
    vocab_start: int = 0,
    vocab_group: str = "",
    batch_invariant: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    logprobs, entropy, row_max, log_sum = (hidden.new_empty(labels.shape, dtype=dtype) for _ in range(4))
    stored = logprobs.new_empty(0)
    if mode == "store":
        stored = hidden.new_empty(labels.shape[0], weight.shape[0])
    elif mode == "frozen":
        stored = hidden.new_empty(labels.shape[0], hidden.shape[1])
    return logprobs, entropy if with_entropy else logprobs.new_empty(0), row_max, log_sum, stored


def fake_gradients(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, like: Tensor, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    inputs = (hidden, weight, bias)
    hidden_grad, weight_grad, bias_grad = (
        torch.empty_like(x, memory_format=torch.contiguous_format) if needed and x is not None else like.new_empty(0)
        for x, needed in zip(inputs, needs, strict=True)
    )
    return hidden_grad, weight_grad, bias_grad


# One op for all backwards: where nothing is stored or accumulated into, it is functional.
@torch.library.custom_op("conspo::linear_logprob_backward", mutates_args={"stored", "weight_grad"})
def linear_logprob_backward(
    stored: Tensor | None,
    weight_grad: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    keep: Tensor | None,
    row_max: Tensor,
    log_sum: Tensor,
    entropy: Tensor,
    grad_logprobs: Tensor,
    grad_entropy: Tensor | None,
    needs: list[bool],
    ignore_index: int,
    temperature: float,
    logit_scale: float,
    softcap: float | None,
    workspace: int,
    implementation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias, empty where `needs` says no.

    stored: the logits [N, V], which their gradient overwrites, or None: they are computed again.  weight_grad: [V, H]
    that the gradient of weight is added to; then none is returned.
    """
    transform = LogitTransform(temperature, logit_scale, softcap)
    if stored is None and labels.device.type == "cpu":  # what has no gradient needs no logits: of another rank's groups
        wanted = grad_logprobs != 0 if grad_entropy is None else (grad_logprobs != 0) | (grad_entropy != 0)
        labels = torch.where(wanted, labels, ignore_index)
    with torch.cuda.device_of(hidden):
        grads = linear_tiles.backward(
            twin("token_logprob", implementation, hidden.device), Tokens.of(hidden, labels, ignore_index, keep),
            Head(weight, bias), transform, Forward(row_max, entropy, row_max, log_sum, stored),
            grad_logprobs.contiguous(), None if grad_entropy is None else grad_entropy.contiguous(), Needs(*needs),
            workspace, weight_grad,
        )  # fmt: skip
    hidden_grad, weight_grad, bias_grad = (or_empty(grad, row_max) for grad in grads)
    return hidden_grad, weight_grad, bias_grad


@linear_logprob_backward.register_fake
def _(
    stored: Tensor | None,
    weight_grad: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    keep: Tensor | None,
    row_max: Tensor,
    log_sum: Tensor,
    entropy: Tensor,
    grad_logprobs: Tensor,
    grad_entropy: Tensor | None,
    needs: list[bool],
    *_others: object,
) -> tuple[Tensor, Tensor, Tensor]:
    returned = [needs[0], needs[1] and weight_grad is None, needs[2]]
    return fake_gradients(hidden, weight, bias, row_max, returned)


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    hidden, weight, bias, labels, keep, weight_grad, *others = inputs
    *transform, with_entropy, ctx.mode, ctx.workspace, ctx.implementation, start, ctx.vocab_group, _ = others
    if ctx.vocab_group:
        labels, transform[0] = labels_here(labels, transform[0], start, weight.shape[0]), IGNORED
    ctx.transform = transform
    _logprobs, entropy, row_max, log_sum, stored = output
    if ctx.mode == "frozen":
        ctx.save_for_backward(stored)
    else:
        ctx.save_for_backward(hidden, weight, bias, labels, keep, row_max, log_sum, entropy)
        # Not saved: the first backward overwrites the logits, and lets go of them; the backward of another micro-batch
        # may have added to `weight_grad` meanwhile.
        ctx.stored = stored if ctx.mode == "store" else None
        ctx.weight_grad = weight_grad
    ctx.mark_non_differentiable(row_max, log_sum, stored, *(() if with_entropy else (entropy,)))
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_logprobs, grad_entropy, *_):  # type: ignore[no-untyped-def]
    nothing = (None,) * 14
    needs = list(ctx.needs_input_grad[:3])
    if not any(needs) or (grad_logprobs is None and grad_entropy is None):
        return None, None, None, *nothing
    if ctx.mode == "frozen":
        (stored,) = ctx.saved_tensors
        return without_derivative(scaled_rows(stored, grad_logprobs)), None, None, *nothing
    hidden, weight, bias, labels, keep, row_max, log_sum, entropy = ctx.saved_tensors
    if grad_logprobs is None:
        grad_logprobs = torch.zeros_like(row_max)
    stored, ctx.stored = ctx.stored, None  # a second backward computes the logits again
    if isinstance(stored, FakeTensor | FunctionalTensor):  # what is traced may not overwrite what the forward returned
        stored = stored.clone()
    grads = linear_logprob_backward(
        stored, ctx.weight_grad, hidden, weight, bias, labels, keep, row_max, log_sum, entropy, grad_logprobs,
        grad_entropy, needs, *ctx.transform, ctx.workspace, ctx.implementation,
    )  # fmt: skip
    if ctx.vocab_group and needs[0]:
        grads = (sum_over_ranks(grads[0], ctx.vocab_group), *grads[1:])
    returned = (needs[0], needs[1] and ctx.weight_grad is None, needs[2])
    given = (without_derivative(grad) if wanted else None for grad, wanted in zip(grads, returned, strict=True))
    return *given, *nothing


linear_logprob.register_autograd(_backward, setup_context=_setup_context)


@torch.library.custom_op("conspo::scaled_rows", mutates_args=())
def scaled_rows(rows: Tensor, factors: Tensor) -> Tensor:
    """rows [N, H] times factors [N], rounded once; 0 where a factor is 0, whatever the row."""
    out = torch.mul(rows, factors[:, None], out=torch.empty_like(rows))
    return out.masked_fill_((factors == 0)[:, None], 0)


@scaled_rows.register_fake
def _(rows: Tensor, factors: Tensor) -> Tensor:
    return torch.empty_like(rows)
