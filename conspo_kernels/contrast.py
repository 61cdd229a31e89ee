"""The objective with its settings, and the loss of a source: what the losses and `conspo_weights` share."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .inputs import check
from .inputs.groups import GroupLayout, live_rollouts
from .inputs.parallel import Parallel, parallel_from
from .inputs.tokens import TokenLayout
from .metrics import conspo_metrics
from .objective import GroupLoss, Role, Segments, equal_segments
from .ops import check_implementation
from .ops.devices import beside
from .ops.group_infonce import group_infonce
from .ops.ranks import gather_rollouts, name_of, sum_over_ranks
from .ops.sequence_infonce import sequence_infonce
from .scores import response_counts, rollout_scores
from .sources import Source
from .values import python_number


class ConSPOOutput(NamedTuple):
    """What `return_metrics=True` returns; all but the loss detached.

    loss: as without metrics.  metrics: 0-d tensors named `conspo/...`.  scores: [S].  logprobs: shaped like labels, or
    None where the loss was computed from scores.
    """

    loss: Tensor
    metrics: dict[str, Tensor]
    scores: Tensor
    logprobs: Tensor | None


class Contrasted(NamedTuple):
    """loss: 0-d, or as reduction "none" has it, with a graph.  weights: [S] dloss/dscores, over all ranks.

    metrics: if asked for.  local_indices: int64, which of these rollouts are this rank's; None: all.
    """

    loss: Tensor
    weights: Tensor
    metrics: dict[str, Tensor] | None
    local_indices: Tensor | None


class Contrast(NamedTuple):
    """The settings of the objective."""

    tau: float
    margin: float | Tensor
    reward_threshold: float
    reduction: str
    num_groups: float | Tensor | None
    parallel: Parallel
    implementation: str
    return_metrics: bool

    @classmethod
    def from_arguments(
        cls,
        tau: Any,
        margin: Any,
        reward_threshold: Any,
        reduction: Any,
        num_groups: Any,
        parallel: Any,
        implementation: Any,
        return_metrics: Any,
    ) -> Contrast:
        check.flags(return_metrics=return_metrics)
        check_implementation(implementation)
        tau, margin, reward_threshold, num_groups = map(python_number, (tau, margin, reward_threshold, num_groups))
        check.objective(tau, margin, reward_threshold, reduction, num_groups)
        return cls(
            tau, margin, reward_threshold, reduction, num_groups, parallel_from(parallel), implementation,
            return_metrics,
        )  # fmt: skip

    def evaluate(
        self, scores: Tensor, rewards: Tensor, groups: int | Tensor, counts: Tensor | None = None
    ) -> Contrasted:
        """The loss of scores [S].  counts: [S] response tokens, where they are known."""
        groups = python_number(groups)
        self._check(scores.shape[0], scores.device, rewards, groups)
        local_indices = None
        if self.parallel.data is not None:
            scores, rewards, groups, counts, local_indices = self._gathered(scores, rewards, groups, counts)
        layout = GroupLayout.from_arguments(groups, scores.shape[0])
        margin, denominator = self._constants(scores)
        loss, weights, roles = group_infonce(
            scores, rewards.detach().resolve_neg(), counts, layout.order, layout.offsets, layout.slots, layout.size,
            margin, denominator, self.tau, self.reward_threshold, self.reduction, self.implementation,
        )  # fmt: skip
        return self._contrasted(GroupLoss(loss, weights, roles), layout, scores, counts, local_indices)

    def evaluate_tokens(
        self, logprobs: Tensor, tokens: TokenLayout, rewards: Tensor, groups: int | Tensor, counts: Tensor | None
    ) -> tuple[Contrasted, Tensor]:
        """The loss of log-probabilities [B, T], and the scores [S].  counts: needed where tokens are left out."""
        fused = self.parallel.data is None and self.parallel.context is None
        if not fused:
            scores, own_counts = rollout_scores(logprobs, tokens, self.parallel, self.implementation)
            return self.evaluate(scores, rewards, groups, own_counts if counts is None else counts), scores
        num_rollouts = tokens.num_rollouts
        self._check(num_rollouts, logprobs.device, rewards, groups)
        layout = GroupLayout.from_arguments(groups, num_rollouts)
        loss, scores, own_counts, weights, roles = sequence_infonce(
            logprobs, tokens.labels, tokens.offsets, rewards.detach().resolve_neg(), counts, layout.order,
            layout.offsets, layout.slots, layout.size, *self._constants(logprobs), self.tau, self.reward_threshold,
            self.reduction, self.implementation,
        )  # fmt: skip
        result = GroupLoss(loss, weights, roles)
        return self._contrasted(result, layout, scores, own_counts if counts is None else counts, None), scores

    def _check(self, num_rollouts: int, device: torch.device, rewards: Tensor, groups: int | Tensor) -> None:
        check.rewards(rewards, num_rollouts)
        check.devices(device, rewards=rewards, groups=groups, margin=self.margin, num_groups=self.num_groups)

    def _constants(self, like: Tensor) -> tuple[Tensor, Tensor | None]:
        """The margin and the denominator."""
        return _constant(self.margin, like), None if self.num_groups is None else _constant(self.num_groups, like)

    def _contrasted(
        self,
        result: GroupLoss,
        layout: GroupLayout,
        scores: Tensor,
        counts: Tensor | None,
        local_indices: Tensor | None,
    ) -> Contrasted:
        loss, weights, roles = result
        if self.reduction == "none":
            loss = layout.first_rollouts(loss)
        if not self.return_metrics:
            return Contrasted(loss, weights, None, local_indices)
        slots = beside(_segments(layout, scores.device).slots, scores)
        margin, denominator = self._constants(scores)
        if self.reduction != "mean":
            denominator = scores.new_ones(())
        metrics = conspo_metrics(
            loss, beside(margin, scores, scores.dtype), scores.detach(), weights, roles == Role.POSITIVE,
            roles == Role.NEGATIVE, roles == Role.UNSCORABLE, slots, denominator, counts,
        )  # fmt: skip
        return Contrasted(loss, weights, metrics, local_indices)

    def _gathered(
        self, scores: Tensor, rewards: Tensor, groups: int | Tensor, counts: Tensor | None
    ) -> tuple[Tensor, Tensor, int | Tensor, Tensor | None, Tensor]:
        """The arguments of all ranks, and the indices of this rank's rollouts among them."""
        check.groups(groups, scores.shape[0] if isinstance(groups, Tensor) else 0)  # an int divides those of all ranks
        ids = groups.detach().long() if isinstance(groups, Tensor) else None
        # Rewards are compared before they travel, in their own dtype: dtypes, and so rounding, may differ by rank.
        sign = torch.where(rewards > float(self.reward_threshold), torch.inf, -torch.inf)
        rewards = torch.where(rewards.isnan(), torch.nan, sign)
        all_scores, rewards, all_counts, all_ids, local_indices = gather_rollouts(
            scores, rewards, counts, ids, name_of(self.parallel.data), self.parallel.data_factor
        )
        return (
            all_scores,
            rewards,
            groups if ids is None else all_ids,
            None if counts is None else all_counts,
            local_indices,
        )


def _segments(layout: GroupLayout, device: torch.device) -> Segments:
    if layout.order is None or layout.offsets is None or layout.slots is None:
        return equal_segments(layout.num_rollouts, layout.size, device)
    return Segments(layout.order, layout.offsets, layout.slots)


def _constant(value: float | Tensor, like: Tensor) -> Tensor:
    """A number as a 0-d tensor, so that another value is not another program; tensors stay live.

    In eager mode on the CPU: what the host knows is an argument of a launch, and costs none of its own.
    """
    if isinstance(value, Tensor):
        return value.detach().resolve_neg()
    if torch.compiler.is_compiling():
        # Dynamo turns a float that is added to a tensor into an input of the graph, and one that fills it into a guard.
        return torch.zeros((), dtype=like.dtype, device=like.device) + value
    return torch.full((), value, dtype=like.dtype, device="cpu")


class _Selected(NamedTuple):
    """tokens: those to compute.  keep: the same as `Source.logprobs` takes it.

    counts: [S] response tokens of all rollouts, where some are left out or the metrics need them.  left_out: 0-d, the
    number of rollouts left out.
    """

    tokens: TokenLayout
    keep: Tensor | None = None
    counts: Tensor | None = None
    left_out: Tensor | None = None


def _selected(
    source: Source, tokens: TokenLayout, contrast: Contrast, rewards: Tensor, groups: int | Tensor
) -> _Selected:
    """The tokens that can have a gradient; all of them where that is not known without waiting, or saves no work."""
    if not source.skips_tokens:
        return _Selected(tokens)
    on_cpu = tokens.labels.device.type == "cpu"
    # Count tokens before dropping rollouts: metrics report all of them.
    asked = contrast.return_metrics
    counts = response_counts(tokens, contrast.parallel) if on_cpu or asked else None
    whole = contrast.parallel.data is None
    live = live_rollouts(rewards, tokens.num_rollouts, counts, contrast.reward_threshold, groups, whole)
    if live is None or (not on_cpu and not torch.compiler.is_compiling() and live.all()):
        left_out = torch.zeros((), dtype=torch.int64, device=tokens.labels.device) if asked else None
        return _Selected(tokens, None, counts, left_out)
    keep = tokens.per_token(live)
    if not on_cpu and not asked:  # their labels may stay: without a log-probability they have no part in the objective
        return _Selected(tokens, keep)
    local = beside(live, tokens.labels)
    wanted = keep if keep is not None and on_cpu else tokens.per_token(local)
    assert wanted is not None
    left_out = ((counts > 0) & ~local).sum() if asked and counts is not None else None
    return _Selected(tokens.only(wanted), keep, counts, left_out)


def contrast_loss(
    source: Source, tokens: TokenLayout, contrast: Contrast, rewards: Tensor, groups: int | Tensor
) -> Tensor | ConSPOOutput:
    """The loss of rollouts whose tokens are laid out, with log-probabilities from a source."""
    groups = python_number(groups)
    if source.synchronize:
        check.rewards(rewards, tokens.num_rollouts)
        rewards, groups = rewards.cpu(), groups.cpu() if isinstance(groups, Tensor) else groups
    selected = _selected(source, tokens, contrast, rewards, groups)
    logprobs, _entropy = source.logprobs(selected.tokens, selected.keep)
    result, scores = contrast.evaluate_tokens(logprobs, selected.tokens, rewards, groups, selected.counts)
    if result.metrics is None:
        return result.loss
    metrics = result.metrics
    if selected.left_out is not None:
        left_out = selected.left_out
        if contrast.parallel.data is not None:
            left_out = sum_over_ranks(left_out, name_of(contrast.parallel.data))
        metrics = {**metrics, "conspo/uncomputed_rollouts": left_out.to(scores.dtype)}
    return ConSPOOutput(result.loss, metrics, scores.detach(), logprobs.detach().view(tokens.shape))


def checked_scores(scores: Tensor) -> Tensor:
    """Scores that a user passed, in fp32 or fp64."""
    check.scores(scores)
    return scores.to(torch.float64 if scores.dtype == torch.float64 else torch.float32).resolve_neg()


def loss_of_scores(contrast: Contrast, scores: Tensor, rewards: Tensor, groups: int | Tensor) -> Tensor | ConSPOOutput:
    """The loss of scores that a user passed."""
    scores = checked_scores(scores)
    result = contrast.evaluate(scores, rewards, groups)
    return result.loss if result.metrics is None else ConSPOOutput(result.loss, result.metrics, scores.detach(), None)
