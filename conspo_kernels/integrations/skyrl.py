"""ConSPO in SkyRL: a trainer whose advantages are ConSPO's, and a policy loss in SkyRL's registry.

    register_policy_loss("conspo")(policy_loss)                  # skyrl.backends.skyrl_train.utils.ppo_utils;
                                                                 # or partial(policy_loss, trust_region=0.2)
    Trainer = conspo_trainer(RayPPOTrainer)                      # for `get_trainer` of the experiment
    trainer.algorithm.policy_loss_type=conspo

SkyRL's advantage estimators are given no log-probabilities, but the method of its trainer that calls them holds the
whole batch: `action_log_probs`, rewards and uids of all rollouts, on one process. The first mini-batch has ConSPO's
gradient exactly; later ones have its weights of the batch's beginning, off by about ds / tau where scores have moved by
ds.

Source: SkyRL 0.3.0, skyrl/train/trainer.py (`compute_advantages_and_returns`, `_normalize_advantages`),
skyrl/backends/skyrl_train/utils/ppo_utils.py (`reduce_loss`), skyrl/backends/skyrl_train/workers/worker.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from conspo_kernels import ConSPOWeights

from .coefficients import Margin, Objective, group_ids, numbers, summed_loss, token_advantages


def batch_weights(data: Any, objective: Objective, step: float | None = None) -> ConSPOWeights:
    """Weights, loss and metrics of a whole training batch.

    Raises:
        ValueError: there are no `action_log_probs`, and as `Objective.weights`.
    """
    logprobs = data["action_log_probs"]
    if logprobs is None:
        raise ValueError("ConSPO needs action_log_probs: a policy_loss_type that skips the policy's forward has none")
    mask, groups = data["loss_mask"], group_ids(list(data.metadata["uids"]))
    return objective.weights(logprobs, mask, data["rewards"].sum(dim=-1), groups, step=step)


def conspo_trainer(base: type, *, tau: float = 10.0, margin: Margin = 0.0, reward_threshold: float = 0.5) -> type:
    """A subclass of SkyRL's `RayPPOTrainer` whose advantages are ConSPO's.

    Args:
        base: `RayPPOTrainer`, or what is derived from it.
        tau, reward_threshold: as `conspo_loss`. A rollout's reward is the sum of its token-level rewards.
        margin: a number, or a schedule of the trainer's `global_step`, counted from 0.

    Returns:
        The class. It raises ValueError for settings that would make the loss another.
    """
    objective = Objective(tau, margin, reward_threshold)

    class ConSPOTrainer(base):
        @torch.no_grad()
        def compute_advantages_and_returns(self, data: Any) -> Any:
            _check(self.cfg)
            result = batch_weights(data, objective, max(self.global_step - 1, 0))
            advantages = token_advantages(result.weights, data["loss_mask"], 1.0)
            data = super().compute_advantages_and_returns(data)  # its metrics, of the estimator in the settings
            self.all_metrics.update(numbers(result.metrics))
            data["advantages"] = data["returns"] = advantages.to(data["advantages"].device)
            return data

        @torch.no_grad()
        def _normalize_advantages(
            self, data: Any, mini_batch_boundaries: list[tuple[int, int]], prompt_boundaries: Any = None
        ) -> Any:
            del prompt_boundaries
            # The mean of the mini-batches' gradients is the batch's. SkyRL's reductions would divide by tokens.
            data["advantages"] = data["advantages"] * len(mini_batch_boundaries)
            return data

    return ConSPOTrainer


def _check(cfg: Any) -> None:
    algorithm = cfg.trainer.algorithm
    if algorithm.policy_loss_type != "conspo":
        raise ValueError(
            f"ConSPO's advantages need trainer.algorithm.policy_loss_type=conspo, got {algorithm.policy_loss_type}"
        )
    if algorithm.use_kl_in_reward:
        raise ValueError(
            "trainer.algorithm.use_kl_in_reward=true: rewards with a KL penalty are no verdicts; use_kl_loss"
        )
    if algorithm.advantage_batch_normalize:
        raise ValueError("trainer.algorithm.advantage_batch_normalize=true would shift and scale ConSPO's coefficients")
    if cfg.generator.step_wise_trajectories:
        raise ValueError("generator.step_wise_trajectories=true: a trajectory's steps are rollouts of their own there")


def policy_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    config: Any,
    loss_mask: Tensor | None = None,
    rollout_logprobs: Tensor | None = None,
    *,
    tau: float = 10.0,
    trust_region: float | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """A policy loss in SkyRL's signature: the sum of -advantage * logp, which SkyRL multiplies by its ranks.

    Args:
        tau: as `conspo_trainer`, for the metrics.
        trust_region: epsilon of `conspo_kernels.trust_region` around `old_log_probs`; None, as in the paper: none.

    Returns:
        The loss, and metrics: those of `summed_loss`, all zero in the first mini-batch, and SkyRL's `clip_ratio`, the
        share of stopped tokens.
    """
    del config, rollout_logprobs
    mask = torch.ones_like(log_probs) if loss_mask is None else loss_mask
    loss, reused = summed_loss(log_probs, advantages, old_log_probs, mask, tau=tau, epsilon=trust_region)
    metrics = numbers(reused)
    return loss, {"clip_ratio": metrics["conspo/trust_region_fraction"], **metrics}
