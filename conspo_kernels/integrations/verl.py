"""ConSPO in verl: an advantage estimator and a policy loss in its registries, and its loss head on these kernels.

    from conspo_kernels.integrations.verl import register

    register(margin=CosineMargin(total_steps=400))            # in a module that verl imports in each of its processes

    actor_rollout_ref.model.external_lib=that_module  algorithm.adv_estimator=conspo
    actor_rollout_ref.actor.policy_loss.loss_mode=conspo

verl's policy loss sees neither rewards nor groups, and its advantage estimators no log-probabilities. The estimator
"conspo" is given the batch's `old_log_probs` beside what verl gives it (`compute_advantage` is wrapped for that), so it
knows all rollouts of the training batch on one process. Its advantages are ConSPO's coefficients per token, and the
loss "conspo" is linear in the log-probabilities. The first mini-batch of a step has ConSPO's gradient exactly. Later
ones have the weights of the step's beginning at the parameters of now: off by about ds / tau where scores have moved
by ds. They cannot be taken anew before each mini-batch: verl's trainer sorts rollouts by length over ranks and
mini-batches (`_balance_batch`, for which it has no switch), so a mini-batch holds parts of groups.

Source: verl 0.9.1, verl/trainer/ppo/core_algos.py (the registries, `agg_loss`), verl/trainer/ppo/ray_trainer.py
(`compute_advantage`), verl/workers/utils/losses.py (`ppo_loss`).
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import Tensor

from .coefficients import (
    Margin,
    Objective,
    check_trust_region,
    group_ids,
    mean_change,
    numbers,
    summed_loss,
    token_advantages,
)
from .replace import Replacement
from .required import required

NAME = "conspo"
OnStep = Callable[[int, Mapping[str, Tensor]], None]

_old_log_probs: ContextVar[Tensor | None] = ContextVar("old_log_probs", default=None)
_registered: Registration | None = None


def register(
    *,
    tau: float = 10.0,
    margin: Margin = 0.0,
    reward_threshold: float = 0.5,
    trust_region: float | None = None,
    on_step: OnStep | None = None,
) -> Registration:
    """Put ConSPO into verl's registries as "conspo", for `algorithm.adv_estimator` and `policy_loss.loss_mode`.

    Args:
        tau, reward_threshold: as `conspo_loss`. The reward of a rollout is the sum of its token-level rewards.
        margin: a number, or a schedule of verl's training step, counted from 0.
        trust_region: epsilon of `conspo_kernels.trust_region` around `old_log_probs`; None, as in the paper: none.
        on_step: called in the trainer's process with the step (-1 where no trainer has set one) and the metrics
            `conspo/...` of its whole batch.

    Returns:
        The registration, whose `undo()` takes everything out again; also a context manager that does. While it lasts,
        verl logs the metrics `conspo/...` of each batch with its own (`compute_data_metrics` is wrapped for that).

    Raises:
        ImportError: verl is missing or too old.
        ValueError: "conspo" is registered already.

    Cost: O(rollouts * tokens) on the CPU, once per step.
    """
    global _registered
    core = _verl("trainer.ppo.core_algos")
    if _registered is not None or NAME in core.ADV_ESTIMATOR_REGISTRY or NAME in core.POLICY_LOSS_REGISTRY:
        raise ValueError(f'"{NAME}" is registered in verl already: undo() that registration first')
    check_trust_region(trust_region)
    trainer = _verl("trainer.ppo.ray_trainer")
    advantage, metrics = trainer.compute_advantage, trainer.compute_data_metrics
    logged: dict[str, float] = {}

    def note(step: int, values: Mapping[str, Tensor]) -> None:
        logged.update(numbers(values))
        if on_step is not None:
            on_step(step, values)

    estimator = advantage_estimator(Objective(tau, margin, reward_threshold), step=_training_step, on_step=note)
    core.register_adv_est(NAME)(estimator)
    core.register_policy_loss(NAME)(functools.partial(policy_loss, tau=tau, trust_region=trust_region))
    pairs = [(advantage, _giving_old_log_probs(advantage)), (metrics, _with_metrics(metrics, logged))]
    _registered = Registration(pairs)
    return _registered


class Registration(Replacement):
    """What `register` did, to be undone."""

    def undo(self) -> None:
        """Take estimator and loss out of verl's registries and restore its functions. Twice does nothing."""
        global _registered
        if _registered is self:
            core = _verl("trainer.ppo.core_algos")
            core.ADV_ESTIMATOR_REGISTRY.pop(NAME)
            core.POLICY_LOSS_REGISTRY.pop(NAME)
            super().undo()
            _registered = None


def _giving_old_log_probs(compute_advantage: Callable[..., Any]) -> Callable[..., Any]:
    """verl's `compute_advantage`, with the batch's `old_log_probs` at hand for the estimator that it calls."""

    @functools.wraps(compute_advantage)
    def wrapped(data: Any, *arguments: Any, **options: Any) -> Any:
        token = _old_log_probs.set(data.batch.get("old_log_probs", None))
        try:
            return compute_advantage(data, *arguments, **options)
        finally:
            _old_log_probs.reset(token)

    return wrapped


def _with_metrics(compute_data_metrics: Callable[..., dict[str, Any]], logged: dict[str, float]) -> Callable[..., Any]:
    """verl's `compute_data_metrics`, and behind its metrics those of the batch whose advantages were computed last."""

    @functools.wraps(compute_data_metrics)
    def wrapped(*arguments: Any, **options: Any) -> dict[str, Any]:
        return {**compute_data_metrics(*arguments, **options), **logged}

    return wrapped


def advantage_estimator(
    objective: Objective, *, step: Callable[[], int | None] = lambda: None, on_step: OnStep | None = None
) -> Callable[..., tuple[Tensor, Tensor]]:
    """An advantage estimator in verl's signature: -B * w_i / n_i per response token, B the rollouts of the batch.

    A mean over B rollouts of the sum over tokens of -advantage * logp then has ConSPO's gradient.
    """

    def estimate(
        token_level_rewards: Tensor,
        response_mask: Tensor,
        index: Sequence[Any] | None = None,
        config: Any = None,
        old_log_probs: Tensor | None = None,
        **_: Any,
    ) -> tuple[Tensor, Tensor]:
        _check_algorithm(config, index)
        logprobs = _old_log_probs.get() if old_log_probs is None else old_log_probs
        if logprobs is None:
            raise ValueError(
                "the estimator needs the batch's old_log_probs: call conspo_kernels.integrations.verl.register() in "
                "the process of the trainer, and let the actor compute them"
            )
        assert index is not None
        now = step()
        result = objective.weights(
            logprobs, response_mask, token_level_rewards.sum(dim=-1), group_ids(list(index)), step=now
        )
        if on_step is not None:
            on_step(-1 if now is None else now, result.metrics)
        advantages = token_advantages(result.weights, response_mask, float(len(index)))
        return advantages, advantages

    return estimate


def _check_algorithm(config: Any, index: Any) -> None:
    """Settings of `algorithm` under which the weights would not be ConSPO's."""
    if index is None:
        raise ValueError("the batch has no uid: without it the groups of rollouts are not known")
    if config is None:
        return
    if config.get("use_kl_in_reward", False):
        raise ValueError(
            "algorithm.use_kl_in_reward=True: rewards that hold a KL penalty are no verdicts of right and wrong; "
            "use actor.use_kl_loss"
        )
    correction = config.get("rollout_correction", None)
    if correction is not None and correction.get("bypass_mode", False):
        raise ValueError(
            "algorithm.rollout_correction.bypass_mode=True: old_log_probs are then those of the inference engine, and "
            "the weights would not be of the actor's scores"
        )


def _training_step() -> int | None:
    """verl's step, counted from 0; None where no trainer has set it."""
    step = int(_verl("utils.skip.skip_manager").SkipManager.step)
    return step - 1 if step > 0 else None


def policy_loss(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
    *,
    tau: float = 10.0,
    trust_region: float | None = None,
) -> tuple[Tensor, dict[str, Any]]:
    """A policy loss in verl's signature: the mean over the mini-batch's rollouts of sum_t -advantage * logp.

    Args:
        old_log_prob, log_prob, advantages, response_mask: [b, T] of a micro-batch; advantages: `advantage_estimator`'s.
        loss_agg_mode: of entropy and KL terms, which verl adds; this loss has its own.
        config: the actor's, whose `global_batch_info` says what the mini-batch is over all ranks and micro-batches.
        rollout_is_weights: verl's importance weights; must be None.
        tau, trust_region: as `register`.

    Returns:
        The loss, and metrics: `actor/ppo_kl`, mean of old - new, and those of `summed_loss`. All are zero in the
        first mini-batch, where the gradient is exact.

    Raises:
        ValueError: importance weights are given, which ConSPO does not have; the size of the mini-batch is not given.

    Source: verl 0.9.1, verl/workers/utils/losses.py, `ppo_loss`.
    """
    del loss_agg_mode
    mini_batch = _checked_mini_batch(config, rollout_is_weights)
    summed, reused = summed_loss(log_prob, advantages, old_log_prob, response_mask, tau=tau, epsilon=trust_region)
    # As verl's "seq-mean-token-sum": FSDP and DDP average over the data-parallel ranks, hence the factor.
    loss = summed * mini_batch.get("dp_size", 1) / mini_batch["global_batch_size"]
    return loss, numbers({"actor/ppo_kl": mean_change(log_prob, old_log_prob, response_mask), **reused})


def _checked_mini_batch(config: Any, rollout_is_weights: Tensor | None) -> dict[str, Any]:
    if rollout_is_weights is not None:
        raise ValueError(
            "rollout_is_weights: ConSPO has no importance weights; set algorithm.rollout_correction.rollout_is=null"
        )
    information = dict(config.global_batch_info) if config is not None else {}
    if information.get("global_batch_size") is None:
        raise ValueError(
            "config.global_batch_info has no global_batch_size: without it the mean over a mini-batch would be one "
            "over a micro-batch"
        )
    return information


@contextmanager
def fused_loss_head() -> Iterator[None]:
    """verl's `linear_cross_entropy` on these kernels, until the block ends.

    verl uses it with `model.use_fused_kernels=True` and `fused_kernel_options.impl_backend=triton`.

    Raises:
        ImportError: verl is missing or too old.
    """
    with replace_loss_head():
        yield


def replace_loss_head() -> Replacement:
    """`fused_loss_head` without a block, for a module that verl imports; its `undo()` restores verl's own."""
    from .verl_head import linear_cross_entropy

    original = _verl("utils.kernel.linear_cross_entropy").linear_cross_entropy
    if getattr(original, "__wrapped__", None) is linear_cross_entropy:
        raise ValueError("verl's loss head is replaced already: undo() that first")

    # A function of its own: who imported ours from its own module keeps it when this is undone.
    @functools.wraps(linear_cross_entropy)
    def in_its_place(*arguments: Any, **options: Any) -> tuple[Tensor, Tensor]:
        return linear_cross_entropy(*arguments, **options)

    return Replacement([(original, in_its_place)])


def _verl(name: str) -> Any:
    """A module of verl's, checked for its version."""
    required("verl")
    return importlib.import_module(f"verl.{name}")
