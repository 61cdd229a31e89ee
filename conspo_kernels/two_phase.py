"""A group split over micro-batches: scores of all rollouts, weights once, then one micro-batch after another.

    scores  = conspo_scores(...)                                     phase 1, no graph, at the current parameters
    weights = conspo_weights(scores, rewards, groups, ...).weights   dloss/dscores, once for the whole step
    weighted_score_loss(..., weights[part]).backward()               phase 2, for each micro-batch

The loss depends on the parameters through the scores alone, so sum_i w_i s_i with w = dloss/ds has its gradient.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor
from typing_extensions import Unpack

from .conspo import ConSPOOutput, loss_of_scores, metrics_of, rollout_scores
from .inputs import check
from .inputs.rollouts import rollouts_of
from .inputs.sources import hidden_source, logits_source, scores_source
from .inputs.tokens import tokens_of
from .inputs.weights import weights_of
from .options import LinearWeightedOptions, WeightedOptions
from .parallel import Parallel
from .sources import Source
from .values import Tokens
from .weighted import weighted_scores


@torch.no_grad()
def conspo_scores(
    logits: Tensor,
    labels: Tensor,
    *,
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
    """Scores of rollouts without a graph: phase 1 of a group that is split over micro-batches.

        s[i] = (1 / n_i) * sum_t logp[i, t].

    Args:
        All: as `conspo_loss`.

    Returns:
        [S] fp32 (fp64 for fp64 logits), NaN for a rollout without response tokens. No gradient flows through them; for
        scores with one, call `sequence_scores(token_logprobs(...), ...)`.

    Raises:
        TypeError, ValueError: as `token_logprobs`.

    Cost: one read of the logits; O(N) memory.

    Source: arXiv:2605.12969.
    """
    source = logits_source(logits, temperature, logit_scale, softcap, parallel, implementation)
    tokens = tokens_of(source, labels, response_mask, cu_seqlens, shift, ignore_index, "scores")
    return _scores(source, tokens)


@torch.no_grad()
def linear_conspo_scores(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    workspace_mib: float | None = None,
    logits_dtype: torch.dtype | None = None,
    batch_invariant: bool = False,
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
    """`conspo_scores` of logits = hidden @ weight.T + bias, which are never whole in memory: one GEMM.

    Args, Returns, Raises: as `linear_token_logprobs` and `conspo_scores`.

    Cost: one GEMM, and one read of the tiles of logits.

    Source: arXiv:2605.12969.
    """
    source = hidden_source(
        hidden, weight, bias, temperature, logit_scale, softcap, parallel, implementation,
        workspace_mib=workspace_mib, logits_dtype=logits_dtype, batch_invariant=batch_invariant,
        synchronize=synchronize,
    )  # fmt: skip
    tokens = tokens_of(source, labels, response_mask, cu_seqlens, shift, ignore_index, "scores")
    return _scores(source, tokens)


def _scores(source: Source, tokens: Tokens) -> Tensor:
    logprobs, _entropy = source.logprobs(tokens)
    return rollout_scores(logprobs, tokens, source.parallel, source.implementation)[0]


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
    tau: float = 10.0,
    margin: float | Tensor = 0.0,
    reward_threshold: float = 0.5,
    reduction: str = "mean",
    num_groups: float | Tensor | None = None,
    parallel: Parallel | None = None,
    implementation: str = "auto",
    return_metrics: bool = False,
) -> ConSPOWeights:
    """The gradient of the loss by the scores of all rollouts of a step: between the two phases.

    Args:
        All: as `conspo_loss_from_scores`, for all rollouts of the step. With reduction "none" each weight is the
            derivative of its own group's loss. With `parallel.data` each rank passes its own rollouts of the step.

    Returns:
        A `ConSPOWeights`. The weights [S] are of this rank's rollouts. They sum to zero over a whole group, on all
        ranks, and are zero for rollouts that take no part. With `parallel.data` and `grad_reduction` "mean" they are
        multiplied by the number of ranks.

    Raises:
        TypeError, ValueError: as `conspo_loss_from_scores`.

    Cost: O(S), one launch.

    Source: arXiv:2605.12969, v3.
    """
    check.flags(return_metrics=return_metrics)
    source = scores_source(scores, parallel, implementation)
    rollouts, objective = rollouts_of(
        source, source.shape[0], rewards, groups, tau, margin, reward_threshold, reduction, num_groups
    )
    result = loss_of_scores(source.values, None, rollouts, objective, source.parallel, implementation)
    weights = result.weights
    if result.local_indices is not None:
        weights = weights[result.local_indices] * source.parallel.data_factor
    return ConSPOWeights(weights, result.loss, metrics_of(result, objective) if return_metrics else {})


@overload
def weighted_score_loss(
    logits: Tensor,
    labels: Tensor,
    weights: Tensor,
    *,
    return_metrics: Literal[False] = False,
    **options: Unpack[WeightedOptions],
) -> Tensor: ...
@overload
def weighted_score_loss(
    logits: Tensor,
    labels: Tensor,
    weights: Tensor,
    *,
    return_metrics: Literal[True],
    **options: Unpack[WeightedOptions],
) -> ConSPOOutput: ...
@overload
def weighted_score_loss(
    logits: Tensor, labels: Tensor, weights: Tensor, *, return_metrics: bool, **options: Unpack[WeightedOptions]
) -> Tensor | ConSPOOutput: ...
def weighted_score_loss(
    logits: Tensor,
    labels: Tensor,
    weights: Tensor,
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
    scores: Tensor | None = None,
    implementation: str = "auto",
    return_metrics: bool = False,
) -> Tensor | ConSPOOutput:
    """sum_i weights[i] * s_i over the rollouts of a micro-batch: phase 2, with the gradient of `conspo_loss`.

    Args:
        weights: [S] floating point, of these rollouts, from `conspo_weights`. May lie on the CPU.
        inplace: the gradient overwrites the logits, in this call: no [.., V] buffer is allocated. Every
            misuse of `inplace_backward` of `conspo_loss` is a misuse of it too, and raises.
        scores: [S] floating point, of these rollouts, from phase 1; or None. The scores of this pass should equal them:
            the metric `conspo/score_drift` is the largest difference among rollouts with a weight. Above 0.01 nats per
            token (dropout left on, another temperature, stale parameters) a CPU warns. On a GPU a warning would wait,
            so only the metric shows it. May lie on the CPU.
        return_metrics: return a `ConSPOOutput`; the metrics are `conspo/response_tokens` and, where `scores` are given,
            `conspo/score_drift`.
        Others: as `conspo_loss`.

    Returns:
        0-d, fp32 (fp64 for fp64 logits). This call has computed the gradient: backward multiplies it by the scalar that
        comes in, which costs nothing where that is 1. A second backward raises. The gradient is rounded before that: in
        fp16 multiply `weights` by the loss scale, not the loss.

    Raises:
        TypeError, ValueError: as `conspo_loss`.

    Cost: one read and one write of the logits where the caches hold a row. Rollouts of weight zero are zero-filled, and
        read only where `scores` or metrics are asked for. With `parallel.vocab` the gradient is left to backward: one
        read more.

    Source: arXiv:2605.12969.
    """
    check.flags(return_metrics=return_metrics)
    source = logits_source(logits, temperature, logit_scale, softcap, parallel, implementation, inplace)
    tokens = tokens_of(source, labels, response_mask, cu_seqlens, shift, ignore_index, "the loss")
    weights, scores, tokens = weights_of(source, tokens, weights, scores)
    return weighted_scores(source, tokens, weights, scores, return_metrics)


@overload
def linear_weighted_score_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    weights: Tensor,
    *,
    return_metrics: Literal[False] = False,
    **options: Unpack[LinearWeightedOptions],
) -> Tensor: ...
@overload
def linear_weighted_score_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    weights: Tensor,
    *,
    return_metrics: Literal[True],
    **options: Unpack[LinearWeightedOptions],
) -> ConSPOOutput: ...
@overload
def linear_weighted_score_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    weights: Tensor,
    *,
    return_metrics: bool,
    **options: Unpack[LinearWeightedOptions],
) -> Tensor | ConSPOOutput: ...
def linear_weighted_score_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    weights: Tensor,
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
    scores: Tensor | None = None,
    implementation: str = "auto",
    return_metrics: bool = False,
) -> Tensor | ConSPOOutput:
    """`weighted_score_loss` of logits = hidden @ weight.T + bias, which are never whole in memory: three GEMMs.

    Args:
        hidden, weight, bias, workspace_mib, logits_dtype, synchronize: as `linear_token_logprobs`.
        weight_grad: as `linear_token_logprobs`. This call computes the gradient of weight in fp32, a second [V, H]
            beside the buffer; backward multiplies it by the scalar that comes in, and adds it.
        Others: as `weighted_score_loss`.

    Returns, Raises: as `weighted_score_loss`.

    Cost: a GEMM for the logits, and one for each of the gradients of hidden and weight that are needed, in this call.
        Rollouts of weight zero cost nothing on a CPU, and on a GPU where weights and cu_seqlens lie on the CPU.
        With `parallel.vocab` as `linear_token_logprobs`: three or four GEMMs.

    Source: arXiv:2605.12969.
    """
    check.flags(return_metrics=return_metrics)
    source = hidden_source(
        hidden, weight, bias, temperature, logit_scale, softcap, parallel, implementation,
        workspace_mib=workspace_mib, logits_dtype=logits_dtype, weight_grad=weight_grad, synchronize=synchronize,
    )  # fmt: skip
    tokens = tokens_of(source, labels, response_mask, cu_seqlens, shift, ignore_index, "the loss")
    weights, scores, tokens = weights_of(source, tokens, weights, scores)
    return weighted_scores(source, tokens, weights, scores, return_metrics)
