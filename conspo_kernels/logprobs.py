"""Log-probabilities of tokens and scores of rollouts: the parts that the losses are made of."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from . import check
from .distributed.vocab import VocabParallel
from .ops.ranks import gradient_factor
from .tokens import LinearHead, TokenOptions, label_logprobs, layout_scores, token_layout


def token_logprobs(
    logits: Tensor,
    labels: Tensor,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    shift: bool = False,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    vocab_parallel: VocabParallel | None = None,
    inplace_backward: bool = False,
    return_entropy: bool = False,
    implementation: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-probability of each token's label, without a softmax in memory.

    logp[t] = y[t, label] - logsumexp_v y[t, v],  y = f(logits) / temperature,
    f(z) = softcap * tanh(z * logit_scale / softcap), or z * logit_scale without a softcap; -inf stays -inf.

    Args:
        logits: [B, T, V] padded, or packed [N, V] or [1, N, V]; fp16, bf16, fp32 or fp64; last stride 1, the others
            free: a view such as `logits[:, :-1]` is read in place.
        labels: [B, T], [N] or [1, N] integers, aligned with the logits that predict them; `ignore_index`: no token.
        mask: shaped like labels, any real dtype, zero = no token. Labels under it are never looked at.
        cu_seqlens: [S + 1] int32 or int64, offsets of packed sequences; required for [N] with `shift`. Rows past the
            last offset are ignored. Without it [1, N] is one sequence.
        shift: labels (and mask) are the input ids: position t predicts label t + 1 within its own sequence. Outputs
            stay aligned with the logits. Better than slicing the logits, whose backward allocates a full buffer.
        temperature: T > 0 that the rollouts were sampled at.
        logit_scale: factor > 0 before the softcap.
        softcap: bound of the capped logits, > 0, or None.
        ignore_index: the label that means "no token"; it wins over an entry of the vocabulary.
        vocab_parallel: `VocabParallel(group, start)`: the logits are this rank's part of the vocabulary, which begins
            at entry `start`; labels are of the whole one, and the same on all ranks of the group, as the results are.
            Logits that are a DTensor, sharded along the vocabulary, say so themselves.
        inplace_backward: backward writes the gradient over the storage of `logits`, and so of every alias of them: no
            [.., V] buffer is allocated. Logits must not be a leaf. Who else needs their values in a later backward, a
            second one too, gets autograd's "modified by an inplace operation" error; who reads them gets the gradient.
        return_entropy: also return the entropy of each row's distribution, in nats, differentiable too.
        implementation: "auto", "triton", "native" or "torch". An explicit name runs or raises.

    Returns:
        logprobs, shaped like labels, fp32 (fp64 for fp64 logits), 0 where ignored; or (logprobs, entropy).

    Raises:
        TypeError, ValueError: an argument is of the wrong kind; the message says which, what was expected and what
            came. A label outside [0, V) raises on the CPU; on a GPU it is not read, and its log-probability is NaN.

    Cost: forward reads the logits once and allocates O(N); backward reads and writes them once. Tokens that are ignored
        or whose incoming gradient is zero are not read.

    Source: arXiv:2605.12969.
    """
    options = TokenOptions(
        mask, cu_seqlens, shift, ignore_index, implementation, temperature, logit_scale, softcap, vocab_parallel
    )
    logprobs, entropy, _layout = label_logprobs(
        logits, labels, options, inplace_backward=inplace_backward, with_entropy=return_entropy
    )
    logprobs = logprobs.view(labels.shape)
    return (logprobs, entropy.view(labels.shape)) if return_entropy else logprobs


def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    workspace_mib: float = 512,
    weight_grad: Tensor | None = None,
    batch_invariant: bool = False,
    synchronize: bool = False,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    shift: bool = False,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    vocab_parallel: VocabParallel | None = None,
    return_entropy: bool = False,
    implementation: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """`token_logprobs` of logits = hidden @ weight.T + bias, which are never whole in memory.

    Args:
        hidden: [B, T, H] padded, or packed [N, H] or [1, N, H]; fp16, bf16, fp32 or fp64. Under autocast hidden, weight
            and bias are cast as `F.linear` casts them.
        weight: [V, H], the lm_head's; dtype and device of hidden.
        bias: [V] or None.
        workspace_mib: memory for tiles of logits, MiB.
        weight_grad: [V, H] fp32 (fp64 for fp64 weights): backward adds the gradient of weight to it, unrounded, and
            weight itself gets none (the `main_grad` of some trainers). The logits are then computed again in backward.
        batch_invariant: a token's log-probability is the same, bit for bit, whichever batch it is computed in: every
            GEMM has one shape, up to 256 rows, and the last is padded. The logits are computed again in backward.
        synchronize: wait for the GPU once, to see which tokens have a label: the others then cost nothing, as on a CPU.
        vocab_parallel: as `token_logprobs`, of the rows of weight and bias. hidden is the same on all ranks of the
            group, and so is its gradient, which is summed over them.
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

    Source: DESIGN section 5.
    """
    options = TokenOptions(
        mask, cu_seqlens, shift, ignore_index, implementation, temperature, logit_scale, softcap, vocab_parallel
    )
    check.linear(hidden, weight, bias, workspace_mib, weight_grad)
    check.flags(batch_invariant=batch_invariant, synchronize=synchronize)
    check.flags(return_entropy=return_entropy)
    layout = token_layout("hidden", hidden, tuple(hidden.shape[:-1]), labels, options, None)
    head = LinearHead.of(hidden, weight, bias, workspace_mib, weight_grad, batch_invariant, synchronize)
    logprobs, entropy = head.logprobs(layout.labels, options, return_entropy)
    logprobs = logprobs.view(labels.shape)
    return (logprobs, entropy.view(labels.shape)) if return_entropy else logprobs


def sequence_scores(
    logprobs: Tensor,
    labels: Tensor,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    shift: bool = False,
    ignore_index: int = -100,
    context_group: ProcessGroup | None = None,
    grad_reduction: str = "mean",
    implementation: str = "auto",
) -> Tensor:
    """Length-normalised score of each rollout: the mean log-probability of its response tokens.

    s[i] = (1 / n_i) * sum_t logp[i, t], summed in a fixed order.

    Args:
        logprobs: [B, T] padded (a row is a rollout), or packed [N] or [1, N]; floating point.
        labels: integers, shaped like logprobs, and `mask`, of the same shape, `shift` and `ignore_index`: as given to
            `token_logprobs`; they say which tokens count.
        cu_seqlens: [S + 1] int32 or int64, offsets of packed rollouts; required for [N].
        context_group: the ranks over which the tokens of each rollout are spread: all have the same S rollouts, each
            its own tokens of them (none, perhaps). Scores are of whole rollouts, the same on every rank; the gradients
            of the parameters are to be added up over these ranks.
        grad_reduction: what the trainer does with gradients across `context_group`: "mean" (DDP, FSDP: they are
            multiplied by the number of ranks) or "sum".
        implementation: "auto", "triton", "native" or "torch".

    Returns:
        [S] fp32 (fp64 for fp64 log-probabilities), NaN for a rollout without response tokens.

    Raises:
        TypeError, ValueError: as `token_logprobs`.

    Cost: reads N log-probabilities and labels once.

    Source: arXiv:2605.12969.
    """
    check.logprobs(logprobs)
    check.ranks(grad_reduction, context_group=context_group)
    options = TokenOptions(
        mask, cu_seqlens, shift, ignore_index, implementation, context_group=context_group,
        context_factor=gradient_factor(context_group, grad_reduction),
    )  # fmt: skip
    layout = token_layout("logprobs", logprobs, tuple(logprobs.shape), labels, options, "scores")
    dtype = torch.float64 if logprobs.dtype == torch.float64 else torch.float32
    return layout_scores(logprobs.to(dtype).view(layout.labels.shape), layout, options)[0]
