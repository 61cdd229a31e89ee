"""ConSPO in NeMo-RL: an advantage estimator; its own policy-gradient loss, set to be linear, does the rest.

NeMo-RL's GRPO hands its estimator all rollouts of a step, on one process, with the policy's log-probabilities. With
`disable_ppo_ratio` its loss is -advantage * logp, and without `token_level_loss` the mean over rollouts of the mean
over tokens: the advantage of rollout i is -w_i, times the number of rollouts. The first optimizer step of a batch has
ConSPO's gradient exactly, whatever micro-batches and ranks its rollouts lie in. Later ones have its weights, off by
about ds / tau where scores have moved by ds. The loss is NeMo-RL's own: here is no trust region, nor a metric of ds.

    loss_fn:
      disable_ppo_ratio: true
      token_level_loss: false
      use_importance_sampling_correction: false

Source: NVIDIA-NeMo/RL, nemo_rl/algorithms/advantage_estimator.py at 00925dd1 (`compute_advantage`),
nemo_rl/algorithms/loss/loss_functions.py at 006907a9 (`ClippedPGLossFn`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .coefficients import Objective

# Fields of NeMo-RL's loss configuration: its default, and the only value with which its loss is the linear one.
DEFAULT_AND_NEEDED: dict[str, tuple[Any, Any]] = {
    "disable_ppo_ratio": (False, True),
    "token_level_loss": (True, False),
    "use_importance_sampling_correction": (False, False),
    "force_on_policy_ratio": (False, False),
    "use_kl_in_reward": (False, False),
    "use_cispo": (False, False),
    "ratio_clip_c": (None, None),
    "positive_example_nll_weight": (0.0, 0.0),
}


class ConSPOAdvantageEstimator:
    """What NeMo-RL calls an advantage estimator, in place of `GRPOAdvantageEstimator`.

    Args:
        estimator_config: `tau`, `margin` and `reward_threshold`, as `conspo_loss`; the margin may be a schedule, of how
            often the estimator was called (set `step` when a run is resumed).
        loss_config: of the loss, `ClippedPGLossConfig` or a mapping.

    Raises:
        ValueError: the loss would not be linear in the log-probabilities, or has another mean: the message says why.

    `metrics` are ConSPO's of the batch before, 0-d tensors named `conspo/...`. NeMo-RL takes none from an estimator.
    """

    def __init__(self, estimator_config: Any, loss_config: Any) -> None:
        self.objective = Objective(
            _field(estimator_config, "tau", 10.0),
            _field(estimator_config, "margin", 0.0),
            _field(estimator_config, "reward_threshold", 0.5),
        )
        self.step = 0
        self.metrics: dict[str, Tensor] = {}
        for name, (default, needed) in DEFAULT_AND_NEEDED.items():
            value = _field(loss_config, name, default)
            if value != needed:
                raise ValueError(f"ConSPO needs loss_fn.{name}={needed}, got {value}")

    def compute_advantage(
        self,
        prompt_ids: Tensor,
        rewards: Tensor,
        mask: Tensor,
        *,
        logprobs_policy: Tensor | None = None,
        valid_mask: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        """Advantages of a whole batch.

        Args:
            prompt_ids: [B], or [B, L] of the prompts' tokens, equal where the prompts are.
            rewards: [B].
            mask: [B, S], 1 for response tokens of rollouts that take part; the first column, which no logits predict,
                is not looked at.
            logprobs_policy: [B, S], of the token at each position.
            valid_mask: [B], 0 for rollouts that take no part.

        Returns:
            [B, S], -w_i * (number of rollouts that take part) everywhere in row i.

        Raises:
            ValueError: there are no log-probabilities.
        """
        if logprobs_policy is None:
            raise ValueError(
                "ConSPO needs logprobs_policy, the log-probabilities of the policy at the step's beginning"
            )
        tokens = mask[:, 1:].bool()
        if valid_mask is not None:
            rewards = rewards.float().masked_fill(valid_mask == 0, torch.nan)
        groups = torch.unique(prompt_ids, dim=0, return_inverse=True)[1]
        result = self.objective.weights(logprobs_policy[:, 1:], tokens, rewards, groups, step=self.step)
        self.metrics = result.metrics
        self.step += 1
        present = tokens.any(dim=1) if valid_mask is None else tokens.any(dim=1) & (valid_mask != 0)
        return (-result.weights * present.sum())[:, None].expand(mask.shape)


def _field(config: Any, name: str, default: Any) -> Any:
    return config.get(name, default) if hasattr(config, "get") else getattr(config, name, default)
