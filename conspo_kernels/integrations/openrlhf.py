"""ConSPO in OpenRLHF: an experience maker that knows all rollouts of a batch, and a policy loss.

    maker = experience_maker(RemoteExperienceMaker)               # in place of RemoteExperienceMaker
    trainer = actor_trainer(ActorPPOTrainer)                      # in place of ActorPPOTrainer

The experience maker runs on one process and holds log-probabilities, rewards and prompts of all rollouts of a batch, so
the weights are computed there. Micro-batches and ranks then share the advantages out. The first optimizer step of a
batch has ConSPO's gradient exactly; later ones have its weights of the batch's beginning, off by about ds / tau where
scores have moved by ds.

Source: OpenRLHF 0.11.2, openrlhf/trainer/ppo_utils/experience_maker.py (`compute_advantages_and_returns`),
openrlhf/models/loss.py (`PolicyLoss`, `aggregate_loss`), openrlhf/utils/loss_utils.py,
openrlhf/trainer/ray/ppo_actor.py (`ActorPPOTrainer.training_step`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .coefficients import Margin, Objective, check_trust_region, mean_change, summed_loss, token_advantages


def conspo_advantages(
    experiences: Sequence[Any],
    rewards: Sequence[Tensor],
    samples_per_prompt: int,
    objective: Objective,
    step: float | None = None,
) -> None:
    """Set `advantages` and `returns` of all experiences of a batch: -B * w_i / n_i per response token.

    ConSPO's metrics of the batch go into `info`, which OpenRLHF logs.

    Args:
        experiences: with `action_log_probs` and `action_mask` [b, A], a dict `info` and `index`, b numbers of the
            original order, in which each `samples_per_prompt` consecutive ones share a prompt. b and A differ between
            experiences.
        rewards: [b] for each experience.
        samples_per_prompt: rollouts of a prompt.
        objective: ConSPO's settings.
        step: the training step, for a margin that is a schedule.

    Raises:
        TypeError, ValueError: as `Objective.weights`.
    """
    masks = [experience.action_mask.bool() for experience in experiences]
    lengths = torch.cat([mask.sum(dim=1) for mask in masks]).cpu()
    logprobs = torch.cat([x.action_log_probs[mask] for x, mask in zip(experiences, masks, strict=True)])
    offsets = torch.nn.functional.pad(lengths.cumsum(dim=0), (1, 0))
    index = torch.tensor([i for experience in experiences for i in experience.index], dtype=torch.int64)
    mask, verdicts = torch.ones_like(logprobs), torch.cat(list(rewards)).to(logprobs.device)
    groups = index // samples_per_prompt
    result = objective.weights(logprobs, mask, verdicts, groups, cu_seqlens=offsets, step=step)
    scale = float((lengths > 0).sum())  # OpenRLHF divides by the rollouts that have a token
    for experience, mask, part in zip(experiences, masks, result.weights.split([len(m) for m in masks]), strict=True):
        experience.info |= {name: value.cpu().expand(len(mask)).clone() for name, value in result.metrics.items()}
        experience.advantages = token_advantages(part.to(mask.device), mask, scale)
        experience.returns = experience.advantages.clone()


def experience_maker(base: type, *, tau: float = 10.0, margin: Margin = 0.0, reward_threshold: float = 0.5) -> type:
    """A subclass of OpenRLHF's `RemoteExperienceMaker` whose advantages are ConSPO's.

    Args:
        base: `RemoteExperienceMaker`, or what is derived from it.
        tau, reward_threshold: as `conspo_loss`; rewards before OpenRLHF's penalties of length and its shaping.
        margin: a number, or a schedule of how many batches were made (its attribute `conspo_step`).

    Returns:
        The class. Its `compute_advantages_and_returns` raises ValueError for settings that would make the loss another.
    """
    objective = Objective(tau, margin, reward_threshold)

    class ConSPOExperienceMaker(base):
        conspo_step = 0

        @torch.no_grad()
        def compute_advantages_and_returns(self, experiences: list[Any]) -> list[Any]:
            args = self.strategy.args
            _check(args)
            rewards = [experience.rewards.float().clone() for experience in experiences]
            experiences = super().compute_advantages_and_returns(experiences)  # its `info`, for the logs
            conspo_advantages(experiences, rewards, args.rollout.n_samples_per_prompt, objective, self.conspo_step)
            self.conspo_step += 1
            return experiences

    return ConSPOExperienceMaker


def _check(args: Any) -> None:
    if args.algo.kl.init_coef > 0 and not args.algo.kl.use_loss:
        raise ValueError("algo.kl.init_coef > 0 puts a KL penalty into rewards, which ConSPO does not read: use_loss")
    if args.algo.advantage.is_correction_level != "off":
        raise ValueError("algo.advantage.is_correction_level: ConSPO has no importance weights, set it to off")


class ConSPOPolicyLoss(nn.Module):
    """In place of OpenRLHF's `PolicyLoss`: the mean over an optimizer step's rollouts of sum_t -advantage * logp.

    Args:
        tau: as `experience_maker`, for the metrics.
        trust_region: epsilon of `conspo_kernels.trust_region` around the policy at the batch's beginning; None, as in
            the paper: none.

    `metrics` are those of `summed_loss`, of the call before.
    """

    def __init__(self, tau: float = 10.0, trust_region: float | None = None) -> None:
        super().__init__()
        check_trust_region(trust_region)
        self.tau, self.trust_region = tau, trust_region
        self.metrics: dict[str, Tensor] = {}

    def forward(
        self,
        log_probs: Tensor,
        old_log_probs: Tensor,
        advantages: Tensor,
        action_mask: Tensor | None = None,
        rollout_log_probs: Tensor | None = None,
        dp_size: int = 1,
        batch_num_tokens: float | Tensor | None = None,
        global_batch_size: float | Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, None, None]:
        """OpenRLHF's signature and returns: loss, share of stopped tokens, mean of old - new, and two without a use.

        Raises:
            ValueError: no mask, or no `global_batch_size`: the mean would be one over a micro-batch.
        """
        del rollout_log_probs, batch_num_tokens
        if action_mask is None or global_batch_size is None:
            raise ValueError("ConSPO needs action_mask and the optimizer step's global_batch_size")
        summed, self.metrics = summed_loss(
            log_probs, advantages, old_log_probs, action_mask, tau=self.tau, epsilon=self.trust_region
        )
        kl = mean_change(log_probs, old_log_probs, action_mask)
        return summed / global_batch_size * dp_size, self.metrics["conspo/trust_region_fraction"], kl, None, None


def actor_trainer(base: type, *, tau: float = 10.0, trust_region: float | None = None) -> type:
    """A subclass of OpenRLHF's `ActorPPOTrainer` whose policy loss is ConSPO's, and which logs its metrics.

    Args:
        base: `ActorPPOTrainer`, or what is derived from it.
        tau, trust_region: as `ConSPOPolicyLoss`.
    """
    check_trust_region(trust_region)

    class ConSPOActorTrainer(base):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            self.actor_loss_fn = ConSPOPolicyLoss(tau, trust_region)

        def training_step(self, *arguments: Any, **options: Any) -> dict[str, Any]:
            status: dict[str, Any] = super().training_step(*arguments, **options)
            status["metrics"] |= self.actor_loss_fn.metrics
            status["weights"] |= dict.fromkeys(self.actor_loss_fn.metrics, "token")
            return status

    return ConSPOActorTrainer
