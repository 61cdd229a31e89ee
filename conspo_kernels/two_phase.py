"""A group split over micro-batches: scores of all rollouts, weights once, then one micro-batch after another.

    scores  = conspo_scores(...)                                     phase 1, no graph, at the current parameters
    weights = conspo_weights(scores, rewards, groups, ...).weights   dloss/dscores, once for the whole step
    weighted_score_loss(..., weights[part]).backward()               phase 2, for each micro-batch

The loss depends on the parameters through the scores alone, so sum_i w_i s_i with w = dloss/ds has its gradient.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from . import check
from .contrast import Contrast
from .distributed.vocab import VocabParallel
from .layout import over_tokens, rows
from .loss import ConSPOOutput
from .ops.known_gradient import attach_gradient, linear_logprob_known, token_logprob_known, token_logprob_known_
from .ops.ranks import gradient_factor
from .tokens import LinearHead, TokenOptions, label_logprobs, layout_scores, local_logits, token_layout
from .weighted import WeightedScores


@torch.no_grad()
def conspo_scores(
    logits: Tensor,
    labels: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    mask: Tensor | None = None,
    shift: bool = False,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    context_group: ProcessGroup | None = None,
    vocab_parallel: VocabParallel | None = None,
    implementation: str = "auto",
) -> Tensor:
    """Scores of rollouts without a graph: phase 1 of a group that is split over micro-batches.

    s[i] = (1 / n_i) * sum_t logp[i, t].

    Args:
        As `conspo_loss`.

    Returns:
        [S] fp32 (fp64 for fp64 logits), NaN for a rollout without response tokens. No gradient flows through them; for
        scores with one, call `sequence_scores(token_logprobs(...), ...)`.

    Raises:
        TypeError, ValueError: as `token_logprobs`.

    Cost: one read of the logits; O(N) memory.

    Source: arXiv:2605.12969.
    """
    options = TokenOptions(
        mask, cu_seqlens, shift, ignore_index, implementation, temperature, logit_scale, softcap, vocab_parallel,
        context_group,
    )  # fmt: skip
    logprobs, _entropy, layout = label_logprobs(logits, labels, options, needed_for="scores")
    return layout_scores(logprobs, layout, options)[0]


@torch.no_grad()
def linear_conspo_scores(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    workspace_mib: float = 512,
    batch_invariant: bool = False,
    synchronize: bool = False,
    cu_seqlens: Tensor | None = None,
    mask: Tensor | None = None,
    shift: bool = False,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    context_group: ProcessGroup | None = None,
    vocab_parallel: VocabParallel | None = None,
    implementation: str = "auto",
) -> Tensor:
    """`conspo_scores` of logits = hidden @ weight.T + bias, which are never whole in memory: one GEMM.

    Args, Returns, Raises: as `linear_token_logprobs` and `conspo_scores`.
    """
    options = TokenOptions(
        mask, cu_seqlens, shift, ignore_index, implementation, temperature, logit_scale, softcap, vocab_parallel,
        context_group,
    )  # fmt: skip
    check.linear(hidden, weight, bias, workspace_mib)
    check.flags(batch_invariant=batch_invariant, synchronize=synchronize)
    layout = token_layout("hidden", hidden, tuple(hidden.shape[:-1]), labels, options, "scores")
    head = LinearHead.of(hidden, weight, bias, workspace_mib, batch_invariant=batch_invariant, synchronize=synchronize)
    logprobs, _entropy = head.logprobs(layout.labels, options)
    return layout_scores(logprobs, layout, options)[0]


class ConSPOWeights(NamedTuple):
    """weights: [S] dloss/dscores.  loss: as `conspo_loss_from_scores`.  metrics: {} unless asked for. No graph."""

    weights: Tensor
    loss: Tensor
    metrics: dict[str, Tensor]


@torch.no_grad()
def conspo_weights(
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
) -> ConSPOWeights:
    """The gradient of the loss by the scores of all rollouts of a step: between the two phases.

    Args:
        As `conspo_loss_from_scores`, of the whole step; with reduction "none" each weight is of its own group's loss.
        With `process_group` each rank gives its own rollouts of the step, in as many micro-batches as it likes.

    Returns:
        Weights [S] of this rank's rollouts, which sum to zero over a whole group (of all ranks) and are zero for what
        takes no part, with `grad_reduction` "mean" times the number of ranks; the loss; metrics.

    Raises:
        TypeError, ValueError: as `conspo_loss_from_scores`.

    Cost: O(S), one launch.

    Source: arXiv:2605.12969, v3.
    """
    contrast = Contrast(
        tau, margin, reward_threshold, reduction, num_groups, implementation, process_group, grad_reduction
    )
    contrast.check(return_metrics)
    check.scores(scores)
    scores = scores.detach().to(torch.float64 if scores.dtype == torch.float64 else torch.float32)
    found = contrast.of(scores, rewards, groups, None, return_metrics)
    weights = found.weights if found.places is None else found.weights[found.places] * contrast.factor
    return ConSPOWeights(weights, found.loss, found.metrics or {})


def weighted_score_loss(
    logits: Tensor,
    labels: Tensor,
    weights: Tensor,
    *,
    inplace: bool = False,
    cu_seqlens: Tensor | None = None,
    mask: Tensor | None = None,
    shift: bool = False,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    context_group: ProcessGroup | None = None,
    vocab_parallel: VocabParallel | None = None,
    grad_reduction: str = "mean",
    scores: Tensor | None = None,
    implementation: str = "auto",
    return_metrics: bool = False,
) -> Tensor | ConSPOOutput:
    """sum_i weights[i] * s_i over the rollouts of a micro-batch: phase 2, with the gradient of `conspo_loss`.

    Args:
        weights: [S] floating point, of these rollouts, from `conspo_weights`. May lie on the CPU.
        inplace: the gradient overwrites the logits, in this call: no [.., V] buffer is allocated. As `inplace_backward`
            of `conspo_loss`, whose every misuse raises here too.
        grad_reduction: what the trainer does with gradients across `context_group`, as in `conspo_loss`.
        scores: [S] of these rollouts from phase 1. They should be what they are now: the metric `conspo/score_drift` is
            the largest difference among rollouts with a weight, and above 0.01 nats per token (dropout left on, another
            temperature, stale parameters) warns, on a CPU; on a GPU the metric alone tells, as nobody waits for it.
        return_metrics: return a `ConSPOOutput`; the metrics are `conspo/response_tokens` and `conspo/score_drift`.
        Others: as `conspo_loss`.

    Returns:
        0-d, fp32 (fp64 for fp64 logits). The gradient is there already: backward multiplies it by the scalar that comes
        in, which costs nothing where that is 1; a second one raises. It is rounded before that: in fp16 a loss scale
        belongs into `weights`.

    Raises:
        TypeError, ValueError: as `conspo_loss`.

    Cost: one read and one write of the logits where the caches hold a row; rollouts of weight zero are not written to
        (in a new buffer: zero-filled). With `vocab_parallel` the gradient is left to backward: one read more.

    """
    check.ranks(grad_reduction, context_group=context_group)
    options = TokenOptions(
        mask, cu_seqlens, shift, ignore_index, implementation, temperature, logit_scale, softcap, vocab_parallel,
        context_group, gradient_factor(context_group, grad_reduction),
    )  # fmt: skip
    check.logits(logits)
    check.flags(inplace=inplace, return_metrics=return_metrics)
    if inplace:
        check.inplace_backward(logits, "inplace")
    _local, placed = local_logits(logits, options)
    layout = token_layout("logits", logits, tuple(logits.shape[:-1]), labels, options, "the loss")
    weighted = WeightedScores.of(weights, scores, layout, options, logits.dtype)
    wanted = torch.is_grad_enabled() and logits.requires_grad
    if not wanted or placed.vocab_parallel is not None:  # a gradient needs the statistics of all ranks first
        logprobs, _entropy, _layout = label_logprobs(logits, labels, options, inplace_backward=inplace and wanted)
        value, metrics, found = weighted.sum(logprobs)
    else:
        z = rows(logits).detach()
        arguments = (z, layout.labels, weighted.coefficients(), ignore_index, temperature, logit_scale, softcap)
        if inplace:
            logprobs, gradient = token_logprob_known_(*arguments, implementation), z
        else:
            logprobs, gradient = token_logprob_known(*arguments, implementation)
        value, metrics, found = weighted.sum(logprobs)
        value = attach_gradient(value, logits, gradient.view(logits.shape))
    return ConSPOOutput(value, metrics, found, logprobs.detach().view(labels.shape)) if return_metrics else value


def linear_weighted_score_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    weights: Tensor,
    *,
    bias: Tensor | None = None,
    workspace_mib: float = 512,
    synchronize: bool = False,
    cu_seqlens: Tensor | None = None,
    mask: Tensor | None = None,
    shift: bool = False,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    context_group: ProcessGroup | None = None,
    vocab_parallel: VocabParallel | None = None,
    grad_reduction: str = "mean",
    scores: Tensor | None = None,
    implementation: str = "auto",
    return_metrics: bool = False,
) -> Tensor | ConSPOOutput:
    """`weighted_score_loss` of logits = hidden @ weight.T + bias, which are never whole in memory: three GEMMs.

    Args:
        hidden, weight, bias, workspace_mib, synchronize: as `linear_token_logprobs`.
        Others: as `weighted_score_loss`.

    Returns, Raises: as `weighted_score_loss`.

    Cost: a GEMM for the logits, and one for each of the gradients of hidden and weight that are needed, in this call.
        Rollouts of weight zero cost nothing on a CPU, and on a GPU where weights and cu_seqlens lie on the CPU.
        With `vocab_parallel` as `linear_token_logprobs`: three or four GEMMs.
    """
    check.ranks(grad_reduction, context_group=context_group)
    options = TokenOptions(
        mask, cu_seqlens, shift, ignore_index, implementation, temperature, logit_scale, softcap, vocab_parallel,
        context_group, gradient_factor(context_group, grad_reduction),
    )  # fmt: skip
    check.flags(return_metrics=return_metrics, synchronize=synchronize)
    check.linear(hidden, weight, bias, workspace_mib)
    layout = token_layout("hidden", hidden, tuple(hidden.shape[:-1]), labels, options, "the loss")
    weighted = WeightedScores.of(weights, scores, layout, options, hidden.dtype)
    coefficients, keep = weighted.coefficients(), None
    if weights.device.type == "cpu" and (cu_seqlens is None or cu_seqlens.device.type == "cpu"):
        offsets = None if cu_seqlens is None else cu_seqlens.long()
        keep = over_tokens(weights != 0, layout.labels.shape, offsets).flatten()
    layout = layout.only(coefficients != 0, ignore_index)
    head = LinearHead.of(hidden, weight, bias, workspace_mib, synchronize=synchronize)
    if not any(head.needs) or vocab_parallel is not None:
        logprobs, _entropy = head.logprobs(layout.labels, options, keep=keep)
        value, metrics, found = weighted.sum(logprobs)
    else:
        tensors = (head.hidden, head.weight, head.bias)
        keep = head.kept(layout.labels, options, keep)
        logprobs, *gradients = linear_logprob_known(
            *(None if x is None else x.detach() for x in tensors), layout.labels.flatten(), keep,
            coefficients.flatten(), head.needs, ignore_index, temperature, logit_scale, softcap, head.workspace,
            implementation,
        )  # fmt: skip
        logprobs = logprobs.view(layout.labels.shape)
        value, metrics, found = weighted.sum(logprobs)
        for x, gradient, needed in zip(tensors, gradients, head.needs, strict=True):
            if needed:
                value = attach_gradient(value, x, gradient)
    found = found.masked_fill(weighted.weights == 0, torch.nan)  # not computed
    return ConSPOOutput(value, metrics, found, logprobs.detach().view(labels.shape)) if return_metrics else value
