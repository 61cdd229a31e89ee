"""`ConSPOConfig`: TRL's `GRPOConfig` with ConSPO's settings, and what of GRPO has no meaning for it."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field, fields
from typing import Any

from ..coefficients import check_trust_region
from ..required import required

# What GRPO's clipped ratios, advantages, KL and entropy terms read. ConSPO has none of them: it contrasts the scores of
# right rollouts with those of wrong ones, so a value that somebody chose would be ignored in silence.
NOT_OF_CONSPO = (
    "beta", "delta", "epsilon", "epsilon_high", "importance_sampling_level", "loss_type", "multi_objective_aggregation",
    "off_policy_mask_threshold", "sapo_temperature_neg", "sapo_temperature_pos", "scale_rewards", "entropy_coef",
    "top_entropy_quantile", "use_adaptive_entropy", "use_bias_correction_kl", "vespo_k_neg", "vespo_k_pos",
    "vespo_lambda_neg", "vespo_lambda_pos",
)  # fmt: skip

HEADS = ("auto", "conspo", "trl")

_Config: Any = object  # GRPOConfig, which is not there before TRL is imported


@dataclass
class ConSPOSettings(_Config):
    """The fields that `ConSPOConfig` adds to `GRPOConfig`, and those whose default is another one.

    Args:
        tau: temperature of the contrast, > 0, in nats per token. tau, margin and margin_warmup_ratio have the paper's
            values (its section 5.1).
        margin: the margin M at its end, in nats per token.
        margin_warmup_ratio: the fraction of training over which the margin rises from 0 to M, in [0, 1].
        reward_threshold: a rollout is right if its reward, the weighted sum over the reward functions, is above.
        group_denominator: "valid": the loss of a step is the mean over its groups with right and wrong rollouts;
            "all": the sum over them divided by the number of all groups.
        loss_head: what computes log-probabilities. "conspo": this library, from hidden states, or it raises; "trl":
            TRL's own; "auto": "conspo", or "trl" with a warning that says why.
        trust_region: a token's gradient stops where its ratio to the policy that sampled has left
            [1 - trust_region, 1 + trust_region] in the direction in which the gradient pushes it. None: never, as in
            the paper.

    Raises:
        ValueError: a setting is out of range, has no meaning for ConSPO, or would cut groups over optimizer steps.
    """

    tau: float = field(default=10.0, metadata={"help": "Temperature of the contrast between right and wrong rollouts."})
    margin: float = field(default=0.01, metadata={"help": "Margin at the end of its curriculum, in nats per token."})
    margin_warmup_ratio: float = field(
        default=0.3, metadata={"help": "Fraction of training over which the margin rises from 0, along half a cosine."}
    )
    reward_threshold: float = field(default=0.5, metadata={"help": "A rollout is right if its reward is above this."})
    group_denominator: str = field(
        default="valid",
        metadata={
            "help": "What the sum over groups is divided by: 'valid', those with right and wrong rollouts, or 'all'."
        },
    )
    loss_head: str = field(
        default="auto",
        metadata={
            "help": "What computes log-probabilities: 'conspo', this library from hidden states; 'trl', TRL's own; "
            "'auto', the first, or the second with a warning that says why."
        },
    )
    trust_region: float | None = field(
        default=None,
        metadata={
            "help": "A token's gradient stops where its ratio to the policy that sampled has left 1 by more than this, "
            "in the direction of the gradient. None: never, as in the paper."
        },
    )
    loss_type: str = field(default="conspo", metadata={"help": "ConSPO has one loss: leave this at 'conspo'."})
    disable_dropout: bool = field(
        default=True, metadata={"help": "Both passes over a rollout must be of one network: ConSPO needs True."}
    )
    vllm_importance_sampling_correction: bool = field(
        default=False, metadata={"help": "A ratio to the sampler's log-probabilities, which ConSPO does not have."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_values()
        self._check_grpo()
        self._check_steps()

    def _check_values(self) -> None:
        if not 0 < self.tau < math.inf:
            raise ValueError(f"tau must be positive and finite, got {self.tau}")
        if not math.isfinite(self.margin):
            raise ValueError(f"margin must be finite, got {self.margin}")
        if not 0 <= self.margin_warmup_ratio <= 1:
            raise ValueError(f"margin_warmup_ratio must be in [0, 1], got {self.margin_warmup_ratio}")
        if math.isnan(self.reward_threshold):
            raise ValueError("reward_threshold must not be NaN")
        if self.group_denominator not in ("valid", "all"):
            raise ValueError(f"group_denominator must be 'valid' or 'all', got {self.group_denominator!r}")
        if self.loss_head not in HEADS:
            raise ValueError(f"loss_head must be 'auto', 'conspo' or 'trl', got {self.loss_head!r}")
        check_trust_region(self.trust_region)

    def _check_grpo(self) -> None:
        defaults = {it.name: it.default for it in fields(self)}
        for name in NOT_OF_CONSPO:
            if getattr(self, name) != defaults[name]:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} has no meaning for ConSPO, which has no ratios, advantages, KL or "
                    f"entropy terms: leave it at {defaults[name]!r}"
                )
        if not self.disable_dropout:
            raise ValueError(
                "disable_dropout=False: a rollout's weight comes from its score in a first pass, which must be its "
                "score in the second one too; with dropout they are of different networks"
            )
        if self.use_vllm and self.vllm_importance_sampling_correction:
            raise ValueError(
                "vllm_importance_sampling_correction=True multiplies the loss by ratios to the sampler's "
                "log-probabilities; ConSPO's loss has none: set it to False"
            )
        if self.parallelism_config is not None and self.parallelism_config.tp_enabled:
            raise ValueError(
                "tensor parallelism is not supported: rewards and scores are gathered over all ranks, each with "
                "rollouts of its own"
            )

    def _check_steps(self) -> None:
        """No group is cut by an optimizer step, and a step's denominator is known before its first backward."""
        generation, accumulation = self.steps_per_generation, self.gradient_accumulation_steps
        if generation > accumulation:
            rows = self.per_device_train_batch_size * accumulation
            if generation % accumulation or rows % self.num_generations:
                raise ValueError(
                    f"rollouts generated for more than one optimizer step: steps_per_generation ({generation}) must be "
                    f"a multiple of gradient_accumulation_steps ({accumulation}), and per_device_train_batch_size * "
                    f"gradient_accumulation_steps ({rows}) of num_generations ({self.num_generations}), or groups "
                    "would be cut by an optimizer step"
                )
        elif generation < accumulation:
            if accumulation % generation or self.num_iterations > 1:
                raise ValueError(
                    f"several generations in one optimizer step: gradient_accumulation_steps ({accumulation}) must be "
                    f"a multiple of steps_per_generation ({generation}) and num_iterations ({self.num_iterations}) 1"
                )
            if self.group_denominator == "valid":
                raise ValueError(
                    f"several generations in one optimizer step (gradient_accumulation_steps {accumulation}, "
                    f"steps_per_generation {generation}): how many of its groups are valid is not known before the "
                    "last one. Set group_denominator='all', or steps_per_generation=gradient_accumulation_steps"
                )


@functools.cache
def config_class() -> type:
    """`ConSPOConfig`, made when it is first asked for: its base is TRL's."""

    @dataclass
    class ConSPOConfig(ConSPOSettings, required("trl").GRPOConfig):  # type: ignore[misc]
        __doc__ = ConSPOSettings.__doc__

    # Its public name, by which checkpoints pickle it.
    ConSPOConfig.__module__, ConSPOConfig.__qualname__ = __package__, "ConSPOConfig"
    return ConSPOConfig
