"""Log-probabilities of tokens and scores of rollouts, the parts of the losses; and gradients of any other loss.

The gradient of a loss of log-probabilities is one coefficient per token, and `weighted_logprob_loss` has that gradient:

    logprobs     = token_logprobs(...) or linear_token_logprobs(...)    without a graph
    coefficients = torch.autograd.grad(loss_of(logprobs), logprobs)     any loss: GRPO, DAPO, CISPO, DPO ...
    weighted_logprob_loss(..., coefficients).backward()                 the gradient of that loss
"""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor
from typing_extensions import Unpack

from .conspo import rollout_scores
from .inputs import check
from .inputs.sources import hidden_source, logits_source, logprobs_source
from .inputs.tokens import tokens_of
from .inputs.weights import coefficients_of
from .options import LinearLogprobOptions, LogprobOptions
from .parallel import Parallel
from .sources import Source
from .values import Tokens
from .weighted import weighted_logprobs


@overload
def token_logprobs(
    logits: Tensor, labels: Tensor, *, return_entropy: Literal[False] = False, **options: Unpack[LogprobOptions]
) -> Tensor: ...
@overload
def token_logprobs(
    logits: Tensor, labels: Tensor, *, return_entropy: Literal[True], **options: Unpack[LogprobOptions]
) -> tuple[Tensor, Tensor]: ...
@overload
def token_logprobs(
    logits: Tensor, labels: Tensor, *, return_entropy: bool, **options: Unpack[LogprobOptions]
) -> Tensor | tuple[Tensor, Tensor]: ...
def token_logprobs(
    logits: Tensor,
    labels: Tensor,
    *,
    response_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    shift: bool = False,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    parallel: Parallel | None = None,
    inplace_backward: bool = False,
    return_entropy: bool = False,
    implementation: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-probability of each token's label, without a softmax in memory.

        logp[t] = y[t, label] - logsumexp_v y[t, v],  y = f(logits) / temperature,
        f(z) = softcap * tanh(z * logit_scale / softcap), or z * logit_scale without a softcap; -inf stays -inf.

    Args:
        cu_seqlens: as `conspo_loss`; [N] needs it only with `shift`.
        shift: as `conspo_loss`. Outputs stay aligned with the logits.
        parallel: a `Parallel`, of which `vocab` and `vocab_start` are used: the logits are this rank's part of the
            vocabulary. Logits that are a DTensor, sharded along the vocabulary, need none.
        inplace_backward: backward writes the gradient over the storage of `logits`, and so of every alias of them: no
            [.., V] buffer is allocated. Logits must not be a leaf. After that, reading them gives the gradient, and any
            backward that needs their values raises autograd's "modified by an inplace operation". A second backward
            through this loss is one of these.
        return_entropy: also return the entropy of each row's distribution, in nats, differentiable too.
        Others: as `conspo_loss`.

    Returns:
        logprobs, shaped like labels, fp32 (fp64 for fp64 logits), 0 where ignored; or (logprobs, entropy).

    Raises:
        TypeError, ValueError: as `conspo_loss`. A label outside [0, V) raises on the CPU; on a GPU it is not read, and
            its log-probability is NaN.

    Cost: forward reads the logits once and allocates O(N); backward reads and writes them once. Tokens that are ignored
        or whose incoming gradient is zero are not read.

    Source: arXiv:2605.12969.
    """
    check.flags(return_entropy=return_entropy)
    source = logits_source(
        logits, temperature, logit_scale, softcap, parallel, implementation, inplace_backward, "inplace_backward"
    )
    tokens = tokens_of(source, labels, response_mask, cu_seqlens, shift, ignore_index)
    return _logprobs(source, tokens, return_entropy)


@overload
def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    return_entropy: Literal[False] = False,
    **options: Unpack[LinearLogprobOptions],
) -> Tensor: ...
@overload
def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    return_entropy: Literal[True],
    **options: Unpack[LinearLogprobOptions],
) -> tuple[Tensor, Tensor]: ...
@overload
def linear_token_logprobs(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, return_entropy: bool, **options: Unpack[LinearLogprobOptions]
) -> Tensor | tuple[Tensor, Tensor]: ...
def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    workspace_mib: float | None = None,
    weight_grad: Tensor | None = None,
    logits_dtype: torch.dtype | None = None,
    batch_invariant: bool = False,
    synchronize: bool = False,
    response_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    shift: bool = False,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    parallel: Parallel | None = None,
    return_entropy: bool = False,
    implementation: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """`token_logprobs` of logits = hidden @ weight.T + bias, which are never whole in memory.

    Args:
        hidden: [B, T, H] padded, or packed [N, H] or [1, N, H]; fp16, bf16, fp32 or fp64. Under autocast hidden, weight
            and bias are cast as `F.linear` casts them.
        weight: [V, H], the lm_head's; dtype and device of hidden.
        bias: [V] or None.
        workspace_mib: memory for tiles of logits, MiB; None: 512, or on a GPU a 32nd of its memory where that is more.
            Sums over tiles go through memory once more for each tile, so a larger workspace saves time. With the same
            workspace the same inputs give the same bits.
        weight_grad: [V, H] fp32 (fp64 for fp64 weights): backward adds the gradient of weight to it, unrounded, and
            weight itself gets none (the `main_grad` of some trainers). Backward then computes the logits again.
        logits_dtype: dtype of the tiles of logits. None: that of hidden. torch.float32: fp32 logits from 16-bit
            operands, not rounded in between; their gradient is still rounded to the dtype of hidden.
        batch_invariant: a token's log-probability is the same, bit for bit, whichever batch it is computed in, as far
            as the GEMM library lets it. Every GEMM has one shape, up to 256 rows, the last one padded, and our kernels
            sum each row alike. That a library sums every row of one shape alike, wherever it stands, is tested on CPUs;
            cuBLAS does not promise it (a kernel may split the sums of some tiles and not of others): test it for your
            shape. Backward computes the logits again.
        synchronize: wait for the GPU once, to learn which tokens have a label. The others then cost nothing, as on a
            CPU.
        parallel: as `token_logprobs`; `vocab` splits the rows of weight and bias. hidden is the same on all of its
            ranks, and so is its gradient, which is summed over them.
        Others: as `token_logprobs`.

    Returns:
        As `token_logprobs`.

    Raises:
        TypeError, ValueError: as `token_logprobs`; for a sharded weight (DTensor, or empty under ZeRO-3) with how to
            gather it.

    Cost, in GEMMs of 2 * N * H * V operations: without gradient 1. With one 4, as backward computes the logits again;
        3 where all of them fit the workspace and are kept; 2 where neither weight nor bias needs a gradient (and the
        entropy is not asked for). Memory: the gradients, one accumulator in fp32, and the workspace. On a CPU ignored
        tokens cost nothing.

    Source: arXiv:2605.12969.
    """
    check.flags(return_entropy=return_entropy)
    source = hidden_source(
        hidden, weight, bias, temperature, logit_scale, softcap, parallel, implementation,
        workspace_mib=workspace_mib, logits_dtype=logits_dtype, weight_grad=weight_grad,
        batch_invariant=batch_invariant, synchronize=synchronize,
    )  # fmt: skip
    tokens = tokens_of(source, labels, response_mask, cu_seqlens, shift, ignore_index)
    return _logprobs(source, tokens, return_entropy)


def _logprobs(source: Source, tokens: Tokens, return_entropy: bool) -> Tensor | tuple[Tensor, Tensor]:
    logprobs, entropy = source.logprobs(tokens, with_entropy=return_entropy)
    return (logprobs.view(tokens.shape), entropy.view(tokens.shape)) if return_entropy else logprobs.view(tokens.shape)


def sequence_scores(
    logprobs: Tensor,
    labels: Tensor,
    *,
    response_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    shift: bool = False,
    ignore_index: int = -100,
    parallel: Parallel | None = None,
    implementation: str = "auto",
) -> Tensor:
    """Length-normalised score of each rollout: the mean log-probability of its response tokens.

        s[i] = (1 / n_i) * sum_t logp[i, t], summed in a fixed order.

    Args:
        logprobs: [B, T] padded (a row is a rollout), or packed [N] or [1, N]; floating point.
        labels, response_mask, shift, ignore_index: what `token_logprobs` was called with; they say which tokens count.
        cu_seqlens: [S + 1] int32 or int64, offsets of packed rollouts; required for [N].
        parallel: a `Parallel`, of which `context` is used: the ranks over which the tokens of each rollout are spread.
            All have the same S rollouts, each its own tokens of them, perhaps none. Scores are of whole rollouts, the
            same on every rank. Gradients of parameters are to be summed over these ranks, see `grad_reduction`.
        implementation: as `conspo_loss`.

    Returns:
        [S] fp32 (fp64 for fp64 log-probabilities), NaN for a rollout without response tokens.

    Raises:
        TypeError, ValueError: as `token_logprobs`.

    Cost: reads N log-probabilities and labels once.

    Source: arXiv:2605.12969.
    """
    source = logprobs_source(logprobs, parallel, implementation)
    tokens = tokens_of(source, labels, response_mask, cu_seqlens, shift, ignore_index, "scores")
    values = source.values.view(tokens.labels.shape)
    return rollout_scores(values, tokens, source.parallel, implementation)[0]


def weighted_logprob_loss(
    logits: Tensor,
    labels: Tensor,
    coefficients: Tensor,
    *,
    inplace: bool = False,
    cu_seqlens: Tensor | None = None,
    response_mask: Tensor | None = None,
    shift: bool = False,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    parallel: Parallel | None = None,
    implementation: str = "auto",
) -> Tensor:
    """sum_t coefficients[t] * logp[t] over response tokens, with its gradient computed in this call.

    Args:
        coefficients: shaped like labels, floating point, aligned with what `token_logprobs` returns: dloss/dlogp of any
            loss of the log-probabilities. Constants. Those of ignored tokens are not looked at. May lie on the CPU.
        inplace: the gradient overwrites the logits, in this call: no [.., V] buffer is allocated. Every
            misuse of `inplace_backward` of `token_logprobs` is a misuse of it too, and raises.
        parallel: a `Parallel`: `vocab` splits the vocabulary. With `context` the value is the sum over its ranks, and
            gradients are multiplied as `grad_reduction` says.
        Others: as `token_logprobs`.

    Returns:
        0-d, fp32 (fp64 for fp64 logits). The value is that of the sum, not of the loss that the coefficients come from;
        the gradient is that of both. This call has computed the gradient: backward multiplies it by the scalar that
        comes in, which costs nothing where that is 1. A second backward raises. In fp16 multiply the coefficients by
        the loss scale, not the result.

    Raises:
        TypeError, ValueError: as `token_logprobs`.

    Cost: one read and one write of the logits where the caches hold a row. Tokens whose coefficient is zero are not
        read, only zero-filled. With `parallel.vocab` the gradient is left to backward: one read more.

    Source: the chain rule.
    """
    source = logits_source(logits, temperature, logit_scale, softcap, parallel, implementation, inplace)
    tokens = tokens_of(source, labels, response_mask, cu_seqlens, shift, ignore_index)
    coefficients, tokens = coefficients_of(source, tokens, coefficients)
    return weighted_logprobs(source, tokens, coefficients)


def linear_weighted_logprob_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    coefficients: Tensor,
    *,
    bias: Tensor | None = None,
    workspace_mib: float | None = None,
    weight_grad: Tensor | None = None,
    logits_dtype: torch.dtype | None = None,
    synchronize: bool = False,
    cu_seqlens: Tensor | None = None,
    response_mask: Tensor | None = None,
    shift: bool = False,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    parallel: Parallel | None = None,
    implementation: str = "auto",
) -> Tensor:
    """`weighted_logprob_loss` of logits = hidden @ weight.T + bias, which are never whole in memory.

    Args:
        hidden, weight, bias, workspace_mib, logits_dtype, synchronize: as `linear_token_logprobs`.
        weight_grad: as `linear_token_logprobs`. This call computes the gradient of weight in fp32, a second [V, H]
            beside the buffer; backward multiplies it by the scalar that comes in, and adds it.
        Others: as `weighted_logprob_loss`.

    Returns, Raises: as `weighted_logprob_loss`.

    Cost: three GEMMs of 2 * N * H * V operations in this call, two where neither weight nor bias needs a gradient.
        Tokens whose coefficient is zero cost nothing on a CPU, and on a GPU where the coefficients lie on the CPU. With
        `parallel.vocab` as `linear_token_logprobs`: three or four GEMMs.

    Source: the chain rule.
    """
    source = hidden_source(
        hidden, weight, bias, temperature, logit_scale, softcap, parallel, implementation,
        workspace_mib=workspace_mib, logits_dtype=logits_dtype, weight_grad=weight_grad, synchronize=synchronize,
    )  # fmt: skip
    tokens = tokens_of(source, labels, response_mask, cu_seqlens, shift, ignore_index)
    coefficients, tokens = coefficients_of(source, tokens, coefficients)
    return weighted_logprobs(source, tokens, coefficients)
