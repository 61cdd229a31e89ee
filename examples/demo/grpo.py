"""GRPO, the baseline: group-normalised advantages on length-normalised log-probabilities.

Every rollout is used for one update, of the parameters that sampled it: the importance ratio of GRPO is 1 wherever it
is evaluated, its clip never acts, and its gradient is that of

    loss = -(1/S) * sum_i A_i * s_i ,    A_i = (r_i - mean_g r) / (std_g r + 1e-4) ,    s_i = mean_t logp[i,t]

which is what is written here. There is no KL term. The mean is over all S rollouts, those of groups without a contrast
(A = 0) among them, as is usual for GRPO; ConSPO's mean is over the groups that have one.

Source: Shao et al., DeepSeekMath, arXiv:2402.03300.
"""

from __future__ import annotations

import torch


def grpo_loss(scores_s: torch.Tensor, rewards_s: torch.Tensor, group_size: int) -> torch.Tensor:
    """The loss above, from scores `[S]` with a graph and rewards `[S]`, each `group_size` rollouts one group."""
    rewards_gk = rewards_s.to(scores_s).view(-1, group_size)
    centred = rewards_gk - rewards_gk.mean(dim=1, keepdim=True)
    advantages = centred / (rewards_gk.std(dim=1, keepdim=True) + 1e-4)
    return -(advantages.flatten() * scores_s).mean()
