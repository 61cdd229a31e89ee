"""ConSPO in SkyRL's own trainer methods, registries and tensors, on a CPU and without its workers."""

from __future__ import annotations

import inspect
import sys
import typing

import pytest
import torch
import typing_extensions
from framework_batch import SETTINGS, TOLERANCE, FrameworkBatch, relative
from test_frameworks import MICRO_BATCHES, micro_batches

if sys.version_info < (3, 12):  # what pydantic asks for there; SkyRL takes the other
    typing.TypedDict = typing_extensions.TypedDict  # type: ignore[misc]

from skyrl.backends.skyrl_train.training_batch import TrainingInputBatch
from skyrl.backends.skyrl_train.utils.ppo_utils import PolicyLossRegistry, ppo_policy_loss
from skyrl.train.config import GeneratorConfig, TrainerConfig
from skyrl.train.trainer import RayPPOTrainer

from conspo_kernels.integrations.skyrl import conspo_trainer, policy_loss


class Config:
    """The parts of SkyRL's configuration that its methods here read, of its own classes."""

    def __init__(self) -> None:
        self.trainer, self.generator = TrainerConfig(), GeneratorConfig()
        self.trainer.algorithm.policy_loss_type = "conspo"
        self.trainer.algorithm.use_kl_loss = False


def trainer_and_data(batch: FrameworkBatch):
    trainer_class = conspo_trainer(RayPPOTrainer, **SETTINGS)
    trainer = trainer_class.__new__(trainer_class)
    trainer.cfg, trainer.global_step, trainer.all_metrics = Config(), 1, {}
    rewards = torch.zeros(16, batch.RESPONSE)
    rewards[torch.arange(16), batch.lengths - 1] = batch.rewards
    data = TrainingInputBatch(
        {
            "sequences": batch.ids, "action_log_probs": batch.response_logprobs().detach(), "rewards": rewards,
            "loss_mask": batch.mask.long(), "response_mask": torch.ones(16, batch.RESPONSE, dtype=torch.int64),
            "values": None,
        }
    )  # fmt: skip
    data.metadata = {"uids": [f"prompt {group}" for group in batch.groups.tolist()], "avg_response_length": 4.0}
    return trainer, data


@pytest.mark.parametrize(("ranks", "rollouts"), MICRO_BATCHES)
@pytest.mark.parametrize("mini_batches", [1, 2])
def test_gradient_of_a_step(ranks, rollouts, mini_batches):
    batch = FrameworkBatch()
    trainer, data = trainer_and_data(batch)
    PolicyLossRegistry.register("conspo", policy_loss)
    try:
        loss_function = PolicyLossRegistry.get("conspo")
    finally:
        PolicyLossRegistry.unregister("conspo")
    size = 16 // mini_batches
    boundaries = [(start, start + size) for start in range(0, 16, size)]
    data = trainer._normalize_advantages(trainer.compute_advantages_and_returns(data), boundaries, None)
    for start, end in boundaries:
        for rows in micro_batches(ranks, rollouts, torch.arange(start, end)):
            loss, _ = loss_function(
                batch.response_logprobs()[rows], data["action_log_probs"][rows], data["advantages"][rows],
                config=trainer.cfg.trainer.algorithm, loss_mask=data["loss_mask"][rows], rollout_logprobs=None,
            )  # fmt: skip
            (loss * ranks).backward()  # worker.py: grad_sum_correction_factor
    assert relative(batch.accumulated() / ranks / mini_batches, batch.gradient()) < TOLERANCE
    assert {"loss/avg_final_rewards", "conspo/ordered_pairs", "conspo/score_std"} < trainer.all_metrics.keys()


def test_signature_is_skyrls():
    ours, theirs = (inspect.signature(function).parameters for function in (policy_loss, ppo_policy_loss))
    assert [name for name, it in ours.items() if it.kind is not it.KEYWORD_ONLY] == list(theirs)
    normalize = inspect.signature(conspo_trainer(RayPPOTrainer)._normalize_advantages).parameters
    assert list(normalize) == list(inspect.signature(RayPPOTrainer._normalize_advantages).parameters)
