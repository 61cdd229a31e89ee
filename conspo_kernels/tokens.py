"""From the doors' arguments to log-probabilities and scores: what the doors have in common."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from . import check
from .distributed.vocab import VocabParallel
from .layout import TokenLayout, rows
from .ops.linear_logprob import linear_logprob
from .ops.ranks import name_of, whole_scores
from .ops.sequence_score import sequence_offsets, sequence_score
from .ops.token_logprob import token_logprob


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
    vocab_parallel: VocabParallel | None = None
    context_group: ProcessGroup | None = None
    context_factor: float = 1.0  # of the gradient of scores whose tokens are spread over ranks

    @property
    def shard(self) -> tuple[int, str]:
        """Where this rank's part of the vocabulary begins, and the name of the group, "" for none."""
        return (
            (0, "") if self.vocab_parallel is None else (self.vocab_parallel.start, name_of(self.vocab_parallel.group))
        )


class LinearHead(NamedTuple):
    """Hidden states [N, H] and the head's weight [V, H] and bias, in the dtype that they are multiplied in."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    workspace: int
    weight_grad: Tensor | None
    batch_invariant: bool
    synchronize: bool

    @classmethod
    def of(
        cls,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        workspace_mib: float,
        weight_grad: Tensor | None = None,
        batch_invariant: bool = False,
        synchronize: bool = False,
    ) -> LinearHead:
        device = hidden.device.type
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)

            def cast(x: Tensor) -> Tensor:
                return x if x.dtype == torch.float64 else x.to(dtype)

            hidden, weight, bias = cast(hidden), cast(weight), None if bias is None else cast(bias)
        rows, workspace = hidden.reshape(-1, hidden.shape[-1]), int(workspace_mib * 2**20)
        return cls(rows, weight, bias, workspace, weight_grad, batch_invariant, synchronize)

    @property
    def needs(self) -> list[bool]:
        """Whether hidden, weight and bias want a gradient."""
        wanted = torch.is_grad_enabled()
        return [wanted and x is not None and x.requires_grad for x in (self.hidden, self.weight, self.bias)]

    def mode(self, with_entropy: bool, sharded: bool = False) -> str:
        """The mode of `ops/linear_logprob.py` with the fewest GEMMs; in "frozen" a rank would need the others' sums."""
        needs = self.needs
        if not any(needs):
            return "none"
        if not any(needs[1:]) and not with_entropy and not sharded:
            return "frozen"
        if self.weight_grad is not None or self.batch_invariant:
            return "recompute"
        size = self.hidden.shape[0] * self.weight.shape[0] * self.hidden.element_size()
        return "store" if size <= self.workspace else "recompute"

    def kept(self, labels: Tensor, options: TokenOptions, known: Tensor | None) -> Tensor | None:
        """[B * T] bool on the CPU, the tokens to compute: those with a label, or what is known without waiting."""
        return (labels.flatten() != options.ignore_index).cpu() if self.synchronize else known

    def logprobs(
        self, labels: Tensor, options: TokenOptions, with_entropy: bool = False, keep: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Log-probabilities and entropies (empty unless asked for), shaped like labels [B, T]."""
        keep = self.kept(labels, options, keep)
        logprobs, entropy, *_ = linear_logprob(
            self.hidden, self.weight, self.bias, labels.flatten(), keep, self.weight_grad, options.ignore_index,
            options.temperature, options.logit_scale, options.softcap, with_entropy,
            self.mode(with_entropy, options.vocab_parallel is not None), self.workspace, options.implementation,
            *options.shard, self.batch_invariant,
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
    check.sharding(options.vocab_parallel, options.context_group, options.shift)
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
    logits, options = local_logits(logits, options)
    layout = token_layout("logits", logits, tuple(logits.shape[:-1]), labels, options, needed_for)
    logprobs, entropy, _row_max, _log_sum = token_logprob(
        rows(logits), layout.labels, options.ignore_index, options.temperature, options.logit_scale, options.softcap,
        with_entropy, inplace_backward, options.implementation, *options.shard,
    )  # fmt: skip
    return logprobs, entropy, layout


def local_logits(logits: Tensor, options: TokenOptions) -> tuple[Tensor, TokenOptions]:
    """A DTensor that is sharded over the vocabulary says itself what `vocab_parallel` would."""
    if not hasattr(logits, "placements"):
        return logits, options
    if options.vocab_parallel is not None:
        raise ValueError("vocab_parallel is for local logits: a DTensor says where its part of the vocabulary begins")
    local, shard = VocabParallel.of(logits, -1)
    return local, options._replace(vocab_parallel=shard)


def layout_scores(logprobs: Tensor, layout: TokenLayout, options: TokenOptions) -> tuple[Tensor, Tensor]:
    """Scores [S] of log-probabilities [B, T], and counts of response tokens."""
    split = options.context_group is not None
    summed = logprobs.double() if split else logprobs  # a rank's part of a mean is not rounded before the whole is
    scores, counts = sequence_score(summed, layout.labels, layout.offsets, options.ignore_index, options.implementation)
    if not split:
        return scores, counts
    scores, counts = whole_scores(scores, counts, name_of(options.context_group), options.context_factor)
    return scores.to(logprobs.dtype), counts


def token_counts(layout: TokenLayout, options: TokenOptions) -> Tensor:
    """[S] int32 response tokens."""
    nothing = torch.zeros(layout.labels.shape, device=layout.labels.device)
    return layout_scores(nothing, layout, options)[1]
