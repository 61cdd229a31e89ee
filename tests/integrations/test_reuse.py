"""A batch that is used again: the trust region of every integration, what it logs, and how old weights may be."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from framework_batch import FrameworkBatch
from torch import Tensor

from conspo_kernels import conspo_weights, sequence_scores
from conspo_kernels.integrations import openrlhf, prime_rl, skyrl, slime, verl
from conspo_kernels.integrations.coefficients import (
    Objective,
    check_trust_region,
    linear_loss,
    mean_change,
    numbers,
    summed_loss,
    token_advantages,
)

EPSILON, TAU = 0.2, 0.4
NAMES = ("conspo/score_drift", "conspo/weight_drift", "conspo/trust_region_fraction")


class Reused(NamedTuple):
    """16 rollouts whose log-probabilities [16, 6] were `old` when the weights were computed, and are `now`."""

    now: Tensor
    old: Tensor
    advantages: Tensor
    mask: Tensor


Loss = Callable[[Reused, float | None, pytest.MonkeyPatch], tuple[Tensor, dict[str, Any]]]


def reused(moved: float = 0.3) -> Reused:
    batch = FrameworkBatch()
    old = batch.response_logprobs().detach()
    weights = Objective(TAU, 0.3).weights(old, batch.mask, batch.rewards, batch.groups).weights
    shift = moved * torch.randn(old.shape, generator=torch.Generator().manual_seed(1))
    return Reused((old + shift).requires_grad_(), old, token_advantages(weights, batch.mask, 1.0), batch.mask)


def verl_loss(it: Reused, epsilon: float | None, patch: pytest.MonkeyPatch) -> tuple[Tensor, dict[str, Any]]:
    config = SimpleNamespace(global_batch_info={"dp_size": 1, "global_batch_size": 16})
    options = {"config": config, "tau": TAU, "trust_region": epsilon}
    return verl.policy_loss(it.old, it.now, it.advantages, it.mask, **options)


def openrlhf_loss(it: Reused, epsilon: float | None, patch: pytest.MonkeyPatch) -> tuple[Tensor, dict[str, Any]]:
    class ActorPPOTrainer:
        def training_step(self) -> dict[str, Any]:
            loss, clipped, *_ = self.actor_loss_fn(it.now, it.old, it.advantages, it.mask, global_batch_size=16)
            return {"metrics": {"policy_loss": loss, "ppo_clip_ratio": clipped}, "weights": {"policy_loss": "token"}}

    status = openrlhf.actor_trainer(ActorPPOTrainer, tau=TAU, trust_region=epsilon)().training_step()
    loss, clipped = status["metrics"].pop("policy_loss"), status["metrics"].pop("ppo_clip_ratio")
    assert clipped == status["metrics"]["conspo/trust_region_fraction"]
    assert set(status["weights"]) == {"policy_loss", *NAMES}
    return loss, status["metrics"]


def skyrl_loss(it: Reused, epsilon: float | None, patch: pytest.MonkeyPatch) -> tuple[Tensor, dict[str, Any]]:
    loss, metrics = skyrl.policy_loss(
        it.now, it.old, it.advantages, None, it.mask.long(), tau=TAU, trust_region=epsilon
    )
    assert metrics.pop("clip_ratio") == metrics["conspo/trust_region_fraction"]
    return loss, metrics


def prime_rl_loss(it: Reused, epsilon: float | None, patch: pytest.MonkeyPatch) -> tuple[Tensor, dict[str, Any]]:
    module = ModuleType("prime_rl.trainer.rl.loss")
    module.LossOutputs = SimpleNamespace
    for name in ("prime_rl", "prime_rl.trainer", "prime_rl.trainer.rl"):
        patch.setitem(sys.modules, name, ModuleType(name))
    patch.setitem(sys.modules, module.__name__, module)
    outputs = []
    for now, old, advantages, mask in zip(*it, strict=True):
        inputs = SimpleNamespace(
            trainer_logprobs=now, inference_logprobs=old, advantages=advantages, loss_mask=mask,
            loss_weights=torch.ones_like(now),
        )  # fmt: skip
        outputs.append(prime_rl.policy_loss(inputs, tau=TAU, trust_region=epsilon))
    pushed = torch.tensor([int((a != 0).sum()) for a in it.advantages])
    shares = torch.stack([out.metrics["conspo/trust_region_fraction"] for out in outputs])
    metrics = {name: max(out.metrics[name] for out in outputs) for name in NAMES[:2]}
    metrics[NAMES[2]] = (shares * pushed).sum() / pushed.sum()
    return sum(out.loss for out in outputs), metrics


LOSSES: dict[str, Loss] = {
    "verl": verl_loss, "openrlhf": openrlhf_loss, "skyrl": skyrl_loss, "prime_rl": prime_rl_loss,
}  # fmt: skip


def gradient(loss: Loss, it: Reused, epsilon: float | None, patch: pytest.MonkeyPatch) -> tuple[Tensor, dict[str, Any]]:
    value, metrics = loss(it, epsilon, patch)
    values = {name: float(torch.as_tensor(value).detach()) for name, value in metrics.items()}
    return torch.autograd.grad(value, it.now)[0], values


def kept(it: Reused, coefficients: Tensor) -> tuple[Tensor, int]:
    """Token by token, by the definition: what is left of coefficients, and how many were stopped."""
    result, stopped = coefficients.clone(), 0
    for i in range(len(result)):
        for t in range(len(result[i])):
            c, ratio = float(coefficients[i, t]), math.exp(float(it.now[i, t].detach() - it.old[i, t]))
            if (c < 0 and ratio > 1 + EPSILON) or (c > 0 and ratio < 1 - EPSILON):
                result[i, t], stopped = 0.0, stopped + 1
    return result, stopped


@pytest.mark.parametrize("name", LOSSES)
def test_a_trust_region_stops_what_a_loop_stops(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    it = reused()
    free, before = gradient(LOSSES[name], it, None, monkeypatch)
    bounded, metrics = gradient(LOSSES[name], it, EPSILON, monkeypatch)
    expected, stopped = kept(it, free)
    pushed = int((free != 0).sum())
    assert 0 < stopped < pushed
    assert torch.equal(bounded, expected)
    assert metrics["conspo/trust_region_fraction"] == pytest.approx(stopped / pushed)
    assert before["conspo/trust_region_fraction"] == 0.0


@pytest.mark.parametrize("name", LOSSES)
def test_no_bit_changes_where_nothing_has_moved(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    it = reused(moved=0.0)
    free, _ = gradient(LOSSES[name], it, None, monkeypatch)
    bounded, metrics = gradient(LOSSES[name], it, EPSILON, monkeypatch)
    assert torch.equal(free.view(torch.int32), bounded.view(torch.int32))
    assert {name: metrics[name] for name in NAMES} == dict.fromkeys(NAMES, 0.0)


@pytest.mark.parametrize("epsilon", [None, EPSILON])
@pytest.mark.parametrize("name", LOSSES)
def test_nothing_under_the_mask_is_looked_at(name: str, epsilon: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    it = reused()
    expected, logged = gradient(LOSSES[name], it, epsilon, monkeypatch)
    now, old, advantages = (x.detach().masked_fill(~it.mask, math.nan) for x in it[:3])
    found, metrics = gradient(
        LOSSES[name], Reused(now.requires_grad_(), old, advantages, it.mask), epsilon, monkeypatch
    )
    assert torch.equal(found, expected)
    assert {key: metrics[key] for key in NAMES[:2]} == {key: logged[key] for key in NAMES[:2]}


@pytest.mark.parametrize("name", LOSSES)
def test_the_drift_of_scores_is_logged(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    it = reused()
    _, metrics = gradient(LOSSES[name], it, EPSILON, monkeypatch)
    labels = torch.zeros_like(it.mask, dtype=torch.int64)
    now, old = (sequence_scores(x.detach(), labels, response_mask=it.mask) for x in (it.now, it.old))
    drift = float((now - old).abs().max())
    assert metrics["conspo/score_drift"] == pytest.approx(drift, rel=1e-5)
    assert metrics["conspo/weight_drift"] == pytest.approx(drift / TAU, rel=1e-5)


def slime_loss(it: Reused, epsilon: float | None, patch: pytest.MonkeyPatch) -> tuple[Tensor, dict[str, Any]]:
    """A micro-batch of all rollouts; slime's own log-probabilities are those at hand."""
    lengths = it.mask.shape[1]
    module = ModuleType("slime.backends.megatron_utils.loss")
    parts = {"log_probs": list(it.now), "entropy": [torch.zeros_like(row) for row in it.now]}
    module.get_log_probs_and_entropy = lambda *_, **__: (None, parts)
    for name in ("slime", "slime.backends", "slime.backends.megatron_utils"):
        patch.setitem(sys.modules, name, ModuleType(name))
    patch.setitem(sys.modules, module.__name__, module)
    counts = it.mask.sum(1)
    micro = {
        "advantages": list(it.advantages * counts[:, None]), "log_probs": list(it.old),
        "loss_masks": list(it.mask.int()),
        "unconcat_tokens": [], "total_lengths": [], "response_lengths": [],
    }  # fmt: skip
    args = SimpleNamespace(use_kl_loss=False, entropy_coef=0.0, conspo_tau=TAU, conspo_trust_region=epsilon)

    def sum_of_sample_mean(x: Tensor) -> Tensor:
        return ((x.view(-1, lengths) * it.mask).sum(1) / counts).sum()

    return slime.policy_loss(args, micro, it.now, sum_of_sample_mean)


def test_slime(monkeypatch: pytest.MonkeyPatch) -> None:
    """It logs sums over rollouts, of which it makes means."""
    it = reused()
    free, _ = gradient(slime_loss, it, None, monkeypatch)
    bounded, metrics = gradient(slime_loss, it, EPSILON, monkeypatch)
    expected, stopped = kept(it, free)
    assert stopped > 0
    assert torch.equal(bounded, expected)
    counts = it.mask.sum(1)
    shares = ((free != expected) & it.mask).sum(1) / counts
    assert metrics["conspo/trust_region_fraction"] == pytest.approx(float(shares.sum()))
    changes = torch.where(it.mask, it.now.detach() - it.old, 0.0).sum(1) / counts
    assert metrics["conspo/score_drift"] == pytest.approx(float(changes.abs().sum()), rel=1e-5)
    assert metrics["conspo/weight_drift"] == pytest.approx(metrics["conspo/score_drift"] / TAU)
    still = reused(moved=0.0)
    unbounded, bounded = (gradient(slime_loss, still, epsilon, monkeypatch)[0] for epsilon in (None, EPSILON))
    assert torch.equal(unbounded.view(torch.int32), bounded.view(torch.int32))


@pytest.mark.parametrize("epsilon", [0.0, -0.1, math.inf, math.nan])
def test_what_is_no_trust_region_raises(epsilon: float) -> None:
    with pytest.raises(ValueError, match="trust_region must be positive and finite, or None"):
        check_trust_region(epsilon)
    with pytest.raises(ValueError, match="trust_region must be positive and finite, or None"):
        openrlhf.ConSPOPolicyLoss(trust_region=epsilon)


def test_the_mean_change_of_no_response_token_is_zero_where_the_others_are() -> None:
    x = torch.full((2, 3), torch.nan)
    assert mean_change(x, x, torch.zeros(2, 3)).item() == 0.0
    assert mean_change(*torch.empty(3, 2, 3, device="meta")).device.type == "meta"


@pytest.mark.parametrize("epsilon", [None, EPSILON])
def test_a_micro_batch_without_rollouts_has_a_loss_of_zero(epsilon: float | None) -> None:
    logprobs, others = torch.zeros(0, 3, requires_grad=True), torch.zeros(0, 3)
    loss, metrics = summed_loss(logprobs, others, others, others, epsilon=epsilon)
    loss.backward()
    assert loss.item() == 0.0
    assert set(numbers(metrics).values()) == {0.0}


def test_metrics_as_numbers() -> None:
    metrics = {"a": torch.tensor(0.1), "b": torch.tensor(0.1, dtype=torch.float64), "c": torch.tensor(3)}
    assert numbers(metrics) == {name: float(value) for name, value in metrics.items()}


def test_a_trust_region_needs_the_older_log_probabilities() -> None:
    it = reused()
    with pytest.raises(ValueError, match="needs old_logprobs"):
        linear_loss(it.now, it.advantages, None, EPSILON)


def stale_error(tau: float, seed: int) -> float:
    """Of a gradient whose weights are of scores that have since moved by up to 0.1 nats, relative to its length."""
    batch = FrameworkBatch(seed)
    labels = torch.zeros_like(batch.mask, dtype=torch.int64)
    now = sequence_scores(batch.response_logprobs(), labels, response_mask=batch.mask)
    drift = 0.2 * torch.rand(16, generator=torch.Generator().manual_seed(seed)) - 0.1
    gradients = []
    for scores in (now.detach() - drift, now.detach()):
        weights = conspo_weights(scores, batch.rewards, batch.groups, tau=tau, margin=0.01).weights
        gradients.append(torch.autograd.grad((now * weights).sum(), batch.logits, retain_graph=True)[0])
    return float((gradients[0] - gradients[1]).norm() / gradients[1].norm())


def test_a_stale_gradient_is_near_the_exact_one_where_tau_is_large() -> None:
    """Within 2 ds / tau: 2 % at the paper's tau = 10; at tau = 0.1 that says nothing, and the error is large."""
    assert max(stale_error(10.0, seed) for seed in range(20)) < 0.02
    assert max(stale_error(0.1, seed) for seed in range(20)) > 0.2
