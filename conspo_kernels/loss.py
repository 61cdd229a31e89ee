"""The ConSPO loss, from logits and from scores."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from . import check
from .contrast import Contrast
from .distributed.vocab import VocabParallel
from .layout import over_tokens
from .ops.ranks import gradient_factor, name_of, sum_over_ranks
from .tokens import LinearHead, TokenOptions, label_logprobs, layout_scores, token_counts, token_layout


class ConSPOOutput(NamedTuple):
    """What `return_metrics=True` returns; all but the loss detached.

    loss: as without metrics.  metrics: 0-d tensors named `conspo/...`.  scores: [S].  logprobs: shaped like labels, or
    None where the loss was computed from scores.
    """

    loss: Tensor
    metrics: dict[str, Tensor]
    scores: Tensor
    logprobs: Tensor | None


def conspo_loss(
    logits: Tensor,
    labels: Tensor,
    rewards: Tensor,
    groups: int | Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    mask: Tensor | None = None,
    shift: bool = False,
    tau: float = 1.0,
    margin: float | Tensor = 0.0,
    reward_threshold: float = 0.5,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    num_groups: float | Tensor | None = None,
    process_group: ProcessGroup | None = None,
    context_group: ProcessGroup | None = None,
    vocab_parallel: VocabParallel | None = None,
    grad_reduction: str = "mean",
    inplace_backward: bool = False,
    implementation: str = "auto",
    return_metrics: bool = False,
) -> Tensor | ConSPOOutput:
    """ConSPO loss of groups of rollouts, from their logits.

    Each rollout's score s_i is the mean log-probability of its n_i response tokens. Per group with positives P (reward
    > reward_threshold) and negatives N,

    loss_g = -(1/|P|) sum_{i in P} tau log( exp((s_i - m)/tau) / (exp((s_i - m)/tau) + sum_{j in N} exp(s_j/tau)) ).

    Args:
        logits: [B, T, V] padded (a row is a rollout, S = B), or packed [N, V] or [1, N, V] with `cu_seqlens`; fp16,
            bf16, fp32 or fp64; last stride 1, the others free: a view such as `logits[:, :-1]` is read in place.
        labels: [B, T], [N] or [1, N] integers, aligned with the logits that predict them; `ignore_index`: not a
            response token.
        rewards: [S] float, int or bool; NaN = unscorable. May lie on the CPU.
        groups: an int G, the size of a group (each G consecutive rollouts share a prompt), or [S] integer prompt ids in
            any order, groups of any sizes. May lie on the CPU.
        cu_seqlens: [S + 1] int32 or int64, flash-attn's convention; rows past the last offset are ignored and get zero
            gradient. May lie on the CPU, where its values are checked. Without it [1, N, V] is one rollout.
        mask: shaped like labels, any real dtype, zero = not a response token; with `shift` it belongs to the input ids
            and moves with them. Labels under it are never looked at.
        shift: labels are the input ids: position t predicts label t + 1 within its own sequence. Better than slicing
            the logits, whose backward allocates a full buffer.
        tau: temperature of the contrast, > 0, in units of the scores (nats per token).
        margin: m, a float or 0-d tensor, in units of the scores; see `CosineMargin`.
        reward_threshold: a rollout is positive where its reward is greater.
        temperature: T > 0 that the rollouts were sampled at.
        logit_scale: factor > 0 before the softcap.
        softcap: bound of the capped logits, > 0, or None.
        ignore_index: the label that means "not a response token"; it wins over an entry of the vocabulary.
        reduction: "mean" over the valid groups, "sum", or "none": [S / G] for an int G, [S] for ids with a group's loss
            at its first rollout and 0 elsewhere (with `process_group` of the rollouts of all ranks).
        num_groups: float, int or 0-d tensor > 0 that replaces the denominator of "mean" (gradient accumulation).
        process_group: the ranks over which the rollouts of groups are spread: scores, rewards and ids are gathered, S
            numbers each, and the loss and the metrics are of all of them, the same on every rank. Ids are global; an
            int G counts over the rollouts of all ranks in rank order; a rank may have any number of them, or none.
            The host waits for these numbers.
        context_group: the ranks over which the tokens of each rollout are spread; see `sequence_scores`.
        vocab_parallel: the logits are this rank's part of the vocabulary; see `token_logprobs`.
        grad_reduction: what the trainer does with gradients across `process_group` and `context_group`: "mean" (DDP,
            FSDP: they are multiplied by the number of ranks) or "sum".
        inplace_backward: backward writes the gradient over the storage of `logits`; see `token_logprobs`.
        implementation: "auto", "triton", "native" or "torch". An explicit name runs or raises.
        return_metrics: return a `ConSPOOutput` with metrics, scores and log-probabilities.

    Returns:
        The loss, fp32 (fp64 for fp64 logits), 0-d unless reduction is "none". A rollout without response tokens or with
        a NaN reward takes no part; a group without a positive or without a negative is not valid and takes none either.
        Without a valid group the loss is an exact zero that still has a graph. NaN logits of a rollout in a valid group
        give a NaN loss.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind; the message says which, what was expected and what
            came.

    Cost: forward reads the logits once and allocates O(N); backward reads and writes them once. Tokens without gradient
        (ignored, or in a group that is not valid) are not read in backward. No synchronisation but that of
        `process_group`.

    Source: arXiv:2605.12969, v3.
    """
    contrast = Contrast(
        tau, margin, reward_threshold, reduction, num_groups, implementation, process_group, grad_reduction
    )
    contrast.check(return_metrics)
    check.ranks(grad_reduction, context_group=context_group)
    options = TokenOptions(
        mask, cu_seqlens, shift, ignore_index, implementation, temperature, logit_scale, softcap, vocab_parallel,
        context_group, gradient_factor(context_group, grad_reduction),
    )  # fmt: skip
    logprobs, _entropy, layout = label_logprobs(
        logits, labels, options, inplace_backward=inplace_backward, needed_for="the loss"
    )
    scores, counts = layout_scores(logprobs, layout, options)
    found = contrast.of(scores, rewards, groups, counts, return_metrics)
    if found.metrics is None:
        return found.loss
    return ConSPOOutput(found.loss, found.metrics, scores.detach(), logprobs.detach().view(labels.shape))


def linear_conspo_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    rewards: Tensor,
    groups: int | Tensor,
    *,
    bias: Tensor | None = None,
    workspace_mib: float = 512,
    weight_grad: Tensor | None = None,
    batch_invariant: bool = False,
    synchronize: bool = False,
    cu_seqlens: Tensor | None = None,
    mask: Tensor | None = None,
    shift: bool = False,
    tau: float = 1.0,
    margin: float | Tensor = 0.0,
    reward_threshold: float = 0.5,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    num_groups: float | Tensor | None = None,
    process_group: ProcessGroup | None = None,
    context_group: ProcessGroup | None = None,
    vocab_parallel: VocabParallel | None = None,
    grad_reduction: str = "mean",
    implementation: str = "auto",
    return_metrics: bool = False,
) -> Tensor | ConSPOOutput:
    """`conspo_loss` of logits = hidden @ weight.T + bias, which are never whole in memory.

    Args:
        hidden, weight, bias, workspace_mib, weight_grad, batch_invariant, synchronize: as `linear_token_logprobs`.
        Others: as `conspo_loss`.

    Returns:
        As `conspo_loss`. Rollouts that cannot have a gradient (of groups that are not valid, or with a NaN reward) are
        not computed where that is known without a synchronisation: their scores are NaN, their log-probabilities 0,
        and the metrics count them as `conspo/uncomputed_rollouts`.

    Raises:
        TypeError, ValueError: as `conspo_loss` and `linear_token_logprobs`.

    Cost: as `linear_token_logprobs`. Rollouts that are not computed cost nothing: on a CPU, and on a GPU where rewards,
        ids and cu_seqlens lie on the CPU.

    Source: arXiv:2605.12969, v3; DESIGN section 5.
    """
    contrast = Contrast(
        tau, margin, reward_threshold, reduction, num_groups, implementation, process_group, grad_reduction
    )
    contrast.check(return_metrics)
    check.ranks(grad_reduction, context_group=context_group)
    options = TokenOptions(
        mask, cu_seqlens, shift, ignore_index, implementation, temperature, logit_scale, softcap, vocab_parallel,
        context_group, gradient_factor(context_group, grad_reduction),
    )  # fmt: skip
    check.linear(hidden, weight, bias, workspace_mib, weight_grad)
    check.flags(batch_invariant=batch_invariant, synchronize=synchronize)
    layout = token_layout("hidden", hidden, tuple(hidden.shape[:-1]), labels, options, "the loss")
    counts = token_counts(layout, options)
    if synchronize:
        check.rewards(rewards, counts.shape[0])
        rewards, groups = rewards.cpu(), groups.cpu() if isinstance(groups, Tensor) else groups
    live, keep = contrast.live_rollouts(rewards, groups, counts), None
    computed = layout
    if live is not None:
        here = live.to(labels.device, non_blocking=True)
        computed = layout.only(over_tokens(here, layout.labels.shape, layout.offsets), ignore_index)
        if cu_seqlens is None or cu_seqlens.device.type == "cpu":
            keep = over_tokens(live, layout.labels.shape, None if cu_seqlens is None else cu_seqlens.long()).flatten()
    head = LinearHead.of(hidden, weight, bias, workspace_mib, weight_grad, batch_invariant, synchronize)
    logprobs, _entropy = head.logprobs(computed.labels, options, keep=keep)
    scores, _counts = layout_scores(logprobs, computed, options)
    found = contrast.of(scores, rewards, groups, counts, return_metrics)
    if found.metrics is None:
        return found.loss
    missing = torch.zeros_like(counts[:0].sum()) if live is None else ((counts > 0) & ~here).sum()
    if process_group is not None:
        missing = sum_over_ranks(missing, name_of(process_group))
    metrics = {**found.metrics, "conspo/uncomputed_rollouts": missing.to(scores.dtype)}
    return ConSPOOutput(found.loss, metrics, scores.detach(), logprobs.detach().view(labels.shape))


def conspo_loss_from_scores(
    scores: Tensor,
    rewards: Tensor,
    groups: int | Tensor,
    *,
    tau: float = 1.0,
    margin: float | Tensor = 0.0,
    reward_threshold: float = 0.5,
    reduction: str = "mean",
    num_groups: float | Tensor | None = None,
    process_group: ProcessGroup | None = None,
    grad_reduction: str = "mean",
    implementation: str = "auto",
    return_metrics: bool = False,
) -> Tensor | ConSPOOutput:
    """ConSPO loss of groups of rollouts, from their scores: the equation of `conspo_loss`.

    Args:
        scores: [S] floating point, length-normalised log-probabilities; NaN marks a rollout without response tokens (as
            `sequence_scores` returns it), which takes no part.
        Others: as `conspo_loss`.

    Returns:
        As `conspo_loss`; the output's `logprobs` is None, its metrics have no `conspo/response_tokens`.

    Raises:
        TypeError, ValueError: as `conspo_loss`.

    Cost: O(S), one launch.

    Source: arXiv:2605.12969, v3.
    """
    contrast = Contrast(
        tau, margin, reward_threshold, reduction, num_groups, implementation, process_group, grad_reduction
    )
    contrast.check(return_metrics)
    check.scores(scores)
    scores = scores.to(torch.float64 if scores.dtype == torch.float64 else torch.float32)
    found = contrast.of(scores, rewards, groups, None, return_metrics)
    return found.loss if found.metrics is None else ConSPOOutput(found.loss, found.metrics, scores.detach(), None)
