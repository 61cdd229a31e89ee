"""ConSPO in OpenRLHF's own experience maker and normalisation. deepspeed and flash-attn, which need CUDA, are stubs."""

from __future__ import annotations

import inspect
from types import SimpleNamespace

import pytest
import torch
from conftest import stubs, without_init
from framework_batch import SETTINGS, TOLERANCE, FrameworkBatch, relative
from test_frameworks import micro_batches

CUDA_ONLY = ("deepspeed", "flash_attn", "flash_attn.bert_padding", "flash_attn.utils", "flash_attn.utils.distributed")
for name in ("openrlhf.models", "openrlhf.utils", "openrlhf.trainer", "openrlhf.trainer.ray"):
    without_init(name)
with stubs(*CUDA_ONLY, "openrlhf.trainer.ray.launcher"):
    from openrlhf.models.loss import PolicyLoss
    from openrlhf.trainer.ppo_utils.experience import Experience
    from openrlhf.trainer.ppo_utils.experience_maker import RemoteExperienceMaker
    from openrlhf.utils.loss_utils import iter_grad_accum_global_norm

from conspo_kernels.integrations.openrlhf import ConSPOPolicyLoss, experience_maker  # noqa: E402


def made(batch: FrameworkBatch, estimator: str) -> tuple[list[Experience], list[torch.Tensor]]:
    """Experiences with ConSPO's advantages, by OpenRLHF's method."""
    maker_class = experience_maker(RemoteExperienceMaker, **SETTINGS)
    maker = maker_class.__new__(maker_class)
    maker.advantage_estimator, maker.kl_ctl = estimator, SimpleNamespace(value=0.0)
    advantage = SimpleNamespace(estimator=estimator, gamma=1.0, lambd=1.0, no_std_norm=False, is_correction_level="off")
    args = SimpleNamespace(
        rollout=SimpleNamespace(n_samples_per_prompt=4),
        reward=SimpleNamespace(clip_range=None, overlong_buffer_len=None, stop_properly_penalty_coef=None),
        algo=SimpleNamespace(advantage=advantage, kl=SimpleNamespace(init_coef=0.0, use_loss=False)),
    )
    maker.strategy = SimpleNamespace(args=args)
    experiences, parts = [], list(micro_batches(1, 4))
    for rows in parts:
        width = int(batch.lengths[rows].max())
        mask = batch.mask[rows, :width]
        experiences.append(
            Experience(
                action_log_probs=batch.response_logprobs().detach()[rows, :width], action_mask=mask,
                rewards=batch.rewards[rows], index=(batch.groups[rows] * 4 + rows // 4).tolist(),
                kl=torch.zeros(mask.shape), info={"reward": batch.rewards[rows].clone()},
            )
        )  # fmt: skip
    return maker.compute_advantages_and_returns(experiences), parts


@pytest.mark.parametrize("accumulated", [1, 2, 4])
@pytest.mark.parametrize("estimator", ["group_norm", "reinforce_baseline", "rloo"])
def test_gradient_of_optimizer_steps(estimator, accumulated):
    """OpenRLHF's normalisers per optimizer step; DeepSpeed divides a loss by the accumulated ones.

    Four micro-batches in one step: the gradient is the batch's. Else the mean over steps is, at the same parameters.
    """
    batch = FrameworkBatch()
    experiences, parts = made(batch, estimator)
    data = list(zip(experiences, parts, strict=True))
    for (experience, rows), information in iter_grad_accum_global_norm(
        data, None, accumulated, lambda item: item[0].action_mask
    ):
        logprobs = batch.response_logprobs()[rows, : experience.action_mask.shape[1]]
        loss, *_ = ConSPOPolicyLoss()(
            logprobs, experience.action_log_probs, experience.advantages, action_mask=experience.action_mask,
            rollout_log_probs=experience.rollout_log_probs, **information,
        )  # fmt: skip
        (loss / accumulated).backward()
    steps = len(data) // accumulated
    assert relative(batch.accumulated() / steps, batch.gradient()) < TOLERANCE


def test_signature_is_openrlhfs():
    def names(function) -> list[tuple[str, object]]:
        return [(p.name, p.default) for p in inspect.signature(function).parameters.values()]

    assert names(ConSPOPolicyLoss.forward) == names(PolicyLoss.forward)
    batch = FrameworkBatch()
    [experience, *_], [rows, *_] = made(batch, "group_norm")
    arguments = [experience.action_log_probs, experience.action_log_probs, experience.advantages]
    for loss in (PolicyLoss(token_level_loss=False), ConSPOPolicyLoss()):
        assert len(loss(*arguments, action_mask=experience.action_mask, global_batch_size=4)) == 5
    assert len(rows) == 4
