"""Log-probabilities of tokens and scores of rollouts: the parts that the losses are made of."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import check
from .layout import TokenLayout, rows
from .ops.linear_logprob import linear_logprob
from .ops.sequence_score import sequence_offsets, sequence_score
from .ops.token_logprob import token_logprob


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
    options = TokenOptions(mask, cu_seqlens, shift, ignore_index, implementation, temperature, logit_scale, softcap)
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
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    shift: bool = False,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
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
    options = TokenOptions(mask, cu_seqlens, shift, ignore_index, implementation, temperature, logit_scale, softcap)
    check.linear(hidden, weight, bias, workspace_mib, weight_grad)
    check.flags(return_entropy=return_entropy)
    layout = token_layout("hidden", hidden, tuple(hidden.shape[:-1]), labels, options, None)
    head = LinearHead.of(hidden, weight, bias, workspace_mib, weight_grad)
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
    implementation: str = "auto",
) -> Tensor:
    """Length-normalised score of each rollout: the mean log-probability of its response tokens.

    s[i] = (1 / n_i) * sum_t logp[i, t], summed in a fixed order.

    Args:
        logprobs: [B, T] padded (a row is a rollout), or packed [N] or [1, N]; floating point.
        labels: integers, shaped like logprobs, and `mask`, of the same shape, `shift` and `ignore_index`: as given to
            `token_logprobs`; they say which tokens count.
        cu_seqlens: [S + 1] int32 or int64, offsets of packed rollouts; required for [N].
        implementation: "auto", "triton", "native" or "torch".

    Returns:
        [S] fp32 (fp64 for fp64 log-probabilities), NaN for a rollout without response tokens.

    Raises:
        TypeError, ValueError: as `token_logprobs`.

    Cost: reads N log-probabilities and labels once.

    Source: arXiv:2605.12969.
    """
    check.logprobs(logprobs)
    options = TokenOptions(mask, cu_seqlens, shift, ignore_index, implementation)
    layout = token_layout("logprobs", logprobs, tuple(logprobs.shape), labels, options, "scores")
    dtype = torch.float64 if logprobs.dtype == torch.float64 else torch.float32
    return layout_scores(logprobs.to(dtype).view(layout.labels.shape), layout, options)[0]


class TokenOptions(NamedTuple):
    """What the doors take alike: which tokens count, who computes, and the transform of the logits."""

    mask: Tensor | None
    cu_seqlens: Tensor | None
    shift: bool
    ignore_index: int
    implementation: str
    temperature: float = 1.0
    logit_scale: float = 1.0
    softcap: float | None = None


class LinearHead(NamedTuple):
    """Hidden states [N, H] and the head's weight [V, H] and bias, in the dtype that they are multiplied in."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    workspace: int
    weight_grad: Tensor | None

    @classmethod
    def of(
        cls,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        workspace_mib: float,
        weight_grad: Tensor | None = None,
    ) -> LinearHead:
        device = hidden.device.type
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)

            def cast(x: Tensor) -> Tensor:
                return x if x.dtype == torch.float64 else x.to(dtype)

            hidden, weight, bias = cast(hidden), cast(weight), None if bias is None else cast(bias)
        return cls(hidden.reshape(-1, hidden.shape[-1]), weight, bias, int(workspace_mib * 2**20), weight_grad)

    @property
    def needs(self) -> list[bool]:
        """Whether hidden, weight and bias want a gradient."""
        wanted = torch.is_grad_enabled()
        return [wanted and x is not None and x.requires_grad for x in (self.hidden, self.weight, self.bias)]

    def mode(self, with_entropy: bool) -> str:
        """The mode of `ops/linear_logprob.py` with the fewest GEMMs."""
        needs = self.needs
        if not any(needs):
            return "none"
        if not any(needs[1:]) and not with_entropy:
            return "frozen"
        if self.weight_grad is not None:
            return "recompute"
        size = self.hidden.shape[0] * self.weight.shape[0] * self.hidden.element_size()
        return "store" if size <= self.workspace else "recompute"

    def logprobs(
        self, labels: Tensor, options: TokenOptions, with_entropy: bool = False, keep: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Log-probabilities and entropies (empty unless asked for), shaped like labels [B, T]."""
        logprobs, entropy, *_ = linear_logprob(
            self.hidden, self.weight, self.bias, labels.flatten(), keep, self.weight_grad, options.ignore_index,
            options.temperature, options.logit_scale, options.softcap, with_entropy, self.mode(with_entropy),
            self.workspace, options.implementation,
        )  # fmt: skip
        return logprobs.view(labels.shape), entropy


def token_layout(
    name: str, like: Tensor, shape: tuple[int, ...], labels: Tensor, options: TokenOptions, needed_for: str | None
) -> TokenLayout:
    """Check labels, mask and cu_seqlens against the tensor `name`, whose tokens have the given shape; lay them out.

    needed_for: what cannot be had of packed tokens without cu_seqlens.
    """
    check.implementation(options.implementation)
    check.logit_transform(options.temperature, options.logit_scale, options.softcap)
    check.flags(shift=options.shift)
    check.ignore_index(options.ignore_index)
    check.tokens(labels, options.mask, name, shape, like)
    check.cu_seqlens(options.cu_seqlens, shape, needed_for or ("shift=True" if options.shift else None))
    check.devices(labels.device, cu_seqlens=options.cu_seqlens)
    offsets = None
    if options.cu_seqlens is not None:
        offsets = sequence_offsets(options.cu_seqlens, labels.numel(), labels.device)
    return TokenLayout.of(labels, options.mask, offsets, options.shift, options.ignore_index)


def label_logprobs(
    logits: Tensor,
    labels: Tensor,
    options: TokenOptions,
    *,
    inplace_backward: bool = False,
    with_entropy: bool = False,
    needed_for: str | None = None,
) -> tuple[Tensor, Tensor, TokenLayout]:
    """Log-probabilities and entropies [B, T] (empty unless asked for) of arguments it checks, and their layout."""
    check.logits(logits)
    check.flags(inplace_backward=inplace_backward, return_entropy=with_entropy)
    if inplace_backward:
        check.inplace_backward(logits)
    layout = token_layout("logits", logits, tuple(logits.shape[:-1]), labels, options, needed_for)
    logprobs, entropy, _row_max, _log_sum = token_logprob(
        rows(logits), layout.labels, options.ignore_index, options.temperature, options.logit_scale, options.softcap,
        with_entropy, inplace_backward, options.implementation,
    )  # fmt: skip
    return logprobs, entropy, layout


def layout_scores(logprobs: Tensor, layout: TokenLayout, options: TokenOptions) -> tuple[Tensor, Tensor]:
    """Scores [S] of log-probabilities [B, T], and counts of response tokens."""
    return sequence_score(logprobs, layout.labels, layout.offsets, options.ignore_index, options.implementation)


def token_counts(layout: TokenLayout, options: TokenOptions) -> Tensor:
    """[S] int32 response tokens."""
    nothing = torch.zeros(layout.labels.shape, device=layout.labels.device)
    return layout_scores(nothing, layout, options)[1]
