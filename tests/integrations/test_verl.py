"""ConSPO for verl, without verl: its tensors and signatures, and its loss head's function, held against eager PyTorch.

Not the real package, which brings 0.6 GB of others: `integration_tests/test_real_verl.py` runs verl's own code.
"""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch
from framework_batch import MARGIN, TAU, TOLERANCE, FrameworkBatch, relative

from conspo_kernels import CosineMargin
from conspo_kernels.integrations.coefficients import Objective
from conspo_kernels.integrations.verl import advantage_estimator, fused_loss_head, policy_loss, register
from conspo_kernels.integrations.verl_head import linear_cross_entropy

UNMOVED = {
    "actor/ppo_kl": 0.0, "conspo/score_drift": 0.0, "conspo/weight_drift": 0.0, "conspo/trust_region_fraction": 0.0,
}  # fmt: skip
UIDS = ["a", "b", "c", "d"] * 4


def estimated(batch: FrameworkBatch, objective: Objective | None = None, **options):
    """A call as verl's `compute_advantage` makes it, with the log-probabilities beside."""
    token_rewards = torch.zeros(batch.ROLLOUTS, batch.RESPONSE)
    token_rewards[torch.arange(batch.ROLLOUTS), batch.lengths - 1] = batch.rewards
    given = {
        "token_level_rewards": token_rewards, "response_mask": batch.mask.long(), "config": {}, "index": UIDS,
        "old_log_probs": batch.response_logprobs().detach(),
    }  # fmt: skip
    estimate = advantage_estimator(objective or Objective(TAU, MARGIN))
    advantages, returns = estimate(**{**given, **options})
    assert returns is advantages
    return advantages


def config(ranks: int = 1, mini_batch: int | None = 16) -> SimpleNamespace:
    return SimpleNamespace(global_batch_info={"dp_size": ranks, "global_batch_size": mini_batch})


@pytest.mark.parametrize(("ranks", "per_micro_batch"), [(1, 16), (2, 2), (4, 1)])
def test_gradient_of_a_step(ranks, per_micro_batch):
    batch = FrameworkBatch()
    advantages, old = estimated(batch), batch.response_logprobs().detach()
    for rank in range(ranks):
        for rows in torch.arange(16)[rank::ranks].split(per_micro_batch):
            loss, metrics = policy_loss(
                old[rows], batch.response_logprobs()[rows], advantages[rows], batch.mask[rows], "token-mean",
                config(ranks), None,
            )  # fmt: skip
            loss.backward()
            assert metrics == UNMOVED
    assert relative(batch.accumulated() / ranks, batch.gradient()) < TOLERANCE  # FSDP averages over ranks


def test_rollout_without_a_token_and_nan_where_masked():
    batch = FrameworkBatch()
    batch.mask[15] = False  # verl's padding
    old = batch.response_logprobs().detach().masked_fill(~batch.mask, torch.nan)
    advantages = estimated(batch, old_log_probs=old)
    logp = batch.response_logprobs().masked_fill(~batch.mask, -torch.inf)
    loss, metrics = policy_loss(old, logp, advantages, batch.mask, config=config())
    assert torch.isfinite(loss)
    assert metrics == UNMOVED
    loss.backward()
    assert relative(batch.accumulated(), batch.gradient()) < TOLERANCE


def test_margin_of_a_step_and_metrics():
    batch, seen = FrameworkBatch(), []
    schedule = CosineMargin(target=0.8, warmup_ratio=1.0, total_steps=10)
    estimate = advantage_estimator(Objective(TAU, schedule), step=lambda: 5, on_step=lambda *what: seen.append(what))
    estimate(batch.rewards[:, None], batch.mask, UIDS, None, batch.response_logprobs())
    [(step, metrics)] = seen
    assert step == 5
    assert float(metrics["conspo/margin"]) == pytest.approx(0.4)
    assert float(metrics["conspo/loss"]) == pytest.approx(float(batch.loss(margin=0.4).detach()), rel=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"old_log_probs": None}, "old_log_probs"),
        ({"old_log_probs": torch.full((16, 6), torch.nan)}, "is NaN"),
        ({"index": None}, "no uid"),
        ({"config": {"use_kl_in_reward": True}}, "use_kl_in_reward"),
        ({"config": {"rollout_correction": {"bypass_mode": True}}}, "bypass_mode"),
        ({"objective": Objective(margin=CosineMargin(10))}, "margin is a schedule"),
    ],
)
def test_settings_that_would_be_wrong_raise_in_the_estimator(options, message):
    with pytest.raises(ValueError, match=message):
        estimated(FrameworkBatch(), **options)


@pytest.mark.parametrize(
    ("settings", "weights", "message"),
    [
        (None, None, "global_batch_size"),
        (config(mini_batch=None), None, "global_batch_size"),
        (config(), torch.ones(16, 6), "importance weights"),
    ],
)
def test_settings_that_would_be_wrong_raise_in_the_loss(settings, weights, message):
    x = torch.zeros(16, 6)
    with pytest.raises(ValueError, match=message):
        policy_loss(x, x, x, x.bool(), "token-mean", settings, weights)


@pytest.mark.parametrize("call", [register, fused_loss_head().__enter__])
def test_missing_or_old_verl_names_the_extra(call, monkeypatch):
    monkeypatch.setitem(sys.modules, "verl", None)
    with pytest.raises(ImportError, match=r"conspo-kernels\[verl\]"):
        call()


def test_old_verl_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "verl", SimpleNamespace(__version__="0.8.0"))
    with pytest.raises(ImportError, match=r"verl >= 0.9 is needed, got 0.8.0.*conspo-kernels\[verl\]"):
        register()


def eager_head(hidden, weight, labels, temperature):
    logits = hidden.flatten(0, -2) @ weight.T / temperature
    logp = logits.log_softmax(-1)
    return logp.gather(1, labels.flatten()[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


def head_inputs(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 5, 8, generator=generator, dtype=dtype).requires_grad_()
    weight = torch.randn(30, 8, generator=generator, dtype=dtype).requires_grad_()
    labels = torch.randint(30, (2, 5), generator=generator)
    coefficients = torch.randn(2, 10, generator=generator, dtype=dtype)
    return hidden, weight, labels, coefficients


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_head(reduction):
    hidden, weight, labels, (c, d) = head_inputs()
    values, gradients = [], []
    for head in (linear_cross_entropy, eager_head):
        if head is linear_cross_entropy:
            logp, entropy = head(hidden, weight, labels, 0.7, reduction)
        else:
            logp, entropy = head(hidden, weight, labels, 0.7)
            logp = {"none": logp, "sum": logp.sum(), "mean": logp.mean()}[reduction]
        total = (logp * c if reduction == "none" else logp).sum() + (entropy * d).sum()
        values.append((logp.detach(), entropy.detach()))
        gradients.append(torch.autograd.grad(total, (hidden, weight)))
    for result, expected in zip((*values[0], *gradients[0]), (*values[1], *gradients[1]), strict=True):
        torch.testing.assert_close(result, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_head_is_as_exact_as_verls(dtype, autocast):
    """The inputs of verl's own test of its head, and its tolerances; a logit in 16 bits would be off by 1e-2."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.rand(n, 2048, generator=generator).sub(0.5).to(dtype) for n in (48, 4032))
    labels = torch.randint(4032, (48,), generator=generator)
    exact = (hidden.double() @ weight.double().T / 1.5).log_softmax(-1)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logprobs, entropy = linear_cross_entropy(hidden.requires_grad_(), weight.requires_grad_(), labels, 1.5)
    expected = exact.gather(1, labels[:, None])[:, 0], -(exact.exp() * exact).sum(1)
    for result, value in zip((logprobs, entropy), expected, strict=True):
        torch.testing.assert_close(result.double(), value, atol=1e-4, rtol=0)
    (hidden_grad,) = torch.autograd.grad((logprobs * logprobs.detach()).sum(), hidden)
    coefficients = expected[0][:, None]
    by_hand = coefficients * (weight.detach().double()[labels] - exact.exp() @ weight.detach().double()) / 1.5
    torch.testing.assert_close(hidden_grad.double(), by_hand, atol=2e-2, rtol=4e-2)


@pytest.mark.parametrize("hidden", [torch.float32, torch.bfloat16], ids=str)
def test_head_under_autocast_with_operands_of_two_dtypes(hidden):
    """Of a final norm in fp32 and a weight in bf16, say: autocast gives them one."""
    weight = {torch.float32: torch.bfloat16, torch.bfloat16: torch.float32}[hidden]
    with torch.autocast("cpu", torch.bfloat16):
        logprobs, entropy = linear_cross_entropy(
            torch.randn(3, 8, dtype=hidden), torch.randn(5, 8, dtype=weight), torch.tensor([0, 1, 2])
        )
    assert logprobs.dtype == entropy.dtype == torch.float32


def test_head_of_another_reduction_raises():
    hidden, weight, labels, _ = head_inputs()
    with pytest.raises(ValueError, match="reduction"):
        linear_cross_entropy(hidden, weight, labels, 1.0, "max")
