"""ConSPO in prime-rl: weights of a group in the orchestrator, and a custom loss in the trainer. Not exact there.

    [trainer.loss]
    type = "custom"
    import_path = "conspo_kernels.integrations.prime_rl.policy_loss"

prime-rl's trainer sees single sequences, packed in any order, and knows no groups. Only the orchestrator knows groups,
and it has the log-probabilities of the inference engine alone: of the policy that sampled, one step old or more, and
rounded as that engine rounds. So the weights of this module are those of the inference engine's scores, not of the
trainer's. Where the two agree the gradient is ConSPO's; else it is off by about ds / tau where scores differ by ds,
which the metric `conspo/score_drift` shows. Options of the loss are its `kwargs`: kwargs = { trust_region = 0.2 }.

Source: PrimeIntellect-ai/prime-rl, docs/algorithms.md at 858d4287 (custom loss: `LossInputs`, `LossOutputs`; weight
streams and their normalisation; authoring an algorithm: `score_group`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .coefficients import Margin, Objective, summed_loss


class TokenStream(NamedTuple):
    """Of one rollout, per token: its advantage, and its weight in prime-rl's `rl` loss component."""

    advantages: Tensor
    rl_weights: Tensor


def group_streams(
    inference_logprobs: Sequence[Tensor],
    masks: Sequence[Tensor],
    rewards: Tensor,
    *,
    tau: float = 10.0,
    margin: Margin = 0.0,
    reward_threshold: float = 0.5,
    step: float | None = None,
) -> list[TokenStream]:
    """What `score_group` of an algorithm writes onto the tokens of one group.

    The weights of a group's tokens are 1/T, T the group's response tokens, so prime-rl's denominator counts groups;
    advantages are -w_i * T / n_i, and a sum of weight * -advantage * logp has the gradient of the group's loss.

    Args:
        inference_logprobs: [R_i] for each rollout, of the inference engine.
        masks: [R_i] for each rollout, zero = not a sampled token.
        rewards: [number of rollouts].
        tau, margin, reward_threshold, step: as `Objective`.

    Returns:
        One stream per rollout; all zero where the group has no right or no wrong rollout, which prime-rl leaves out.

    Raises:
        TypeError, ValueError: as `Objective.weights`.
    """
    lengths = [len(mask) for mask in masks]
    mask = torch.cat([m.bool() for m in masks])
    offsets = torch.tensor([0, *lengths], dtype=torch.int64).cumsum(dim=0)
    weights = (
        Objective(tau, margin, reward_threshold)
        .weights(torch.cat(list(inference_logprobs)), mask, rewards, len(lengths), cu_seqlens=offsets, step=step)
        .weights
    )
    counts = torch.stack([m.bool().sum() for m in masks]).clamp(min=1)
    total = mask.sum().clamp(min=1)
    live = bool((weights != 0).any())
    per_rollout = -weights * total / counts
    return [
        TokenStream(advantage * m.bool(), m.bool() * (1.0 / total if live else 0.0 * total))
        for advantage, m in zip(per_rollout, masks, strict=True)
    ]


def policy_loss(inputs: Any, tau: float = 10.0, trust_region: float | None = None) -> Any:
    """prime-rl's custom loss of one sequence: the sum of weight * -advantage * logp.

    Args:
        inputs: `LossInputs`, [seq] each: trainer_logprobs, inference_logprobs, advantages, loss_mask, loss_weights.
        tau: as `group_streams`, for the metrics.
        trust_region: epsilon of `conspo_kernels.trust_region` around the inference engine's policy; None, as in the
            paper: none.

    Returns:
        `LossOutputs`: the loss, and the metrics of `summed_loss`, of the trainer's scores beside those of the
        inference engine.

    Raises:
        ValueError: there are no weights: prime-rl would divide by tokens, and the loss would be another.
    """
    from prime_rl.trainer.rl.loss import LossOutputs

    if inputs.loss_weights is None:
        raise ValueError("loss_weights are missing: ConSPO needs the rl_weights that group_streams gives each token")
    mask, logprobs, old = inputs.loss_mask, inputs.trainer_logprobs, inputs.inference_logprobs
    advantages = inputs.advantages * inputs.loss_weights
    ends = torch.tensor([0, len(logprobs)], device=logprobs.device)
    loss, metrics = summed_loss(logprobs, advantages, old, mask, tau=tau, epsilon=trust_region, cu_seqlens=ends)
    return LossOutputs(loss=loss, metrics=metrics)
