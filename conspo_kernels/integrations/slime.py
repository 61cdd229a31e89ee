"""ConSPO in slime: a function of advantages and a loss, both given by their paths.

    --custom-advantage-function-path conspo_kernels.integrations.slime.compute_advantages
    --loss-type custom_loss --custom-loss-function-path conspo_kernels.integrations.slime.policy_loss
    --disable-rewards-normalization --custom-config-path conspo.yaml

The rollouts of a group lie on several data-parallel ranks, each of which computes its own advantages: one score, one
reward and one prompt per rollout are gathered over these ranks. The first optimizer step of a rollout batch has
ConSPO's gradient exactly; with `--num-steps-per-rollout` above 1 later ones have the weights of the batch's beginning,
off by about ds / tau where scores have moved by ds.

Source: THUDM/slime, slime/backends/megatron_utils/loss.py at 00c2d6db (`compute_advantages_and_returns`,
`policy_loss_function`, `loss_function`), slime/backends/megatron_utils/cp_utils.py (`get_sum_of_sample_mean`).
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from conspo_kernels import CosineMargin, Parallel

from .coefficients import Margin, Objective, linear_loss, numbers, trusted_advantages


def compute_advantages(args: Any, rollout_data: MutableMapping[str, Any]) -> None:
    """slime's custom advantage function: sets `advantages` and `returns` of this rank's rollouts.

    slime takes the mean over a rollout's tokens and divides by the rollouts of the step: the advantage of rollout i is
    -w_i, times the rollouts of all ranks.

    Args:
        args: slime's arguments; of ours, from `--custom-config-path`: `conspo_tau`, `conspo_margin`,
            `conspo_reward_threshold`, `conspo_trust_region` (none by default); `conspo_margin_steps` and
            `conspo_margin_warmup_ratio` make the margin a schedule of the rollout batches, counted from
            `start_rollout_id`.
        rollout_data: `log_probs` and `loss_masks`, lists of [R_i], `rewards` and `sample_indices` of this rank.
            ConSPO's metrics of the batch are added as lists of numbers, whose means slime logs.

    Raises:
        ValueError: a setting would make the loss another; the message names it.
    """
    _check(args, rollout_data)
    logprobs: list[Tensor] = rollout_data["log_probs"]
    device = logprobs[0].device
    offsets = torch.tensor([0, *(x.numel() for x in logprobs)]).cumsum(dim=0)
    indices = torch.as_tensor(rollout_data["sample_indices"], dtype=torch.int64, device=device)
    rewards = torch.as_tensor(rollout_data["rewards"], dtype=torch.float32, device=device)
    ranks = _data_parallel_ranks()
    # slime adds gradients up over ranks, after it divided by the rollouts of all of them.
    parallel = None if ranks is None else Parallel(data=ranks, grad_reduction="sum")
    mask, groups = torch.cat(list(rollout_data["loss_masks"])).to(device), indices // args.n_samples_per_prompt
    result = _objective(args).weights(
        torch.cat(logprobs), mask, rewards, groups, cu_seqlens=offsets, step=_step(args), parallel=parallel
    )
    scaled = -result.weights * _over_ranks(len(logprobs), ranks, device)
    rollout_data["advantages"] = [w.expand_as(x).clone() for w, x in zip(scaled, logprobs, strict=True)]
    rollout_data["returns"] = rollout_data["advantages"]
    rollout_data.update({name: [value] * len(logprobs) for name, value in numbers(result.metrics).items()})


def policy_loss(
    args: Any,
    batch: MutableMapping[str, Any],
    logits: Tensor,
    sum_of_sample_mean: Callable[[Tensor], Tensor],
) -> tuple[Tensor, dict[str, Tensor]]:
    """slime's custom loss: the sum over rollouts of the mean over tokens of -advantage * logp, and the entropy term.

    Args:
        args: slime's arguments.
        batch: a micro-batch with `advantages`, `log_probs` (those of the step's beginning) and its tokens.
        logits: [1, T, V], this rank's part of the vocabulary; slime's own function takes log-probabilities from them.
        sum_of_sample_mean: slime's reduction: [tokens] to the sum over rollouts of the mean over their tokens.

    Returns:
        The loss, and what slime logs, of each the mean over rollouts. `conspo/score_drift` is that of a rollout's
        |change of its score since the weights were computed|, `conspo/weight_drift` that over tau, and
        `conspo/trust_region_fraction` the share of its tokens that the trust region stopped.

    Raises:
        ValueError: `--use-kl-loss`, which is of slime's own loss.
    """
    if args.use_kl_loss:
        raise ValueError("--use-kl-loss is of slime's policy loss; ConSPO's custom loss has no KL term")
    logprobs, entropy = _logprobs_and_entropy(args, batch, logits)
    advantages, old = torch.cat(batch["advantages"]), torch.cat(batch["log_probs"])
    trusted = trusted_advantages(logprobs, advantages, old, getattr(args, "conspo_trust_region", None))
    pg_loss = sum_of_sample_mean(linear_loss(logprobs, trusted))
    entropy_loss = sum_of_sample_mean(entropy)
    # A rank without response tokens still has to take part in backward.
    loss = pg_loss - args.entropy_coef * entropy_loss + (0 * logits.sum() if logprobs.numel() == 0 else 0)
    drift = _score_drift(batch, logprobs.detach(), old)
    stopped = (advantages != 0) & (trusted == 0)
    logged = {
        "loss": loss,
        "pg_loss": pg_loss,
        "entropy_loss": entropy_loss,
        "ppo_kl": sum_of_sample_mean(old - logprobs),
        "conspo/score_drift": drift,
        "conspo/weight_drift": drift / getattr(args, "conspo_tau", 10.0),
        "conspo/trust_region_fraction": sum_of_sample_mean(stopped.to(logprobs.dtype)),
    }
    return loss, {name: value.clone().detach() for name, value in logged.items()}


def _score_drift(batch: MutableMapping[str, Any], logprobs: Tensor, old: Tensor) -> Tensor:
    """0-d, the sum over rollouts of |mean over response tokens of new - old|."""
    masks = [mask.to(logprobs) for mask in batch["loss_masks"]]
    changes = (logprobs - old).split([len(mask) for mask in masks])
    drifts = [(x * mask).sum().abs() / mask.sum().clamp(min=1) for x, mask in zip(changes, masks, strict=True)]
    return torch.stack(drifts).sum() if drifts else logprobs.sum()


def _logprobs_and_entropy(args: Any, batch: MutableMapping[str, Any], logits: Tensor) -> tuple[Tensor, Tensor]:
    from slime.backends.megatron_utils.loss import get_log_probs_and_entropy

    tokens = {name: batch[name] for name in ("unconcat_tokens", "total_lengths", "response_lengths")}
    _, results = get_log_probs_and_entropy(logits, args=args, **tokens, with_entropy=True)
    return torch.cat(results["log_probs"]), torch.cat(results["entropy"])


def _check(args: Any, rollout_data: MutableMapping[str, Any]) -> None:
    wrong = {
        "rewards_normalization": "rewards are then no verdicts any more: --disable-rewards-normalization",
        "normalize_advantages": "it would shift and scale ConSPO's coefficients",
        "calculate_per_token_loss": "ConSPO's mean over a rollout's tokens would be one over all tokens",
        "use_rollout_logprobs": "the scores would be of the inference engine",
        "use_opd": "it adds to the advantages",
        "use_tis": "ConSPO has no importance weights",
    }
    for name, reason in wrong.items():
        if getattr(args, name, False):
            raise ValueError(f"--{name.replace('_', '-')}: {reason}")
    if getattr(args, "context_parallel_size", 1) != 1:
        raise ValueError("--context-parallel-size above 1: a rank's log-probabilities are then of parts of rollouts")
    if getattr(args, "rollout_top_p", 1.0) != 1.0:
        raise ValueError("--rollout-top-p below 1: log-probabilities would be of a renormalised distribution")
    if args.loss_type != "custom_loss" or not rollout_data.get("log_probs"):
        raise ValueError(
            "there are no log-probabilities before the step: slime computes them for --loss-type custom_loss"
        )
    sums, masks = rollout_data.get("rollout_mask_sums"), rollout_data["loss_masks"]
    if sums is not None and any(int(total) != int(mask.sum()) for total, mask in zip(sums, masks, strict=True)):
        raise ValueError("a rollout of several samples: each would have a score of its own, and their mean another")


def _objective(args: Any) -> Objective:
    steps = getattr(args, "conspo_margin_steps", None)
    margin: Margin = getattr(args, "conspo_margin", 0.0)
    if steps is not None:
        target, warmup = getattr(args, "conspo_margin", 0.01), getattr(args, "conspo_margin_warmup_ratio", 0.3)
        margin = CosineMargin(total_steps=steps, target=target, warmup_ratio=warmup)
    return Objective(getattr(args, "conspo_tau", 10.0), margin, getattr(args, "conspo_reward_threshold", 0.5))


def _step(args: Any) -> int:
    """How many rollout batches were trained on before this one; slime calls once per batch."""
    step: int = getattr(args, "conspo_step", None) or getattr(args, "start_rollout_id", None) or 0
    args.conspo_step = step + 1
    return step


def _data_parallel_ranks() -> dist.ProcessGroup | None:
    if not dist.is_initialized():
        return None
    from megatron.core import mpu

    ranks: dist.ProcessGroup = mpu.get_data_parallel_group(with_context_parallel=False)
    return ranks


def _over_ranks(number: int, ranks: dist.ProcessGroup | None, device: torch.device) -> int:
    total = torch.tensor(number, device=device)
    if ranks is not None:
        dist.all_reduce(total, group=ranks)
    return int(total)
