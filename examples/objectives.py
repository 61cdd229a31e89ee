"""Objectives that ConSPO is compared with, as pure functions of log-probabilities, rewards and groups.

Each takes what one batch of rollouts has and returns a 0-d loss. None knows a vocabulary: its gradient is one
coefficient per token, `coefficients(...)`, which `weighted_logprob_loss` and `linear_weighted_logprob_loss` carry to
the logits or the hidden states.

Shapes: s rollouts, t tokens. Rewards are 0 or 1 (a verifier's); a rollout is right where its reward exceeds 0.5.
    logprobs, old_logprobs    [s, t] of the policy that is trained, and of the one that sampled
    mask                      [s, t] 1 at response tokens, 0 elsewhere: there log-probabilities may be anything
    rewards                   [s]
    group_size                each so many consecutive rollouts share a prompt
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from conspo_kernels import conspo_loss_from_scores

Objective = Callable[..., Tensor]  # (logprobs, old_logprobs, mask, rewards, group_size, **constants) -> loss


def coefficients(objective: Objective, logprobs: Tensor, *batch: Any, **constants: Any) -> tuple[Tensor, Tensor]:
    """The loss, and dloss/dlogprobs [s, t]: what `weighted_logprob_loss` takes."""
    leaf = logprobs.detach().requires_grad_()
    loss = objective(leaf, *batch, **constants)
    return loss.detach(), torch.autograd.grad(loss, leaf)[0]


def response_only(per_token: Tensor, mask: Tensor) -> Tensor:
    """[s, t]: 0 but at response tokens, whatever stands elsewhere; a product with the mask makes NaN of infinity."""
    return torch.where(mask.bool(), per_token, 0.0)


def rollout_means(per_token: Tensor, mask: Tensor) -> Tensor:
    """[s]: the mean over a rollout's response tokens, 0 where it has none."""
    return response_only(per_token, mask).sum(1) / mask.sum(1).clamp(min=1)


def token_mean(per_token: Tensor, mask: Tensor) -> Tensor:
    """The mean over the response tokens of all rollouts."""
    return response_only(per_token, mask).sum() / mask.sum().clamp(min=1)


def ratios(logprobs: Tensor, old_logprobs: Tensor, mask: Tensor) -> Tensor:
    """[s, t]: probability now over probability when it was sampled; 1 but at response tokens.

    `token_logprobs` gives 0 elsewhere, an inference engine what it likes: the exponential of the difference overflows,
    and the gradient of an infinite ratio is NaN, whatever it is multiplied by later.
    """
    return response_only(logprobs - old_logprobs, mask).exp()


def advantages(rewards: Tensor, group_size: int, scaled: bool = True) -> Tensor:
    """[s, 1]: A = r - mean_g r, and divided by std_g r + 1e-4 if `scaled`."""
    groups = rewards.view(-1, group_size)
    centred = groups - groups.mean(1, keepdim=True)
    if scaled:
        centred = centred / (groups.std(1, keepdim=True) + 1e-4)
    return centred.view(-1, 1)


def clipped(ratio: Tensor, advantage: Tensor, low: float, high: float) -> Tensor:
    """[s, t]: min(rho A, clip(rho, 1 - low, 1 + high) A)."""
    return torch.minimum(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage)


def grpo(
    logprobs: Tensor, old_logprobs: Tensor, mask: Tensor, rewards: Tensor, group_size: int, *, clip: float = 0.2
) -> Tensor:
    """-(1/S) sum_i (1/n_i) sum_t min(rho A_i, clip(rho, 1 - clip, 1 + clip) A_i).

    Source: Shao et al., DeepSeekMath, arXiv:2402.03300, without its KL term.
    """
    per_token = clipped(ratios(logprobs, old_logprobs, mask), advantages(rewards, group_size), clip, clip)
    return -rollout_means(per_token, mask).mean()


def informative(rewards: Tensor, group_size: int) -> Tensor:
    """[s] bool: rollouts of groups with a right one and a wrong one. DAPO samples until a batch has no others."""
    right = rewards.view(-1, group_size) > 0.5
    return (right.any(1) & ~right.all(1)).repeat_interleave(group_size)


def dapo(
    logprobs: Tensor, old_logprobs: Tensor, mask: Tensor, rewards: Tensor, group_size: int, *,
    clip_low: float = 0.2, clip_high: float = 0.28, dynamic_sampling: bool = False,
) -> Tensor:  # fmt: skip
    """-(1/sum_i n_i) sum_i sum_t min(rho A_i, clip(rho, 1 - clip_low, 1 + clip_high) A_i).

    dynamic_sampling: the sum of n_i is over the `informative` rollouts. The others are what DAPO samples anew; with a
    fixed number of rollouts they are left out.

    Source: Yu et al., DAPO, arXiv:2503.14476.
    """
    if dynamic_sampling:
        mask = mask * informative(rewards, group_size)[:, None]
    per_token = clipped(ratios(logprobs, old_logprobs, mask), advantages(rewards, group_size), clip_low, clip_high)
    return -token_mean(per_token, mask)


def dr_grpo(
    logprobs: Tensor, old_logprobs: Tensor, mask: Tensor, rewards: Tensor, group_size: int, *,
    max_length: int, clip: float = 0.2,
) -> Tensor:  # fmt: skip
    """-(1/(S L)) sum_i sum_t min(rho A_i, clip(rho) A_i), A not divided by its deviation.

    max_length: L, the most tokens that a response of the task may have. Not the longest of the batch: a token would
    count more in a batch of short responses, which is what the method takes out.

    Source: Liu et al., Understanding R1-Zero-Like Training, arXiv:2503.20783.
    """
    per_token = clipped(ratios(logprobs, old_logprobs, mask), advantages(rewards, group_size, scaled=False), clip, clip)
    return -response_only(per_token, mask).sum() / (mask.shape[0] * max_length)


def gmpo(
    logprobs: Tensor, old_logprobs: Tensor, mask: Tensor, rewards: Tensor, group_size: int, *, clip: float = 0.4
) -> Tensor:
    """-(1/S) sum_i A_i exp((1/n_i) sum_t l_t): a geometric mean of ratios, each clipped where clipping is pessimistic.

    l = log rho, and with the sign of A_i: sign * min(sign * l, sign * clip(l, -clip, clip)).

    Source: Zhao et al., Geometric-Mean Policy Optimization, arXiv:2507.20673.
    """
    advantage = advantages(rewards, group_size)
    log_ratio, sign = logprobs - old_logprobs, advantage.sign()
    pessimistic = sign * torch.minimum(sign * log_ratio, sign * log_ratio.clamp(-clip, clip))
    return -(advantage[:, 0] * rollout_means(pessimistic, mask).exp()).mean()


def cispo(
    logprobs: Tensor, old_logprobs: Tensor, mask: Tensor, rewards: Tensor, group_size: int, *, ceiling: float = 5.0
) -> Tensor:
    """-(1/sum_i n_i) sum_i sum_t stop_gradient(min(rho, ceiling)) A_i logp[i, t].

    Source: MiniMax, MiniMax-M1, arXiv:2506.13585; the ceiling of 5 is ScaleRL's, arXiv:2510.13786.
    """
    weight = ratios(logprobs, old_logprobs, mask).clamp(max=ceiling).detach()
    return -token_mean(weight * advantages(rewards, group_size) * logprobs, mask)


def sapo(
    logprobs: Tensor, old_logprobs: Tensor, mask: Tensor, rewards: Tensor, group_size: int, *,
    tau_positive: float = 1.0, tau_negative: float = 1.05,
) -> Tensor:  # fmt: skip
    """-(1/S) sum_i (1/n_i) sum_t (4 / tau) sigmoid(tau (rho - 1)) A_i, tau of the sign of A_i.

    Source: Gao et al., Soft Adaptive Policy Optimization, arXiv:2511.20347.
    """
    advantage = advantages(rewards, group_size)
    tau = torch.where(advantage > 0, tau_positive, tau_negative)
    gate = torch.sigmoid(tau * (ratios(logprobs, old_logprobs, mask) - 1)) * 4 / tau
    return -rollout_means(gate * advantage, mask).mean()


def disco(
    logprobs: Tensor, old_logprobs: Tensor, mask: Tensor, rewards: Tensor, group_size: int, *,
    tau: float = 10.0, beta: float = 1e3, delta: float = 1e-4,
) -> Tensor:  # fmt: skip
    """mean over groups and right rollouts i of tau log mean_{j wrong} exp((s_j - s_i) / tau), and a constraint.

    s_i = (1/n_i) sum_t logp[i, t].  The constraint KL(old || now) <= delta is the penalty
    (beta/2) max(KL - delta, 0)^2, with KL = mean over rollouts of (1/n_i) sum_t (old_logprobs - logprobs).

    The authors' code (github.com/Optimization-AI/DisCO, `compute_policy_loss_disco_logL`) has the same penalty, by its
    gradient beta max(KL - delta, 0) dKL. Two things differ there: its KL is a mean over all response tokens, so long
    rollouts count more, and it divides by the number of all questions, not of those with a right and a wrong rollout.

    Source: Li et al., DisCO, arXiv:2505.12366, with log-likelihood scores (its tau is 10 for these).
    """
    scores = rollout_means(logprobs, mask).view(-1, group_size)
    right = rewards.view(-1, group_size) > 0.5
    wrong = torch.where(right, -torch.inf, scores / tau).logsumexp(1) - (~right).sum(1).clamp(min=1).log()
    valid = right.any(1) & ~right.all(1)
    gap = torch.where(right, tau * wrong[:, None] - scores, 0.0).sum(1) / right.sum(1).clamp(min=1)
    contrast = torch.where(valid, gap, 0.0).sum() / valid.sum().clamp(min=1)
    divergence = rollout_means(old_logprobs - logprobs, mask).mean()
    return contrast + beta / 2 * (divergence - delta).clamp(min=0).square()


# ConSPO, and what is left of it when a part is taken away.


def conspo(
    logprobs: Tensor, old_logprobs: Tensor, mask: Tensor, rewards: Tensor, group_size: int, *,
    tau: float = 10.0, margin: float = 0.0,
) -> Tensor:  # fmt: skip
    """ConSPO from log-probabilities; `conspo_loss` is this and takes logits. Without a margin: margin 0.

    Source: Zhang et al., arXiv:2605.12969.
    """
    del old_logprobs
    return _contrast(rollout_means(logprobs, mask), mask, rewards, group_size, tau, margin)


def linear_score_gap(logprobs: Tensor, old_logprobs: Tensor, mask: Tensor, rewards: Tensor, group_size: int) -> Tensor:
    """mean over valid groups of (mean score of the wrong) - (mean score of the right): no rollout counts more."""
    del old_logprobs
    scores, right = rollout_means(logprobs, mask).view(-1, group_size), rewards.view(-1, group_size) > 0.5
    valid = right.any(1) & ~right.all(1)
    gap = (scores * ~right).sum(1) / (~right).sum(1).clamp(min=1) - (scores * right).sum(1) / right.sum(1).clamp(min=1)
    return torch.where(valid, gap, 0.0).sum() / valid.sum().clamp(min=1)


def clipped_ratio_scores(
    logprobs: Tensor, old_logprobs: Tensor, mask: Tensor, rewards: Tensor, clip_low: float = 0.2, clip_high: float = 0.2
) -> Tensor:
    """[s]: GRPO's score of a rollout, the mean of min(rho, 1 + clip_high) if it is right, max(rho, 1 - clip_low) else.

    Source: arXiv:2605.12969, its reading of GRPO.
    """
    ratio = ratios(logprobs, old_logprobs, mask)
    right = (rewards > 0.5)[:, None]
    return rollout_means(torch.where(right, ratio.clamp(max=1 + clip_high), ratio.clamp(min=1 - clip_low)), mask)


def conspo_of_clipped_ratios(
    logprobs: Tensor, old_logprobs: Tensor, mask: Tensor, rewards: Tensor, group_size: int, *,
    tau: float = 10.0, margin: float = 0.0, clip: float = 0.2,
) -> Tensor:  # fmt: skip
    """ConSPO's contrast of GRPO's scores."""
    scores = clipped_ratio_scores(logprobs, old_logprobs, mask, rewards, clip, clip)
    return _contrast(scores, mask, rewards, group_size, tau, margin)


def _contrast(scores: Tensor, mask: Tensor, rewards: Tensor, group_size: int, tau: float, margin: float) -> Tensor:
    """Scores [s] -> ConSPO's loss; rollouts without response tokens take no part."""
    scores = scores.masked_fill(mask.sum(1) == 0, torch.nan)
    return conspo_loss_from_scores(scores, rewards, group_size, tau=tau, margin=margin)


OBJECTIVES: dict[str, Objective] = {
    "conspo": conspo,
    "grpo": grpo,
    "dapo": dapo,
    "dr_grpo": dr_grpo,
    "disco": disco,
    "gmpo": gmpo,
    "cispo": cispo,
    "sapo": sapo,
    "linear_score_gap": linear_score_gap,
    "conspo_of_clipped_ratios": conspo_of_clipped_ratios,
}
