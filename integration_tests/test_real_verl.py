"""ConSPO in verl's own code: its registries, `compute_advantage`, `ppo_loss` on its tensors, its model forwards."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
import verl
import verl.trainer.ppo.v1.utils
from framework_batch import MARGIN, TAU, TOLERANCE, FrameworkBatch, relative
from tensordict import TensorDict
from torch import Tensor
from verl import DataProto
from verl.models.transformers.dense_common import forward_with_torch_backend, forward_with_triton_backend
from verl.trainer.config import AlgoConfig
from verl.trainer.ppo import core_algos, ray_trainer
from verl.utils import tensordict_utils as tu
from verl.utils.kernel import linear_cross_entropy as head_module
from verl.utils.skip.skip_manager import SkipManager
from verl.utils.torch_functional import entropy_from_logits, logprobs_from_logits
from verl.workers.config import ActorConfig, PolicyLossConfig
from verl.workers.engine.utils import prepare_micro_batches
from verl.workers.utils.losses import ppo_loss

from conspo_kernels import CosineMargin, conspo_weights, token_logprobs
from conspo_kernels.integrations import support
from conspo_kernels.integrations.verl import fused_loss_head, register, replace_loss_head

UIDS = np.array(["a", "b", "c", "d"] * 4, dtype=object)


class Batch(FrameworkBatch):
    """The rollouts, as verl holds them. The last is padding, which verl adds: no response token."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        self.lengths[15] = 0
        self.mask[15] = False

    def proto(self) -> DataProto:
        token_rewards = torch.zeros(self.ROLLOUTS, self.RESPONSE)
        token_rewards[torch.arange(self.ROLLOUTS), self.lengths.clamp(min=1) - 1] = self.rewards
        tensors = {
            "token_level_rewards": token_rewards,
            "response_mask": self.mask.long(),
            "old_log_probs": self.response_logprobs().detach(),
        }
        return DataProto.from_dict(tensors=tensors, non_tensors={"uid": UIDS})


def nested(x: Tensor, lengths: Tensor) -> Tensor:
    return torch.nested.as_nested_tensor(
        [row[:n] for row, n in zip(x, lengths.tolist(), strict=True)], layout=torch.jagged
    )


def share_of_rank(batch: Batch, data: DataProto, rows: Tensor, ranks: int, mini_batch: int, **options) -> TensorDict:
    """A rank's share as verl's engines hold it: nested tensors, and the size of the whole mini-batch."""
    lengths = batch.lengths[rows].clamp(min=1)  # verl's padding has one response token, which is masked
    responses = {
        name: nested(data.batch[name][rows], lengths) for name in ("response_mask", "old_log_probs", "advantages")
    }
    return tu.get_tensordict(
        {
            "prompts": nested(batch.ids[rows, : batch.PROMPT], torch.full_like(rows, batch.PROMPT)),
            "responses": nested(batch.ids[rows, batch.PROMPT :], lengths),
            **responses,
        },
        non_tensor_dict={
            "dp_size": ranks, "batch_num_tokens": int(batch.mask.sum()), "global_batch_size": mini_batch, **options,
        },
    )  # fmt: skip


def actor_config(**options) -> ActorConfig:
    return ActorConfig(
        strategy="fsdp", rollout_n=4, ppo_micro_batch_size_per_gpu=2, policy_loss=PolicyLossConfig(loss_mode="conspo"),
        **options,
    )  # fmt: skip


def output_of_model(batch: Batch, rows: Tensor) -> dict[str, Tensor]:
    lengths = batch.lengths[rows].clamp(min=1) + batch.PROMPT
    return {"log_probs": nested(token_logprobs(batch.logits[rows], batch.ids[rows], shift=True), lengths)}


def verl_loss(batch: Batch, data: DataProto, rows: Tensor, config: ActorConfig, ranks: int, mini_batch: int):
    return ppo_loss(config, output_of_model(batch, rows), share_of_rank(batch, data, rows, ranks, mini_batch))


def verl_gradient(batch: Batch, data: DataProto, config: ActorConfig, ranks: int, per_micro_batch: int) -> Tensor:
    """The gradient that an optimizer step would see: summed over micro-batches, averaged over ranks as FSDP does."""
    batch.logits.grad = None
    for rank in range(ranks):
        rows = torch.arange(batch.ROLLOUTS)[rank::ranks]
        sizes = {"use_dynamic_bsz": False, "micro_batch_size_per_gpu": per_micro_batch}
        share = share_of_rank(batch, data, rows, ranks, batch.ROLLOUTS, **sizes)
        micro_batches, _ = prepare_micro_batches(share)
        for micro_batch, part in zip(micro_batches, rows.split(per_micro_batch), strict=True):
            loss, metrics = ppo_loss(config, output_of_model(batch, part), micro_batch)
            loss.backward()
            assert metrics["conspo/score_drift"].values == [0.0]
    return batch.accumulated() / ranks


@pytest.fixture(autouse=True)
def step():
    SkipManager.set_step(1)
    yield
    SkipManager.set_step(-1)


@pytest.mark.parametrize("loss_agg_mode", ["token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean"])
@pytest.mark.parametrize(("ranks", "per_micro_batch"), [(1, 16), (1, 4), (2, 2), (4, 1)])
def test_gradient_of_a_step(ranks, per_micro_batch, loss_agg_mode):
    batch = Batch()
    expected = batch.gradient()
    with register(tau=TAU, margin=MARGIN):
        data = ray_trainer.compute_advantage(batch.proto(), "conspo", config=AlgoConfig(adv_estimator="conspo"))
        result = verl_gradient(batch, data, actor_config(loss_agg_mode=loss_agg_mode), ranks, per_micro_batch)
    assert relative(result, expected) < TOLERANCE


def test_mini_batches_average_to_the_step():
    """Two mini-batches at the same parameters: the mean of their gradients is the whole batch's."""
    batch = Batch()
    expected = batch.gradient()
    with register(tau=TAU, margin=MARGIN):
        data = ray_trainer.compute_advantage(batch.proto(), "conspo", config=AlgoConfig())
        for rows in torch.arange(batch.ROLLOUTS).split(8):
            verl_loss(batch, data, rows, actor_config(), 1, 8)[0].backward()
    assert relative(batch.logits.grad / 2, expected) < TOLERANCE


def test_second_mini_batch_has_the_weights_of_the_first():
    batch = Batch()
    with register(tau=TAU, margin=MARGIN):
        data = ray_trainer.compute_advantage(batch.proto(), "conspo", config=AlgoConfig())
        old = batch.response_logprobs().detach()
        moved = batch.logits.detach() + torch.randn(batch.logits.shape, generator=torch.Generator().manual_seed(1))
        batch.logits = moved.requires_grad_()
        loss, metrics = verl_loss(batch, data, torch.arange(batch.ROLLOUTS), actor_config(), 1, batch.ROLLOUTS)
        loss.backward()
    counts = batch.mask.sum(1)
    scores = torch.where(batch.mask, old, 0.0).sum(1) / counts
    weights = conspo_weights(scores, batch.rewards, batch.groups, tau=TAU, margin=MARGIN).weights
    now = batch.response_logprobs()
    linear = (torch.where(batch.mask, now, 0.0).sum(1) / counts.clamp(min=1) * weights).sum()
    (expected,) = torch.autograd.grad(linear, batch.logits)
    assert relative(batch.logits.grad, expected) < TOLERANCE
    changes = torch.where(batch.mask, now.detach() - old, 0.0).sum(1)[counts > 0] / counts[counts > 0]
    assert metrics["conspo/score_drift"].values[0] == pytest.approx(float(changes.abs().max()), rel=1e-5)


def test_entropy_and_kl_terms_are_verls():
    batch = Batch()
    config = actor_config(use_kl_loss=True, kl_loss_coef=0.1, loss_agg_mode="token-mean")
    rows = torch.arange(batch.ROLLOUTS)
    with register(tau=TAU, margin=MARGIN):
        data = ray_trainer.compute_advantage(batch.proto(), "conspo", config=AlgoConfig())
        plain, _ = verl_loss(batch, data, rows, actor_config(), 1, batch.ROLLOUTS)
        micro = share_of_rank(batch, data, rows, 1, batch.ROLLOUTS)
        reference = data.batch["old_log_probs"] - 0.5
        micro["ref_log_prob"] = nested(reference, batch.lengths.clamp(min=1))
        loss, metrics = ppo_loss(config, output_of_model(batch, rows), micro)
    kl = float(np.exp(-0.5) - 1 + 0.5)  # low_var_kl of a difference that is 0.5 everywhere
    assert float((loss - plain).detach()) == pytest.approx(0.1 * kl, rel=1e-4)
    assert "kl_loss" in metrics


def test_margin_follows_the_step_and_metrics_are_handed_on():
    batch, seen = Batch(), []
    schedule = CosineMargin(target=0.8, warmup_ratio=1.0, total_steps=10)
    with register(tau=TAU, margin=schedule, on_step=lambda step, metrics: seen.append((step, metrics))):
        for step in (1, 6):
            SkipManager.set_step(step)
            data = ray_trainer.compute_advantage(batch.proto(), "conspo", config=AlgoConfig())
            expected = batch.gradient(margin=schedule(step - 1))
            assert relative(verl_gradient(batch, data, actor_config(), 2, 4), expected) < TOLERANCE
        assert [step for step, _ in seen] == [0, 5]
        assert float(seen[1][1]["conspo/margin"]) == pytest.approx(0.4)
        assert float(seen[1][1]["conspo/loss"]) == pytest.approx(float(batch.loss(margin=0.4).detach()), rel=1e-6)
        SkipManager.set_step(-1)
        with pytest.raises(ValueError, match="margin is a schedule"):
            ray_trainer.compute_advantage(batch.proto(), "conspo", config=AlgoConfig())


def test_a_trust_region_bounds_the_second_update():
    """Its share of stopped tokens is logged; none is stopped in the first update."""
    batch, rows = Batch(), torch.arange(16)
    with register(tau=TAU, margin=MARGIN, trust_region=0.2):
        data = ray_trainer.compute_advantage(batch.proto(), "conspo", config=AlgoConfig())
        _, first = verl_loss(batch, data, rows, actor_config(), 1, batch.ROLLOUTS)
        moved = batch.logits.detach() + torch.randn(batch.logits.shape, generator=torch.Generator().manual_seed(1))
        batch.logits = moved.requires_grad_()
        _, second = verl_loss(batch, data, rows, actor_config(), 1, batch.ROLLOUTS)
    assert first["conspo/trust_region_fraction"].values == [0.0]
    assert 0.0 < second["conspo/trust_region_fraction"].values[0] < 1.0


def test_metrics_are_in_verls_own():
    """Those of the batch, behind what `compute_data_metrics` computes for verl's logs."""
    batch = Batch()
    proto = batch.proto()
    proto.batch["token_level_scores"] = proto.batch["token_level_rewards"]
    proto.batch["prompts"], proto.batch["responses"] = batch.ids[:, : batch.PROMPT], batch.ids[:, batch.PROMPT :]
    proto.batch["attention_mask"] = torch.cat([torch.ones(16, batch.PROMPT).long(), batch.mask.long()], dim=1)
    with register(tau=TAU, margin=MARGIN):
        data = ray_trainer.compute_advantage(proto, "conspo", config=AlgoConfig())
        metrics = ray_trainer.compute_data_metrics(batch=data, use_critic=False)
        assert verl.trainer.ppo.v1.trainer_base.compute_data_metrics is ray_trainer.compute_data_metrics
    assert {"conspo/ordered_pairs", "conspo/score_std", "conspo/loss", "critic/score/mean"} < metrics.keys()
    assert metrics["conspo/loss"] == pytest.approx(float(batch.loss().detach()), rel=1e-6)
    assert "conspo/loss" not in ray_trainer.compute_data_metrics(batch=data, use_critic=False)


def test_trainer_of_this_release_goes_through_the_same_function():
    batch = Batch()
    keys = [f"{uid}_{row}_0" for row, uid in enumerate(UIDS)]
    with register(tau=TAU, margin=MARGIN):
        data = verl.trainer.ppo.v1.utils.compute_advantage_for_multi_trajectories(
            batch.proto(), keys, "conspo", config=AlgoConfig()
        )
        expected = batch.gradient()
        assert relative(verl_gradient(batch, data, actor_config(), 1, 4), expected) < TOLERANCE


def test_registration_undoes_itself():
    originals = ray_trainer.compute_advantage, verl.trainer.ppo.v1.utils.compute_advantage
    names = set(core_algos.ADV_ESTIMATOR_REGISTRY), set(core_algos.POLICY_LOSS_REGISTRY)
    registration = register()
    assert ray_trainer.compute_advantage is not originals[0]
    assert verl.trainer.ppo.v1.utils.compute_advantage is ray_trainer.compute_advantage
    with pytest.raises(ValueError, match="registered in verl already"):
        register()
    registration.undo()
    registration.undo()
    assert (ray_trainer.compute_advantage, verl.trainer.ppo.v1.utils.compute_advantage) == originals
    assert (set(core_algos.ADV_ESTIMATOR_REGISTRY), set(core_algos.POLICY_LOSS_REGISTRY)) == names


def test_other_estimators_are_untouched():
    batch = Batch()
    expected = ray_trainer.compute_advantage(batch.proto(), "rloo", config=AlgoConfig()).batch["advantages"]
    with register():
        result = ray_trainer.compute_advantage(batch.proto(), "rloo", config=AlgoConfig()).batch["advantages"]
    assert torch.equal(result, expected)


def test_batch_without_old_log_probs_raises():
    data = Batch().proto()
    data.pop(batch_keys=["old_log_probs"])
    with register(), pytest.raises(ValueError, match="old_log_probs"):
        ray_trainer.compute_advantage(data, "conspo", config=AlgoConfig())


def tiny_model():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def outputs_and_gradients(forward, model, ids):
    model.zero_grad()
    output = forward(model, input_ids=ids, return_dict=True, temperature=0.7)
    weight = torch.randn(output.log_probs.numel(), generator=torch.Generator().manual_seed(2))
    logp, entropy = output.log_probs.flatten(), output.entropy.flatten()
    ((logp * weight).sum() - 0.3 * (entropy * weight).sum()).backward()
    return [logp.detach(), entropy.detach(), *(parameter.grad.clone() for parameter in model.parameters())]


def test_loss_head_in_verls_forward():
    """verl's forward for its Triton head, here on a CPU, beside its PyTorch head: values, entropies, all gradients."""
    model, ids = tiny_model(), torch.randint(97, (1, 12), generator=torch.Generator().manual_seed(0))
    expected = outputs_and_gradients(forward_with_torch_backend, model, ids)
    with fused_loss_head():
        result = outputs_and_gradients(forward_with_triton_backend, model, ids)
    for x, reference in zip(result, expected, strict=True):
        assert relative(x, reference) < 2e-5


@pytest.mark.parametrize("seed", range(10))
def test_loss_head_at_the_tolerance_of_verls_own_test(seed):
    """bf16, uniform operands, temperature 1.5, beside verl's functions of fp32 logits, as tests/utils of verl has it.

    H is one of that test's, V is smaller; the tolerance of entropies is that of log-probabilities, verl's is wider.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(*size):
        return torch.rand(*size, generator=generator).sub(0.5).bfloat16().requires_grad_()

    hidden, weight = uniform(1, 64, 2048), uniform(4032, 2048)
    labels = torch.randint(4032, (1, 64), generator=generator)
    logits = hidden.squeeze(0).float() @ weight.float().T / 1.5
    expected = logprobs_from_logits(logits, labels.squeeze(0), inplace_backward=False), entropy_from_logits(logits)
    with fused_loss_head():
        result = head_module.linear_cross_entropy(hidden, weight, labels, 1.5)
    for x, reference in zip(result, expected, strict=True):
        torch.testing.assert_close(x, reference, atol=1e-3, rtol=2e-4)
    incoming = [torch.rand(64, generator=generator).sub(0.5) * scale for scale in (2, 1)]
    for x, reference in zip(
        torch.autograd.grad(result, (hidden, weight), incoming),
        torch.autograd.grad(expected, (hidden, weight), incoming),
        strict=True,
    ):
        torch.testing.assert_close(x, reference, atol=2e-2, rtol=4e-2)


def test_loss_head_undoes_itself():
    original = head_module.linear_cross_entropy
    holder = sys.modules["holder"] = type(sys)("holder")
    holder.linear_cross_entropy = original  # as verl's Megatron modules, which import the function by name
    try:
        with fused_loss_head():
            assert head_module.linear_cross_entropy is not original
            assert holder.linear_cross_entropy is head_module.linear_cross_entropy
            with pytest.raises(ValueError, match="replaced already"):
                replace_loss_head()
        assert head_module.linear_cross_entropy is original
        assert holder.linear_cross_entropy is original
    finally:
        del sys.modules["holder"]


def test_a_module_that_verl_imports_registers(tmp_path, monkeypatch):
    """verl's `external_lib` imports a module of the user's by name, in the trainer's process and in the workers'."""
    (tmp_path / "my_conspo.py").write_text(
        "from conspo_kernels.integrations.verl import register\nregistration = register(tau=0.5)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    verl.utils.import_utils.import_external_libs("my_conspo")
    try:
        assert {"conspo"} <= set(core_algos.POLICY_LOSS_REGISTRY) & set(core_algos.ADV_ESTIMATOR_REGISTRY)
    finally:
        sys.modules["my_conspo"].registration.undo()


def test_estimator_is_given_what_verl_gives():
    """The keyword arguments of this release's `compute_advantage`: a change there has to fail here."""
    seen: dict[str, object] = {}

    def probe(**options):
        seen.update(options)
        return options["response_mask"], options["response_mask"]

    core_algos.ADV_ESTIMATOR_REGISTRY["probe"] = probe
    try:
        ray_trainer.compute_advantage(Batch().proto(), "probe", config=AlgoConfig())
    finally:
        del core_algos.ADV_ESTIMATOR_REGISTRY["probe"]
    assert set(seen) == {"token_level_rewards", "response_mask", "config", "index"}


def test_this_version_is_supported():
    described = support.support("verl")
    assert (described["supported"], described["missing"]) == (True, {})
    assert described["versions"]["verl"] == verl.__version__ == described["tested"]
