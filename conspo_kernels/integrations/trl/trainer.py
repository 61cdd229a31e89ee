"""`ConSPOTrainer`: ConSPO on TRL's `GRPOTrainer`, with whole groups in every optimizer step.

TRL shuffles the rollouts of a group over micro-batches and ranks, while the loss of a group needs all of its scores. It
needs nothing else, so an optimizer step goes in two phases:

    generate -> rewards of all ranks -> scores of the step's rollouts, no graph -> weights dloss/dscores, once
    each micro-batch: sum_i weights[i] * score_i, whose gradient is that of the whole loss

The weights travel as one more column of TRL's batch. Both phases run on this library's ops, see `policy_head`, or on
TRL's own loss head.
"""

from __future__ import annotations

import functools
import os
from typing import Any

import torch
from torch import Tensor

from conspo_kernels import ConSPOWeights, CosineMargin, Parallel, conspo_weights, trust_region

from ..coefficients import masked_scores, numbers
from ..required import required
from .config import config_class
from .policy_head import PolicyHead, PolicyPass, policy_head

# What TRL hands to a model beside the tokens.
MODEL_COLUMNS = (
    "pixel_values", "image_grid_thw", "num_images", "pixel_attention_mask", "spatial_shapes", "num_tiles",
    "image_sizes", "token_type_ids", "mm_token_type_ids", "image_position_ids",
)  # fmt: skip

Rollouts = dict[str, Any]  # TRL's batch: columns by name

_Trainer: Any = object  # GRPOTrainer, which is not there before TRL is imported


class ConSPOSteps(_Trainer):
    """Policy optimization with ConSPO: what `ConSPOTrainer` changes in `GRPOTrainer`.

    Args:
        args: a `ConSPOConfig`, or None.
        Others: as `GRPOTrainer`. Rewards above `args.reward_threshold` mark right rollouts; a rollout for which every
            reward function returns None takes no part.

    Raises:
        TypeError: args is another config.
        ValueError: the model has a router's load-balancing loss, which is not part of this one; or it does not fit
            `loss_head="conspo"`.

    Cost: one forward pass more per optimizer step than GRPO has; none where TRL computes the old log-probabilities, or
        where the step is one micro-batch. GEMMs of the head per step: 1 + 3, with a frozen head 1 + 2.

    Source: arXiv:2605.12969.
    """

    _tag_names = ("trl", "conspo")
    _name = "ConSPO"
    _paper = {  # noqa: RUF012  as TRL has it
        "title": "Revisiting Reinforcement Learning with Verifiable Rewards from a Contrastive Perspective",
        "id": "2605.12969",
        "citation": "@misc{conspo, author = {Zhang and others}, year = 2026, eprint = {arXiv:2605.12969}}",
    }

    def __init__(self, model: Any, reward_funcs: Any = None, args: Any = None, *others: Any, **options: Any) -> None:
        if args is None:
            args = config_class()("ConSPO")
        if not isinstance(args, config_class()):
            raise TypeError(f"args must be a ConSPOConfig or None, got {type(args).__name__}")
        super().__init__(model, reward_funcs, args, *others, **options)
        if self.aux_loss_enabled:
            raise ValueError("the router's load-balancing loss is not supported: set router_aux_loss_coef=0.0")
        self._all_rewards: Tensor | None = None  # of all ranks, in rank order
        self._step_loss = torch.tensor(torch.nan)  # of the rollouts whose weights were computed last, per micro-batch
        data = torch.distributed.group.WORLD if self.accelerator.num_processes > 1 else None
        self._parallel = Parallel(data=data)
        self._entropy: Tensor | None = None  # of the tokens whose log-probabilities were taken last
        self._head: PolicyHead | None = policy_head(self.model, args, self.accelerator, self.temperature)

    # Generation: the columns that TRL's batch lacks.

    def _calculate_rewards(self, *arguments: Any, **options: Any) -> Tensor:
        per_function = super()._calculate_rewards(*arguments, **options)
        # As TRL sums them: a function that returned None for a rollout counts nothing, all of them: unscorable.
        rewards = (per_function * self.reward_weights.to(per_function.device)).nansum(dim=1)
        self._all_rewards = rewards.masked_fill(per_function.isnan().all(dim=1), torch.nan)
        return per_function

    def _generate_and_score_completions(self, inputs: list[Rollouts]) -> Rollouts:
        rollouts = super()._generate_and_score_completions(inputs)
        rows = len(rollouts["completion_ids"])
        start = self.accelerator.process_index * rows
        size = self.num_generations if self.model.training else self.num_generations_eval
        assert self._all_rewards is not None
        rollouts["conspo_rewards"] = self._all_rewards[start : start + rows]
        # The rows of all ranks, in rank order, are groups of `size` consecutive ones; ids are global.
        rollouts["conspo_groups"] = torch.arange(start, start + rows, device=self.accelerator.device) // size
        if (logprobs := rollouts.get("old_per_token_logps")) is not None:
            self._note(rollouts, logprobs)
        return rollouts

    def _generated_micro_batches(self, inputs: list[Rollouts]) -> list[Rollouts]:
        """New rollouts, shuffled as TRL does it, but within the optimizer step that they are for."""
        from trl.trainer import utils

        columns: Any = utils  # its types are narrower than what it takes
        count = self._micro_batches_weighed_at_once
        rollouts = columns.split_pixel_values_by_grid(self._generate_and_score_completions(inputs))
        return [
            columns.unsplit_pixel_values_by_grid(micro_batch)
            for step in columns.split_tensor_dict(rollouts, self.args.steps_per_generation // count)
            for micro_batch in columns.split_tensor_dict(columns.shuffle_sequence_dict(step), count)
        ]

    @property
    def _micro_batches_weighed_at_once(self) -> int:
        """Those of an optimizer step, or of a generation where a step has several."""
        return min(self.args.gradient_accumulation_steps, self.args.steps_per_generation)

    def _prepare_inputs(self, inputs: list[Rollouts]) -> Rollouts:
        if not self.model.training:
            return super()._prepare_inputs(inputs)
        generation, count = self.args.steps_per_generation, self._micro_batches_weighed_at_once
        new = self._step % (generation * self.num_iterations) == 0 or self._buffered_inputs is None
        if new:
            self._buffered_inputs: Any = self._generated_micro_batches(inputs)
        index = self._step % generation
        if count > 1 and index % count == 0:
            self._weigh(self._buffered_inputs[index : index + count], new)
        return self._buffered_inputs[index]

    # Between the phases: weights of all rollouts of an optimizer step, at its parameters.

    def _weigh(self, micro_batches: list[Rollouts], new: bool) -> None:
        """Adds the column conspo_weights, and those of `_note`.  new: the parameters are those that generated."""
        if not new or "conspo_scores" not in micro_batches[0]:
            self._first_pass(micro_batches)
        scores, rewards, groups = (
            torch.cat([it[f"conspo_{name}"] for it in micro_batches]) for name in ("scores", "rewards", "groups")
        )
        result = self._weights(scores, rewards, groups)
        self._step_loss = result.loss / len(micro_batches)
        for it, weights in zip(micro_batches, result.weights.chunk(len(micro_batches)), strict=True):
            it["conspo_weights"] = weights

    def _first_pass(self, micro_batches: list[Rollouts]) -> None:
        from trl.models.utils import disable_gradient_checkpointing

        with torch.no_grad(), disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs):
            for it in micro_batches:
                self._note(it, self._logprobs(self.model, it))

    def _note(self, rollouts: Rollouts, logprobs: Tensor) -> None:
        """Adds what the second phase needs of log-probabilities that were taken just now, without a graph."""
        mask = _response_mask(rollouts)
        rollouts["conspo_scores"] = masked_scores(logprobs, mask)
        assert self._entropy is not None
        rollouts["conspo_entropy"] = (self._entropy * mask).sum(dim=1)
        if self._bounded(rollouts):
            rollouts["conspo_logprobs"] = logprobs

    def _bounded(self, rollouts: Rollouts) -> bool:
        """Whether a trust region may stop a token: without older log-probabilities every ratio is 1."""
        return self.args.trust_region is not None and rollouts.get("old_per_token_logps") is not None

    def _weights(self, scores: Tensor, rewards: Tensor, groups: Tensor) -> ConSPOWeights:
        mode = "train" if self.model.training else "eval"
        num_groups = None
        if self.args.group_denominator == "all":
            num_groups = len(scores) * self.accelerator.num_processes / self.num_generations_eval
            if mode == "train":  # of the optimizer step, the last of an epoch may be shorter
                rows = self._train_batch_size * self.current_gradient_accumulation_steps
                num_groups = rows * self.accelerator.num_processes / self.num_generations
        schedule = CosineMargin(max(self.state.max_steps, 1), self.args.margin, self.args.margin_warmup_ratio)
        result = conspo_weights(
            scores,
            rewards,
            groups,
            tau=self.args.tau,
            margin=schedule(self.state.global_step),
            reward_threshold=self.args.reward_threshold,
            num_groups=num_groups,
            parallel=self._parallel,
            return_metrics=True,
        )
        for name, value in numbers(result.metrics).items():
            self._metrics[mode][name].append(value)
        return result

    # Phase 2.

    def _compute_loss(self, model: Any, inputs: Rollouts) -> Tensor:
        if inputs.get("conspo_weights") is None:  # the micro-batch has all rollouts of the step
            return self._loss_of_a_step(model, inputs)
        mask, weights = self._within_trust_region(inputs, inputs["conspo_weights"])
        self._log_tokens(inputs, inputs["conspo_weights"], mask)
        before = masked_scores(inputs["conspo_logprobs"], mask) if self._bounded(inputs) else inputs["conspo_scores"]
        if self._head is not None:
            known = self._head.weighted_scores(model, weights, before, mask, self._loss_scale())
            self._logprobs(known, inputs)
            weighted, drift = known.output.loss, known.output.metrics["conspo/score_drift"]
        else:
            scores = masked_scores(self._logprobs(model, inputs), mask)
            weighted = _weighted(weights, scores, mask, inputs)
            drift = torch.where(weights != 0, (scores.detach() - before).abs(), 0.0).max()
        self._metrics["train"]["conspo/score_drift"].append(self.accelerator.gather(drift).max().item())
        return _of_value(weighted, self._step_loss)

    def _loss_of_a_step(self, model: Any, inputs: Rollouts) -> Tensor:
        logprobs = self._logprobs(model, inputs)
        self._note(inputs, logprobs.detach())
        weights, loss, _ = self._weights(inputs["conspo_scores"], inputs["conspo_rewards"], inputs["conspo_groups"])
        mask, trusted = self._within_trust_region(inputs, weights)
        self._log_tokens(inputs, weights, mask)
        if self.model.training:
            self._metrics["train"]["conspo/score_drift"].append(0.0)  # the weights are of these very scores
        return _of_value(_weighted(trusted, masked_scores(logprobs, mask), mask, inputs), loss)

    def _within_trust_region(self, rollouts: Rollouts, weights: Tensor) -> tuple[Tensor, Tensor]:
        """The response mask without the tokens that a trust region stops, and weights of means over the others.

        Those have the coefficients that they had: w_i / n_i = (w_i * m_i / n_i) / m_i, where m_i tokens are left.
        """
        mask = _response_mask(rollouts)
        if not self._bounded(rollouts):
            return mask, weights
        counts = mask.sum(dim=1).clamp(min=1)
        coefficients = (weights / counts)[:, None] * mask
        logprobs, old = rollouts["conspo_logprobs"], rollouts["old_per_token_logps"].to(weights.dtype)
        kept = trust_region(coefficients, logprobs.to(weights.dtype), old, self.args.trust_region)
        mask = mask * ((coefficients == 0) | (kept != 0))
        return mask, weights * (mask.sum(dim=1) / counts)

    def _log_tokens(self, rollouts: Rollouts, weights: Tensor, mask: Tensor) -> None:
        """The mean entropy of response tokens; of those with a coefficient, the share that a trust region stopped."""
        response = _response_mask(rollouts)
        entropy, live = rollouts["conspo_entropy"].sum(), (weights != 0)[:, None]
        counts = [response.sum(), (response * live).sum(), ((response - mask) * live).sum()]
        sums = torch.stack([entropy, *(count.to(entropy) for count in counts)])
        total, number, pushed, stopped = self.accelerator.reduce(sums, reduction="sum").tolist()
        metrics = self._metrics["train" if self.model.training else "eval"]
        metrics["entropy"].append(total / max(number, 1.0))
        metrics["conspo/trust_region_fraction"].append(stopped / max(pushed, 1.0))

    def _loss_scale(self) -> float:
        """What fp16 multiplies the loss by in backward; that of the head is rounded before."""
        scaler = self.accelerator.scaler
        return float(scaler.get_scale()) if scaler is not None and scaler.is_enabled() else 1.0

    def _logprobs(self, model: Any, rollouts: Rollouts) -> Tensor:
        """Log-probabilities of the responses; their entropies are in `_entropy`."""
        logprobs: Tensor = self._get_per_token_logps_and_entropies(
            model,
            torch.cat([rollouts["prompt_ids"], rollouts["completion_ids"]], dim=1),
            torch.cat([rollouts["prompt_mask"], rollouts["completion_mask"]], dim=1),
            rollouts["completion_ids"].size(1),
            **{name: rollouts.get(name) for name in MODEL_COLUMNS},
        )[0]
        return logprobs

    def _get_per_token_logps_and_entropies(self, model: Any, *arguments: Any, **options: Any) -> tuple[Any, Any, Any]:
        """TRL's, which prepares the inputs of the model; in the model's place our pass through it."""
        if self._head is not None and not isinstance(model, PolicyPass):
            model = self._head.token_logprobs(model)
        options["compute_entropy"] = with_entropy = getattr(model, "has_entropy", True)
        result = super()._get_per_token_logps_and_entropies(model, *arguments, **options)
        self._entropy = result[1].detach() if with_entropy else None
        return result

    # Checkpoints: rollouts that are still to be trained on go with them.

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        if self._step % (self.args.steps_per_generation * self.num_iterations):
            folder = os.path.join(self._get_output_dir(trial=trial), f"checkpoint-{self.state.global_step}")
            path = os.path.join(folder, _rollouts_file(self.accelerator.process_index))
            torch.save({"step": self._step, "micro_batches": self._buffered_inputs}, path)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        path = os.path.join(checkpoint or "", _rollouts_file(self.accelerator.process_index))
        if checkpoint is not None and os.path.exists(path):
            saved = torch.load(path, map_location=self.accelerator.device, weights_only=True)
            self._step, self._buffered_inputs = saved["step"], saved["micro_batches"]


def _rollouts_file(rank: int) -> str:
    return f"conspo_rollouts_{rank}.pt"


def _response_mask(rollouts: Rollouts) -> Tensor:
    """[B, T], zero for padding and what a tool wrote."""
    mask: Tensor = rollouts["completion_mask"]
    return mask if rollouts.get("tool_mask") is None else mask * rollouts["tool_mask"]


def _weighted(weights: Tensor, scores: Tensor, mask: Tensor, rollouts: Rollouts) -> Tensor:
    """sum_i weights[i] * scores[i]. A score without tokens is NaN and takes no part, one of NaN logits shows."""
    scorable = mask.any(dim=1) & ~rollouts["conspo_rewards"].isnan()
    return torch.where(scorable, weights * scores, 0.0).sum()


def _of_value(weighted: Tensor, loss: Tensor) -> Tensor:
    """The gradient of the sum, the value of the loss."""
    return weighted + (loss - weighted).detach()


@functools.cache
def trainer_class() -> type:
    """`ConSPOTrainer`, made when it is first asked for: its base is TRL's."""

    class ConSPOTrainer(ConSPOSteps, required("trl").GRPOTrainer):  # type: ignore[misc]
        __doc__ = ConSPOSteps.__doc__

    ConSPOTrainer.__module__, ConSPOTrainer.__qualname__ = __package__, "ConSPOTrainer"
    return ConSPOTrainer
