"""The ConSPO loss, from logits, from hidden states and from scores."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor
from typing_extensions import Unpack

from .conspo import ConSPOOutput, loss_of_scores, loss_of_tokens, metrics_of
from .inputs import check
from .inputs.rollouts import rollouts_of, tokens_with_gradient
from .inputs.sources import hidden_source, logits_source, scores_source
from .inputs.tokens import tokens_of
from .options import LinearLossOptions, LossOptions, ScoreOptions
from .parallel import Parallel


@overload
def conspo_loss(
    logits: Tensor,
    labels: Tensor,
    rewards: Tensor,
    groups: int | Tensor,
    *,
    return_metrics: Literal[False] = False,
    **options: Unpack[LossOptions],
) -> Tensor: ...
@overload
def conspo_loss(
    logits: Tensor,
    labels: Tensor,
    rewards: Tensor,
    groups: int | Tensor,
    *,
    return_metrics: Literal[True],
    **options: Unpack[LossOptions],
) -> ConSPOOutput: ...
@overload
def conspo_loss(
    logits: Tensor,
    labels: Tensor,
    rewards: Tensor,
    groups: int | Tensor,
    *,
    return_metrics: bool,
    **options: Unpack[LossOptions],
) -> Tensor | ConSPOOutput: ...
def conspo_loss(
    logits: Tensor,
    labels: Tensor,
    rewards: Tensor,
    groups: int | Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    response_mask: Tensor | None = None,
    shift: bool = False,
    tau: float = 10.0,
    margin: float | Tensor = 0.0,
    reward_threshold: float = 0.5,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    num_groups: float | Tensor | None = None,
    parallel: Parallel | None = None,
    inplace_backward: bool = False,
    implementation: str = "auto",
    return_metrics: bool = False,
) -> Tensor | ConSPOOutput:
    """ConSPO loss of groups of rollouts, from their logits.

    Each rollout's score s_i is the mean log-probability of its n_i response tokens. Per group with positives P (their
    reward exceeds reward_threshold), negatives N and e_i = exp((s_i - m)/tau),

        loss_g = -(1/|P|) sum_{i in P} tau log( e_i / (e_i + sum_{j in N} exp(s_j/tau)) ).

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
        response_mask: shaped like labels, any real dtype, zero = not a response token (prompts are zero: an attention
            mask would train on them); with `shift` it belongs to the input ids and moves with them. Labels under it are
            never looked at.
        shift: labels are the input ids: position t predicts label t + 1 within its own sequence. Better than slicing
            the logits, whose backward allocates a full buffer.
        tau: temperature of the contrast, > 0, in units of the scores (nats per token). The default is the paper's (its
            section 5.1): for scores that spread over less than a nat the softmax is then nearly flat.
        margin: m, a float or 0-d tensor, in units of the scores; the paper raises it by `CosineMargin`.
        reward_threshold: a rollout is positive where its reward is greater.
        temperature: T > 0 that the rollouts were sampled at.
        logit_scale: factor > 0 before the softcap.
        softcap: bound of the capped logits, > 0, or None.
        ignore_index: the label that means "not a response token"; it wins over an entry of the vocabulary.
        reduction: "mean" over the valid groups, "sum", or "none": [S / G] for an int G, [S] for ids with a group's loss
            at its first rollout and 0 elsewhere (with `parallel.data` of the rollouts of all ranks).
        num_groups: float, int or 0-d tensor > 0 that replaces the denominator of "mean" (gradient accumulation).
        parallel: what is split over ranks, a `Parallel`: `data` the rollouts of groups (the loss and the metrics are of
            all of them), `context` the tokens of a rollout, `vocab` the vocabulary.
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
        `parallel.data`.

    Source: arXiv:2605.12969, v3.
    """
    check.flags(return_metrics=return_metrics)
    source = logits_source(
        logits, temperature, logit_scale, softcap, parallel, implementation, inplace_backward, "inplace_backward"
    )
    tokens = tokens_of(source, labels, response_mask, cu_seqlens, shift, ignore_index, "the loss")
    rollouts, objective = rollouts_of(
        source, tokens.num_rollouts, rewards, groups, tau, margin, reward_threshold, reduction, num_groups
    )
    return loss_of_tokens(source, tokens, rollouts, objective, return_metrics)


@overload
def linear_conspo_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    rewards: Tensor,
    groups: int | Tensor,
    *,
    return_metrics: Literal[False] = False,
    **options: Unpack[LinearLossOptions],
) -> Tensor: ...
@overload
def linear_conspo_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    rewards: Tensor,
    groups: int | Tensor,
    *,
    return_metrics: Literal[True],
    **options: Unpack[LinearLossOptions],
) -> ConSPOOutput: ...
@overload
def linear_conspo_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    rewards: Tensor,
    groups: int | Tensor,
    *,
    return_metrics: bool,
    **options: Unpack[LinearLossOptions],
) -> Tensor | ConSPOOutput: ...
def linear_conspo_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    rewards: Tensor,
    groups: int | Tensor,
    *,
    bias: Tensor | None = None,
    workspace_mib: float | None = None,
    weight_grad: Tensor | None = None,
    logits_dtype: torch.dtype | None = None,
    batch_invariant: bool = False,
    synchronize: bool = False,
    cu_seqlens: Tensor | None = None,
    response_mask: Tensor | None = None,
    shift: bool = False,
    tau: float = 10.0,
    margin: float | Tensor = 0.0,
    reward_threshold: float = 0.5,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    num_groups: float | Tensor | None = None,
    parallel: Parallel | None = None,
    implementation: str = "auto",
    return_metrics: bool = False,
) -> Tensor | ConSPOOutput:
    """`conspo_loss` of logits = hidden @ weight.T + bias, which are never whole in memory.

    Args:
        hidden, weight, bias, workspace_mib, weight_grad, logits_dtype, batch_invariant, synchronize: as
            `linear_token_logprobs`.
        Others: as `conspo_loss`.

    Returns:
        As `conspo_loss`. Rollouts that cannot have a gradient (of groups that are not valid, or with a NaN reward) are
        not computed where that is known without a synchronisation: their scores are NaN, their log-probabilities 0,
        and the metrics count them as `conspo/uncomputed_rollouts`.

    Raises:
        TypeError, ValueError: as `conspo_loss` and `linear_token_logprobs`.

    Cost: as `linear_token_logprobs`. Rollouts that are not computed cost nothing: on a CPU, and on a GPU where rewards,
        ids and cu_seqlens lie on the CPU.

    Source: arXiv:2605.12969, v3.
    """
    check.flags(return_metrics=return_metrics)
    source = hidden_source(
        hidden, weight, bias, temperature, logit_scale, softcap, parallel, implementation,
        workspace_mib=workspace_mib, logits_dtype=logits_dtype, weight_grad=weight_grad,
        batch_invariant=batch_invariant, synchronize=synchronize,
    )  # fmt: skip
    tokens = tokens_of(source, labels, response_mask, cu_seqlens, shift, ignore_index, "the loss")
    rollouts, objective = rollouts_of(
        source, tokens.num_rollouts, rewards, groups, tau, margin, reward_threshold, reduction, num_groups
    )
    tokens = tokens_with_gradient(source, tokens, rollouts, objective, return_metrics)
    return loss_of_tokens(source, tokens, rollouts, objective, return_metrics)


@overload
def conspo_loss_from_scores(
    scores: Tensor,
    rewards: Tensor,
    groups: int | Tensor,
    *,
    return_metrics: Literal[False] = False,
    **options: Unpack[ScoreOptions],
) -> Tensor: ...
@overload
def conspo_loss_from_scores(
    scores: Tensor,
    rewards: Tensor,
    groups: int | Tensor,
    *,
    return_metrics: Literal[True],
    **options: Unpack[ScoreOptions],
) -> ConSPOOutput: ...
@overload
def conspo_loss_from_scores(
    scores: Tensor, rewards: Tensor, groups: int | Tensor, *, return_metrics: bool, **options: Unpack[ScoreOptions]
) -> Tensor | ConSPOOutput: ...
def conspo_loss_from_scores(
    scores: Tensor,
    rewards: Tensor,
    groups: int | Tensor,
    *,
    tau: float = 10.0,
    margin: float | Tensor = 0.0,
    reward_threshold: float = 0.5,
    reduction: str = "mean",
    num_groups: float | Tensor | None = None,
    parallel: Parallel | None = None,
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
    check.flags(return_metrics=return_metrics)
    source = scores_source(scores, parallel, implementation)
    rollouts, objective = rollouts_of(
        source, scores.shape[0], rewards, groups, tau, margin, reward_threshold, reduction, num_groups
    )
    result = loss_of_scores(source.values, None, rollouts, objective, source.parallel, implementation)
    if not return_metrics:
        return result.loss
    return ConSPOOutput(result.loss, metrics_of(result, objective), source.values.detach(), None)
