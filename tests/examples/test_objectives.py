"""The objectives beside TRL's own code and the library's, and what each says of itself."""

from __future__ import annotations

import importlib.util
import sys
import types
from typing import Any

import policy_gradient
import pytest
import torch
from logprob_batch import LENGTH, Batch
from objectives import OBJECTIVES, coefficients, informative, rollout_means
from torch import Tensor

import conspo_kernels as ck

REQUIRED: dict[str, dict[str, Any]] = {"dr_grpo": {"max_length": LENGTH}}  # constants without a default


@pytest.mark.parametrize("filling", [-1e4, -torch.inf, torch.nan], ids=str)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_what_stands_under_the_mask_is_nothing(name: str, filling: float) -> None:
    """Ours are 0 there, an inference engine's old ones are what it likes: exp(0 - old) overflows."""
    batch = Batch(2, groups=4, size=8)
    others, constants = (batch.mask, batch.rewards, batch.size), REQUIRED.get(name, {})
    expected = coefficients(OBJECTIVES[name], batch.logprobs, batch.old, *others, **constants)
    old = batch.old.masked_fill(batch.mask == 0, filling)
    ours = batch.logprobs.masked_fill(batch.mask == 0, 0.0)
    result = coefficients(OBJECTIVES[name], ours, old, *others, **constants)
    for value, exact in zip(result, expected, strict=True):
        torch.testing.assert_close(value, exact, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("loss", [policy_gradient.grpo, policy_gradient.dapo, policy_gradient.cispo])
def test_the_recipe_with_what_an_engine_has_under_the_mask(loss: Any) -> None:
    hidden, weight = torch.randn(4, 6, 8, requires_grad=True), torch.randn(31, 8, requires_grad=True)
    labels, mask = torch.randint(31, (4, 6)), torch.arange(6).expand(4, 6) < torch.tensor([6, 2, 4, 1])[:, None]
    results = []
    for filling in (0.0, -1e4, torch.nan):
        hidden.grad = weight.grad = None
        old = torch.full((4, 6), -3.0).masked_fill(~mask, filling)
        value = policy_gradient.step(loss, hidden, weight, labels, mask, old, torch.tensor([1.0, -1.0, 0.5, -0.5]))
        results.append((torch.tensor(value), hidden.grad, weight.grad))
    for other in results[1:]:
        for x, exact in zip(other, results[0], strict=True):
            torch.testing.assert_close(x, exact, rtol=0, atol=0)


def test_on_policy_grpo_is_reinforce_on_scores() -> None:
    """Where the ratio is 1 GRPO's gradient is that of -mean_i A_i s_i, s_i the mean log-probability."""
    batch = Batch(1, groups=20, size=8)
    batch.old = batch.logprobs

    def reinforce(logprobs: Tensor, old: Tensor, mask: Tensor, rewards: Tensor, size: int) -> Tensor:
        r = rewards.view(-1, size)
        advantage = ((r - r.mean(1, keepdim=True)) / (r.std(1, keepdim=True) + 1e-4)).flatten()
        return -(advantage * rollout_means(logprobs, mask)).mean()

    torch.testing.assert_close(batch.gradient(OBJECTIVES["grpo"]), batch.gradient(reinforce), rtol=1e-12, atol=1e-16)


def test_conspo_is_the_library_s() -> None:
    batch = Batch(2, groups=6, size=4)
    logits = torch.randn(24, 7, 11, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(11, (24, 7))
    constants = {"tau": 0.3, "margin": 0.2}
    loss = ck.conspo_loss(logits, labels, batch.rewards, 4, response_mask=batch.mask, **constants)
    (exact,) = torch.autograd.grad(loss, logits)
    with torch.no_grad():
        logprobs = ck.token_logprobs(logits, labels, response_mask=batch.mask)
    value, c = coefficients(OBJECTIVES["conspo"], logprobs, logprobs, batch.mask, batch.rewards, 4, **constants)
    carried = ck.weighted_logprob_loss(logits, labels, c, response_mask=batch.mask)
    torch.testing.assert_close(torch.autograd.grad(carried, logits)[0], exact, rtol=1e-11, atol=1e-15)
    torch.testing.assert_close(value, loss.detach(), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_groups_without_a_contrast_have_no_gradient(name: str) -> None:
    batch = Batch(3, groups=8, size=4)
    batch.old = batch.logprobs  # DisCO's penalty on the divergence has a gradient elsewhere
    batch.rewards[:4], batch.rewards[4:8] = 1.0, 0.0
    gradient = batch.gradient(OBJECTIVES[name], **REQUIRED.get(name, {}))
    assert not gradient[:8].any()
    assert gradient[8:].any()
    assert not gradient[batch.mask == 0].any()


def test_dynamic_sampling_counts_informative_tokens_only() -> None:
    batch = Batch(4, groups=8, size=4)
    batch.rewards[:4] = 1.0
    kept = informative(batch.rewards, 4)
    assert not kept[:4].any()
    ratio = batch.gradient(OBJECTIVES["dapo"], dynamic_sampling=True) / batch.gradient(OBJECTIVES["dapo"])
    expected = batch.mask.sum() / batch.mask[kept].sum()
    torch.testing.assert_close(ratio[ratio.isfinite()], expected.expand(int(ratio.isfinite().sum())), rtol=1e-9, atol=0)


def test_disco_s_constraint() -> None:
    """Where the mean divergence exceeds delta, and only there, its penalty has the gradient beta (KL - delta) dKL."""
    batch = Batch(5, groups=8, size=4)
    batch.old = batch.logprobs + 0.1
    free = batch.gradient(OBJECTIVES["disco"], beta=0.0)
    held = batch.gradient(OBJECTIVES["disco"], beta=10.0, delta=0.02)
    each = -batch.mask / batch.mask.sum(1, keepdim=True) / len(batch.mask)
    torch.testing.assert_close(held - free, 10 * 0.08 * each, rtol=1e-9, atol=1e-15)
    torch.testing.assert_close(batch.gradient(OBJECTIVES["disco"], beta=10.0, delta=0.2), free, rtol=0, atol=0)


def test_dr_grpo_s_length_is_the_task_s() -> None:
    """It has to be named, and a token's coefficient is the same however wide the batch is padded."""
    batch = Batch(7, groups=8, size=4)
    narrow = batch.gradient(OBJECTIVES["dr_grpo"], max_length=32)
    for name in ("logprobs", "old", "mask"):
        setattr(batch, name, torch.nn.functional.pad(getattr(batch, name), (0, 5)))
    wide = batch.gradient(OBJECTIVES["dr_grpo"], max_length=32)
    torch.testing.assert_close(wide[:, :LENGTH], narrow, rtol=1e-12, atol=0)
    rewards = batch.rewards.view(-1, 4)
    advantage = (rewards - rewards.mean(1, keepdim=True)).flatten()
    batch.old = batch.logprobs
    on_policy = batch.gradient(OBJECTIVES["dr_grpo"], max_length=32)
    expected = -advantage[:, None] * batch.mask / (32 * len(batch.mask))
    torch.testing.assert_close(on_policy, expected, rtol=1e-12, atol=1e-16)
    with pytest.raises(TypeError, match="max_length"):
        batch.gradient(OBJECTIVES["dr_grpo"])


# TRL's own loss, called with what it reads of a trainer.

TRL_CONSTANTS: dict[str, dict[str, Any]] = {
    "grpo": {"epsilon_low": 0.2, "epsilon_high": 0.2},
    "dapo": {"epsilon_low": 0.2, "epsilon_high": 0.28},
    "dr_grpo": {"epsilon_low": 0.2, "epsilon_high": 0.2},
    "cispo": {"epsilon_low": 0.2, "epsilon_high": 5.0},
    "sapo": {"epsilon_low": 0.2, "epsilon_high": 0.2},
}


class TrainerOf(types.SimpleNamespace):
    """As much of TRL's GRPOTrainer as `_compute_loss` reads: anything else it asks for is off."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return None


def trl_gradient(name: str, batch: Batch) -> tuple[Tensor, Tensor]:
    """The loss and its gradient by the log-probabilities, by trl 1.16's `GRPOTrainer._compute_loss`."""
    from collections import defaultdict

    from trl.trainer.grpo_trainer import GRPOTrainer

    leaf = batch.logprobs.detach().requires_grad_()
    rewards = batch.rewards.view(-1, batch.size)
    advantage = rewards - rewards.mean(1, keepdim=True)
    if name != "dr_grpo":
        advantage = advantage / (rewards.std(1, keepdim=True) + 1e-4)
    count = len(batch.mask)
    trainer = TrainerOf(
        loss_type=name, beta=0.0, importance_sampling_level="token", top_entropy_quantile=1.0, use_vllm=False,
        max_completion_length=batch.mask.shape[1], current_gradient_accumulation_steps=1,
        model=torch.nn.Linear(1, 1), _entropy_bonus_enabled=False, tools=None,
        args=types.SimpleNamespace(
            delta=None, steps_per_generation=1, sapo_temperature_pos=1.0, sapo_temperature_neg=1.05,
            use_bias_correction_kl=False,
        ),
        accelerator=types.SimpleNamespace(num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x),
        _metrics={"train": defaultdict(list), "eval": defaultdict(list)},
        _get_per_token_logps_and_entropies=lambda *_, **__: (leaf, torch.zeros_like(leaf), None),
        **TRL_CONSTANTS[name],
    )  # fmt: skip
    inputs = {
        "prompt_ids": torch.zeros(count, 1, dtype=torch.long), "prompt_mask": torch.ones(count, 1, dtype=torch.long),
        "completion_ids": torch.zeros(batch.mask.shape, dtype=torch.long), "completion_mask": batch.mask,
        "advantages": advantage.flatten(), "old_per_token_logps": batch.old, "num_items_in_batch": batch.mask.sum(),
    }  # fmt: skip
    loss = GRPOTrainer._compute_loss(trainer, trainer.model, inputs)
    return loss.detach(), torch.autograd.grad(loss, leaf)[0]


@pytest.mark.leave_out(where=lambda name: sys.version_info < (3, 11))  # TRL 1.16 needs it
@pytest.mark.parametrize("name", TRL_CONSTANTS)
def test_equals_trl(name: str) -> None:
    if importlib.util.find_spec("trl") is None:
        pytest.skip("trl is not installed")
    batch = Batch(6, groups=50, size=8)
    value, gradient = coefficients(
        OBJECTIVES[name], batch.logprobs, batch.old, batch.mask, batch.rewards, batch.size, **REQUIRED.get(name, {})
    )
    exact_value, exact = trl_gradient(name, batch)
    assert (value - exact_value).abs() <= 1e-6 * exact_value.abs()
    assert (gradient - exact).abs().max() <= 1e-6 * exact.abs().max()
