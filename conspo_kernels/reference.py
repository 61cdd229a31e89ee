"""The whole ConSPO loss in fp64 and plain loops: the oracle that every implementation is held against.

It is written to be read beside the definitions, not to be fast: one Python iteration per token, rollout and group, and
gradients by autograd of the plain forward pass. It shares no line with the code it judges.

Shape suffixes: n rows of logits (tokens), v vocabulary, s rollouts, p positives and q negatives of one group.

Everywhere below, values that must not touch the loss are left out of the graph; multiplying them by zero would not do,
since 0 * NaN is NaN. That is why rows and scores travel as lists of single tensors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor


class ReferenceOutput(NamedTuple):
    """What `reference_loss` returns. All tensors are fp64; all but the weights are connected to the logits."""

    loss: Tensor  # 0-d, or [S/G] or [S] under reduction="none"
    scores: Tensor  # [S], NaN where a rollout has no response token
    logprobs: Tensor  # shaped like labels, 0 where ignored
    entropy: Tensor  # shaped like labels, 0 where ignored
    weights: Tensor  # [S], dL/ds by autograd; under reduction="none" L is the sum of the entries
    metrics: dict[str, float]


class Group(NamedTuple):
    """The rollouts of one prompt, by index; those that are not scorable are members and nothing else."""

    members: list[int]
    positives: list[int]
    negatives: list[int]

    @property
    def valid(self) -> bool:
        return bool(self.positives) and bool(self.negatives)


def transformed_logits(logits: Tensor, temperature: float, logit_scale: float, softcap: float | None) -> Tensor:
    """softcap * tanh(z * logit_scale / softcap) / temperature, for logits of any shape, none of them -inf."""
    scaled = logits * logit_scale
    if softcap is not None:
        scaled = softcap * torch.tanh(scaled / softcap)
    return scaled / temperature


def token_logprob(
    logits_v: Tensor, label: int, temperature: float = 1.0, logit_scale: float = 1.0, softcap: float | None = None
) -> Tensor:
    """Log-probability of one token: f(z_a)/T - logsumexp_v(f(z_v)/T).

    An entry of -inf stays -inf under f: it has no probability and no gradient. A label outside [0, V) gives NaN.
    """
    if not 0 <= label < len(logits_v):
        return logits_v.sum() * math.nan
    # A sum over the vocabulary leaves out what is -inf before f is taken: tanh(-inf) would make it -softcap, and
    # the chain rule would meet 0 * inf there.
    possible = logits_v[logits_v != -math.inf]
    normaliser = torch.logsumexp(transformed_logits(possible, temperature, logit_scale, softcap), dim=0)
    chosen = logits_v[label]
    if chosen != -math.inf:
        chosen = transformed_logits(chosen, temperature, logit_scale, softcap)
    return chosen - normaliser


def token_entropy(
    logits_v: Tensor, temperature: float = 1.0, logit_scale: float = 1.0, softcap: float | None = None
) -> Tensor:
    """Entropy of one row of logits: -sum_v p_v * log p_v, in nats, 0-d."""
    possible = logits_v[logits_v != -math.inf]
    logits = transformed_logits(possible, temperature, logit_scale, softcap)
    logprobs = logits - torch.logsumexp(logits, dim=0)
    return -(torch.exp(logprobs) * logprobs).sum()


def sequence_score(logprobs: Sequence[Tensor]) -> Tensor:
    """s_i = (1/n_i) * sum_t logp[i,t] over the response tokens of one rollout, at least one, each a 0-d tensor."""
    return torch.stack(list(logprobs)).sum() / len(logprobs)


def positive_log_share(score: Tensor, negatives_q: Tensor, tau: float, margin: float) -> Tensor:
    """log( exp((s_i-m)/tau) / (exp((s_i-m)/tau) + sum_j exp(s_j/tau)) ) of one positive; its exp is 1 - q_i.

    Numerator and denominator are divided by exp((s_i-m)/tau), so that nothing overflows, and the remaining
    -log(1 + sum_j exp(...)) is taken by logaddexp, which keeps its digits where the sum is tiny.
    """
    rivals = torch.logsumexp(negatives_q / tau - (score - margin) / tau, dim=0)
    return -torch.logaddexp(torch.zeros_like(rivals), rivals)


def group_loss(positives_p: Tensor, negatives_q: Tensor, tau: float = 10.0, margin: float = 0.0) -> Tensor:
    """InfoNCE of one group with a margin.

        -(1/|P|) * sum_{i in P} tau * log( exp((s_i-m)/tau) / (exp((s_i-m)/tau) + sum_{j in N} exp(s_j/tau)) )

    Scores of the positives and of the negatives, at least one of each, to a 0-d tensor; all in nats per token.
    """
    total = torch.zeros((), dtype=positives_p.dtype, device=positives_p.device)
    for score in positives_p.unbind():
        total = total + tau * positive_log_share(score, negatives_q, tau, margin)
    return -total / len(positives_p)


def response_tokens(
    labels: Tensor, response_mask: Tensor | None, cu_seqlens: Tensor | None, shift: bool, ignore_index: int
) -> list[list[tuple[int, int]]]:
    """The response tokens of each rollout: (row, label), rows counted over the flattened leading dimensions."""
    if cu_seqlens is None:
        batch, length = labels.shape
        offsets = [b * length for b in range(batch + 1)]
    else:
        offsets = cu_seqlens.tolist()
    if not offsets or offsets[0] != 0 or offsets != sorted(offsets) or offsets[-1] > labels.numel():
        raise ValueError(f"cu_seqlens: expected offsets rising from 0 to at most {labels.numel()}, got {offsets}")

    flat_labels = labels.flatten().tolist()
    flat_mask = [1] * labels.numel() if response_mask is None else response_mask.flatten().tolist()
    rollouts = []
    for start, stop in pairwise(offsets):
        sequence = range(start, stop)
        tokens = []
        for row in sequence:
            source = row + shift  # where label and mask of the token predicted at this row stand
            if source in sequence and flat_mask[source] != 0 and flat_labels[source] != ignore_index:
                tokens.append((row, flat_labels[source]))
        rollouts.append(tokens)
    return rollouts


def prompt_groups(
    groups: int | Tensor, rewards: Tensor, token_counts: Sequence[int], reward_threshold: float
) -> list[Group]:
    """The groups in order of their first rollout, scorable members split into positives and negatives."""
    num_rollouts = len(token_counts)
    if rewards.shape != (num_rollouts,):
        raise ValueError(f"rewards: expected [{num_rollouts}], got {list(rewards.shape)}")
    if isinstance(groups, int) and (groups <= 0 or num_rollouts % groups != 0):
        raise ValueError(f"groups: expected a divisor of the {num_rollouts} rollouts, got {groups}")
    ids = [rollout // groups for rollout in range(num_rollouts)] if isinstance(groups, int) else groups.tolist()
    if len(ids) != num_rollouts:
        raise ValueError(f"groups: expected [{num_rollouts}], got {len(ids)} ids")

    # Compared by torch: a reward of fp32(0.1) is not above a threshold of 0.1, as it would be for Python.
    is_positive = (rewards > reward_threshold).tolist()
    is_nan = torch.isnan(rewards).tolist()
    by_id: dict[int, Group] = {}
    for rollout, group_id in enumerate(ids):
        group = by_id.setdefault(group_id, Group([], [], []))
        group.members.append(rollout)
        if not is_nan[rollout] and token_counts[rollout] > 0:
            (group.positives if is_positive[rollout] else group.negatives).append(rollout)
    return list(by_id.values())


def group_losses(scores: Sequence[Tensor], groups: Sequence[Group], tau: float, margin: float) -> dict[int, Tensor]:
    """Loss of every valid group by its first rollout. Scores that take no part are not looked at."""
    losses = {}
    for group in groups:
        if group.valid:
            positives_p = torch.stack([scores[rollout] for rollout in group.positives])
            negatives_q = torch.stack([scores[rollout] for rollout in group.negatives])
            losses[group.members[0]] = group_loss(positives_p, negatives_q, tau, margin)
    return losses


def stacked(values: Sequence[Tensor], empty: Tensor) -> Tensor:
    """0-d tensors as one vector. `empty`, a tensor without elements, keeps a result without entries on the graph."""
    return torch.cat([empty.flatten(), *(value[None] for value in values)])


def list_metrics(
    loss: float, margin: float, tau: float, scores_s: Tensor, weights_s: Tensor,
    groups: Sequence[Group], token_counts: Sequence[int],
) -> dict[str, float]:  # fmt: skip
    """The `conspo/...` numbers of one batch; the mean of no values is NaN."""
    valid = [group for group in groups if group.valid]
    positives = [scores_s[rollout].item() for group in valid for rollout in group.positives]
    negatives = [scores_s[rollout].item() for group in valid for rollout in group.negatives]
    shares = []
    for group in valid:
        for rollout in group.positives:
            log_share = positive_log_share(scores_s[rollout], scores_s[group.negatives], tau, margin)
            shares.append(log_share.exp().item())
    squares, ordered = [], []
    for group in valid:
        members = scores_s[group.positives + group.negatives]
        squares += (members - members.mean()).square().tolist()
        pairs = [(scores_s[i] > scores_s[j]).item() for i in group.positives for j in group.negatives]
        ordered.append(sum(pairs) / len(pairs))

    def mean(values: Sequence[float]) -> float:
        return sum(values) / len(values) if values else math.nan

    return {
        "conspo/loss": loss,
        "conspo/margin": margin,
        "conspo/score_pos_mean": mean(positives),
        "conspo/score_neg_mean": mean(negatives),
        "conspo/score_gap": mean(positives) - mean(negatives),
        "conspo/score_std": math.sqrt(mean(squares)) if squares else math.nan,
        "conspo/ordered_pairs": mean(ordered),
        "conspo/pos_prob_mean": mean(shares),
        "conspo/valid_group_fraction": len(valid) / len(groups) if groups else math.nan,
        "conspo/weight_abs_max": weights_s.abs().max().item() if len(weights_s) else 0.0,
        "conspo/response_tokens": float(sum(token_counts)),
        "conspo/skipped_rollouts": float(len(scores_s) - sum(len(g.positives + g.negatives) for g in groups)),
    }


def reference_loss(
    logits: Tensor, labels: Tensor, rewards: Tensor, groups: int | Tensor, *,
    cu_seqlens: Tensor | None = None, response_mask: Tensor | None = None, shift: bool = False,
    tau: float = 10.0, margin: float | Tensor = 0.0, reward_threshold: float = 0.5,
    temperature: float = 1.0, logit_scale: float = 1.0, softcap: float | None = None, ignore_index: int = -100,
    reduction: str = "mean", num_groups: float | Tensor | None = None,
) -> ReferenceOutput:  # fmt: skip
    """ConSPO in fp64, from its definition.

        L = mean over valid groups of group_loss(scores of the positives, scores of the negatives)

    A rollout with a NaN reward or without a response token takes no part, and a group without a positive or without a
    negative is not valid. What takes no part reaches neither the loss nor the gradient, whatever its logits are. For
    the fused-linear forms give it logits = hidden.double() @ weight.double().T and differentiate through that.

    Args:
        logits: [B, T, V], or [N, V] or [1, N, V] with cu_seqlens; any float dtype, computed in fp64.
        labels, ignore_index: integers, one per row of logits, aligned with it; ignore_index = no response token.
        rewards, reward_threshold: [S] float, int or bool; NaN = unscorable, above the threshold = positive.
        groups: an int (that many consecutive rollouts share a prompt) or [S] integer prompt ids in any order.
        cu_seqlens: [S+1] integers, offsets of the packed sequences from 0 on; rows past the last one are ignored.
        response_mask: shaped like labels, zero = no response token; labels under it are not looked at.
        shift: labels are the input ids: row t predicts label t+1 of its own sequence, under mask t+1.
        tau, margin: InfoNCE temperature and margin, nats per token.
        temperature, logit_scale, softcap: the logit transform; the temperature is the sampling temperature.
        reduction: "mean" over valid groups; "sum"; or "none", the loss of every group (0 if not valid): [S/G] for an
            int, for ids [S] with each loss at the first rollout of its group, scorable or not.
        num_groups: replaces the denominator of "mean", and does nothing else.

    Returns:
        ReferenceOutput. Without a valid group the loss is a zero with a gradient of zeros. The metric
        conspo/loss is the loss returned; under "none" it is the mean over valid groups.

    Raises:
        ValueError: shapes that do not fit each other, or an unknown reduction.

    Cost: a fp64 copy of the logits and some tensors of a row per token: for small inputs. Source: arXiv:2605.12969.
    """
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f'reduction: expected "mean", "sum" or "none", got {reduction!r}')
    if labels.numel() != logits.shape[:-1].numel() or (cu_seqlens is None and labels.shape != logits.shape[:2]):
        raise ValueError(f"labels: expected one per row of logits {list(logits.shape)}, got {list(labels.shape)}")
    if response_mask is not None and response_mask.shape != labels.shape:
        raise ValueError(f"response_mask: expected {list(labels.shape)} like labels, got {list(response_mask.shape)}")
    margin = float(margin)
    transform = (temperature, logit_scale, softcap)

    # Vocabulary: one log-probability and one entropy per response token.
    logits_nv = logits.to(torch.float64).reshape(labels.numel(), logits.shape[-1])
    empty = logits_nv[:0]
    zero = empty.sum()  # with a gradient of zeros, even where logits are NaN
    rows = logits_nv.unbind()
    rollouts = response_tokens(labels, response_mask, cu_seqlens, shift, ignore_index)
    logprobs, entropy = [zero] * len(rows), [zero] * len(rows)
    for tokens in rollouts:
        for row, label in tokens:
            logprobs[row] = token_logprob(rows[row], label, *transform)
            entropy[row] = token_entropy(rows[row], *transform)

    # Sequences: one score per rollout.
    scores = [sequence_score([logprobs[row] for row, _ in ts]) if ts else zero + math.nan for ts in rollouts]
    token_counts = [len(tokens) for tokens in rollouts]

    # Groups: one loss per prompt, then one for the batch.
    parts = prompt_groups(groups, rewards, token_counts, reward_threshold)
    losses = group_losses(scores, parts, tau, margin)
    denominator = 1.0
    if reduction == "mean":
        denominator = float(max(len(losses), 1) if num_groups is None else num_groups)
    loss = stacked(list(losses.values()), empty).sum() / denominator
    logged = loss.item()
    if reduction == "none":
        logged /= max(len(losses), 1)
        entries = [group.members[0] for group in parts] if isinstance(groups, int) else range(len(scores))
        loss = stacked([losses.get(rollout, zero) for rollout in entries], empty)

    # The same once more, from the scores on, to differentiate by them.
    with torch.enable_grad():
        leaf_s = stacked(scores, empty).detach().requires_grad_()
        leaf_losses = group_losses(leaf_s.unbind(), parts, tau, margin)
        leaf_loss = stacked(list(leaf_losses.values()), leaf_s[:0]).sum() / denominator
    (weights_s,) = torch.autograd.grad(leaf_loss, leaf_s)

    return ReferenceOutput(
        loss=loss,
        scores=stacked(scores, empty),
        logprobs=stacked(logprobs, empty).reshape(labels.shape),
        entropy=stacked(entropy, empty).reshape(labels.shape),
        weights=weights_s,
        metrics=list_metrics(logged, margin, tau, leaf_s.detach(), weights_s, parts, token_counts),
    )
