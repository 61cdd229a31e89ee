"""ConSPO for slime, prime-rl, OpenRLHF, SkyRL and NeMo-RL: each framework's documented tensors and signatures.

None of the packages is installed for these tests. slime, prime-rl and NeMo-RL are on no package index; OpenRLHF and
SkyRL bring 0.6 GB, and `integration_tests` runs their own code. What the frameworks do between our functions (their
reductions, who divides by what) is written out below from the sources that each module names. Each test ends with one
statement: the gradient is the whole batch's.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace

import pytest
import torch
from framework_batch import MARGIN, SETTINGS, TAU, TOLERANCE, FrameworkBatch, relative
from torch import Tensor

from conspo_kernels import CosineMargin
from conspo_kernels.integrations import nemo_rl, openrlhf, prime_rl, skyrl, slime
from conspo_kernels.integrations.coefficients import Objective

MICRO_BATCHES = [(1, 16), (1, 4), (2, 2), (4, 1)]  # (ranks, rollouts of a micro-batch)


def micro_batches(ranks: int, rollouts: int, rows: Tensor | None = None) -> Iterator[Tensor]:
    """Rows of every micro-batch of every rank. Groups are in turns, so none lies in one."""
    rows = torch.arange(16) if rows is None else rows
    for rank in range(ranks):
        yield from rows[rank::ranks].split(rollouts)


BATCH_METRICS = {"conspo/ordered_pairs", "conspo/score_std", "conspo/score_gap", "conspo/loss"}

# NeMo-RL


def nemo_configs(**loss) -> tuple[dict, dict]:
    return dict(SETTINGS), {"disable_ppo_ratio": True, "token_level_loss": False, **loss}


def nemo_advantages(batch: FrameworkBatch, **options) -> Tensor:
    """As nemo_rl/algorithms/grpo.py calls: [B, S] of whole sequences, log-probabilities of the token at each place."""
    estimator = nemo_rl.ConSPOAdvantageEstimator(*nemo_configs())
    assert estimator.metrics == {}
    logprobs = torch.zeros(batch.ids.shape)
    logprobs[:, batch.PROMPT :] = batch.response_logprobs().detach()
    given = {
        "prompt_ids": torch.tensor([[5, 1], [5, 2], [6, 1], [7, 7]])[batch.groups], "rewards": batch.rewards,
        "mask": batch.full_mask.float(), "repeated_batch": {}, "logprobs_policy": logprobs, "logprobs_reference": None,
    }  # fmt: skip
    advantages = estimator.compute_advantage(**{**given, **options})
    assert estimator.metrics.keys() > BATCH_METRICS
    return advantages


def nemo_loss(batch: FrameworkBatch, advantages: Tensor, rows: Tensor, global_valid_seqs: float) -> Tensor:
    """ClippedPGLossFn with disable_ppo_ratio and without token_level_loss, written out."""
    logprobs = torch.zeros(batch.ids.shape)
    logprobs[:, batch.PROMPT :] = batch.response_logprobs()
    tokens, advantages = batch.full_mask[rows, 1:].float(), advantages[rows, 1:]
    clip_loss = torch.max(-advantages * logprobs[rows, 1:], -advantages * logprobs[rows, 1:])
    per_rollout = (clip_loss * tokens).sum(-1) / (tokens.sum(-1) + 1e-8)
    return per_rollout.sum() / global_valid_seqs


@pytest.mark.parametrize(("ranks", "rollouts"), MICRO_BATCHES)
def test_nemo_rl(ranks, rollouts):
    batch = FrameworkBatch()
    advantages = nemo_advantages(batch)
    for rows in micro_batches(ranks, rollouts):
        nemo_loss(batch, advantages, rows, 16.0).backward()
    assert relative(batch.accumulated(), batch.gradient()) < TOLERANCE


def test_nemo_rl_leaves_out_what_is_masked():
    batch = FrameworkBatch()
    valid = torch.ones(16)
    valid[0] = 0  # a right rollout of the first prompt
    advantages = nemo_advantages(batch, valid_mask=valid, mask=batch.full_mask * valid[:, None])
    nemo_loss(batch, advantages, torch.arange(1, 16), 15.0).backward()
    batch.rewards[0] = torch.nan
    assert relative(batch.accumulated(), batch.gradient()) < TOLERANCE


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        ({"disable_ppo_ratio": False}, "disable_ppo_ratio=True"),
        ({"token_level_loss": True}, "token_level_loss=False"),
        ({"use_importance_sampling_correction": True}, "importance"),
        ({"ratio_clip_c": 3.0}, "ratio_clip_c"),
    ],
)
def test_nemo_rl_settings_that_would_be_wrong_raise(loss, message):
    with pytest.raises(ValueError, match=message):
        nemo_rl.ConSPOAdvantageEstimator(*nemo_configs(**loss))
    with pytest.raises(ValueError, match="disable_ppo_ratio=True"):  # its own defaults
        nemo_rl.ConSPOAdvantageEstimator({}, SimpleNamespace())
    with pytest.raises(ValueError, match="logprobs_policy"):
        nemo_advantages(FrameworkBatch(), logprobs_policy=None)


# OpenRLHF


@dataclass
class Experience:
    """The fields of openrlhf/trainer/ppo_utils/experience.py that matter here."""

    action_log_probs: Tensor
    action_mask: Tensor
    rewards: Tensor
    index: list[int]
    advantages: Tensor | None = None
    returns: Tensor | None = None
    info: dict[str, Tensor] = field(default_factory=dict)


class RemoteExperienceMaker:
    """Calls as OpenRLHF's: shaped rewards, advantages of its own."""

    def __init__(self, **changed) -> None:
        kl = SimpleNamespace(init_coef=changed.get("init_coef", 0.0), use_loss=False)
        advantage = SimpleNamespace(is_correction_level=changed.get("is_correction_level", "off"))
        args = SimpleNamespace(
            algo=SimpleNamespace(kl=kl, advantage=advantage), rollout=SimpleNamespace(n_samples_per_prompt=4)
        )
        self.strategy = SimpleNamespace(args=args)

    def compute_advantages_and_returns(self, experiences):
        for experience in experiences:
            experience.rewards -= 0.5  # a penalty of length
            experience.advantages = experience.returns = experience.rewards[:, None] * experience.action_mask
        return experiences


def openrlhf_experiences(batch: FrameworkBatch) -> tuple[list[Experience], list[Tensor]]:
    """Of 4 rollouts each, as wide as their longest; index counts in the order in which prompts were repeated."""
    experiences, parts = [], list(micro_batches(1, 4))
    for rows in parts:
        width = int(batch.lengths[rows].max())
        logprobs = batch.response_logprobs().detach()[rows, :width]
        index = (batch.groups[rows] * 4 + rows // 4).tolist()
        experiences.append(Experience(logprobs, batch.mask[rows, :width], batch.rewards[rows], index))
    return experiences, parts


@pytest.mark.parametrize("accumulated", [1, 2, 4])
def test_openrlhf(accumulated):
    """4 ranks or fewer, DeepSpeed's accumulation of the rest: it divides each loss by their number."""
    batch, ranks = FrameworkBatch(), 4 // accumulated
    experiences, parts = openrlhf_experiences(batch)
    maker = openrlhf.experience_maker(RemoteExperienceMaker, **SETTINGS)()
    loss_function = openrlhf.ConSPOPolicyLoss(tau=TAU)
    for experience, rows in zip(maker.compute_advantages_and_returns(experiences), parts, strict=True):
        width = experience.action_mask.shape[1]
        loss, clip_ratio, kl, *rest = loss_function(
            batch.response_logprobs()[rows, :width], experience.action_log_probs, experience.advantages,
            action_mask=experience.action_mask, rollout_log_probs=None, dp_size=ranks,
            batch_num_tokens=torch.tensor(60.0), global_batch_size=torch.tensor(16.0 / accumulated),
        )  # fmt: skip
        (loss / accumulated).backward()
        assert experience.info.keys() > BATCH_METRICS
        assert experience.info["conspo/score_std"].shape == experience.rewards.shape
        assert (float(clip_ratio), float(kl), rest) == (0.0, 0.0, [None, None])
    assert relative(batch.accumulated() / ranks, batch.gradient()) < TOLERANCE


def test_openrlhf_rollout_without_a_token():
    batch = FrameworkBatch()
    batch.mask[15] = False
    experiences, parts = openrlhf_experiences(batch)
    openrlhf.conspo_advantages(experiences, [batch.rewards[rows] for rows in parts], 4, Objective(TAU, MARGIN))
    for experience, rows in zip(experiences, parts, strict=True):
        logprobs = batch.response_logprobs()[rows, : experience.action_mask.shape[1]]
        arguments = logprobs, experience.action_log_probs, experience.advantages, experience.action_mask
        openrlhf.ConSPOPolicyLoss()(*arguments, global_batch_size=15)[0].backward()
    assert relative(batch.accumulated(), batch.gradient()) < TOLERANCE


def test_openrlhf_settings_that_would_be_wrong_raise():
    maker = openrlhf.experience_maker(RemoteExperienceMaker)
    for changed in ({"init_coef": 0.01}, {"is_correction_level": "token"}):
        with pytest.raises(ValueError, match=next(iter(changed))):
            maker(**changed).compute_advantages_and_returns([])
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="global_batch_size"):
        openrlhf.ConSPOPolicyLoss()(x, x, x, x)


# SkyRL


class TrainingInputBatch(dict):
    """Tensors by name and metadata, as SkyRL's."""

    metadata: dict


class RayPPOTrainer:
    """What of SkyRL's trainer calls or is called: estimators without log-probabilities, reductions per mini-batch."""

    global_step = 1

    def __init__(self, **changed) -> None:
        algorithm = {
            "policy_loss_type": "conspo", "use_kl_in_reward": False, "advantage_batch_normalize": False,
            "step_wise_trajectories": False, **changed,
        }  # fmt: skip
        generator = SimpleNamespace(step_wise_trajectories=algorithm.pop("step_wise_trajectories"))
        self.all_metrics = {"reward/avg_raw_reward": 0.4}
        self.cfg = SimpleNamespace(trainer=SimpleNamespace(algorithm=SimpleNamespace(**algorithm)), generator=generator)

    def compute_advantages_and_returns(self, data):
        data["advantages"] = data["returns"] = data["rewards"] - 0.5
        return data

    def _normalize_advantages(self, data, mini_batch_boundaries, prompt_boundaries=None):
        raise AssertionError("its reductions divide by tokens")


def skyrl_data(batch: FrameworkBatch) -> TrainingInputBatch:
    rewards = torch.zeros(16, batch.RESPONSE)
    rewards[torch.arange(16), batch.lengths - 1] = batch.rewards
    data = TrainingInputBatch(
        action_log_probs=batch.response_logprobs().detach(), loss_mask=batch.mask.long(), rewards=rewards,
        response_mask=torch.ones_like(batch.mask),
    )  # fmt: skip
    data.metadata = {"uids": [f"prompt {group}" for group in batch.groups.tolist()]}
    return data


@pytest.mark.parametrize(("ranks", "rollouts"), MICRO_BATCHES)
@pytest.mark.parametrize("mini_batches", [1, 2])
def test_skyrl(ranks, rollouts, mini_batches):
    """SkyRL multiplies a policy loss by its ranks, over which gradients are averaged. Mini-batches: their mean."""
    batch = FrameworkBatch()
    trainer = skyrl.conspo_trainer(RayPPOTrainer, **SETTINGS)()
    data = trainer.compute_advantages_and_returns(skyrl_data(batch))
    size = 16 // mini_batches
    boundaries = [(start, start + size) for start in range(0, 16, size)]
    data = trainer._normalize_advantages(data, boundaries, None)
    assert trainer.all_metrics.keys() > BATCH_METRICS
    for start, end in boundaries:
        for rows in micro_batches(ranks, rollouts, torch.arange(start, end)):
            loss, metrics = skyrl.policy_loss(
                batch.response_logprobs()[rows], data["action_log_probs"][rows], data["advantages"][rows],
                config=trainer.cfg.trainer.algorithm, loss_mask=data["loss_mask"][rows], rollout_logprobs=None,
            )  # fmt: skip
            (loss * ranks).backward()
            assert metrics["conspo/score_drift"] == 0.0
    assert relative(batch.accumulated() / ranks / mini_batches, batch.gradient()) < TOLERANCE


@pytest.mark.parametrize(
    "changed",
    [
        {"policy_loss_type": "regular"},
        {"use_kl_in_reward": True},
        {"advantage_batch_normalize": True},
        {"step_wise_trajectories": True},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_skyrl_settings_that_would_be_wrong_raise(changed):
    with pytest.raises(ValueError, match=next(iter(changed))):
        skyrl.conspo_trainer(RayPPOTrainer)(**changed).compute_advantages_and_returns(skyrl_data(FrameworkBatch()))
    data = skyrl_data(FrameworkBatch())
    data["action_log_probs"] = None
    with pytest.raises(ValueError, match="action_log_probs"):
        skyrl.conspo_trainer(RayPPOTrainer)().compute_advantages_and_returns(data)


# slime


def slime_args(**changed) -> SimpleNamespace:
    settings = {
        "conspo_tau": TAU, "conspo_margin": MARGIN, "n_samples_per_prompt": 4, "loss_type": "custom_loss",
        "use_kl_loss": False, "entropy_coef": 0.0, "rewards_normalization": False, "context_parallel_size": 1,
    }  # fmt: skip
    return SimpleNamespace(**{**settings, **changed})


def slime_data(batch: FrameworkBatch, rows: Tensor) -> dict:
    """What slime's actor holds of a rank's rollouts: lists of tensors of response tokens."""
    lengths = batch.lengths.tolist()
    logprobs = batch.response_logprobs().detach()
    return {
        "log_probs": [logprobs[i, : lengths[i]] for i in rows.tolist()],
        "loss_masks": [batch.mask[i, : lengths[i]].int() for i in rows.tolist()],
        "rollout_mask_sums": [batch.mask[i].sum() for i in rows.tolist()],
        "rewards": batch.rewards[rows].tolist(),
        "sample_indices": (batch.groups * 4 + torch.arange(16) // 4)[rows].tolist(),
    }


def slime_modules(batch: FrameworkBatch) -> dict[str, ModuleType]:
    """slime's own log-probabilities of a micro-batch (which takes them from logits), by its signature."""

    def get_log_probs_and_entropy(
        logits, *, args, unconcat_tokens, total_lengths, response_lengths, with_entropy=False, **_
    ):
        logprobs, start = [], 0
        for tokens, total, response in zip(unconcat_tokens, total_lengths, response_lengths, strict=True):
            rows = logits[0, start : start + total].log_softmax(-1)[total - response - 1 : total - 1]
            logprobs.append(rows.gather(1, tokens[-response:, None])[:, 0])
            start += total
        return None, {"log_probs": logprobs, "entropy": [torch.zeros_like(x) for x in logprobs]}

    module = ModuleType("slime.backends.megatron_utils.loss")
    module.get_log_probs_and_entropy = get_log_probs_and_entropy
    packages = {name: ModuleType(name) for name in ("slime", "slime.backends", "slime.backends.megatron_utils")}
    return {**packages, module.__name__: module}


def slime_step(batch: FrameworkBatch, rows: Tensor, data: dict, per_micro_batch: int) -> None:
    """Backward of a rank's micro-batches: the loss is a sum of means of rollouts, over those of the whole step."""
    for part in torch.arange(len(rows)).split(per_micro_batch):
        lengths = batch.lengths[rows[part]].tolist()
        totals = [batch.PROMPT + n for n in lengths]
        masks = [data["loss_masks"][i] for i in part.tolist()]
        logits = torch.cat([batch.logits[i, :total] for i, total in zip(rows[part].tolist(), totals, strict=True)])
        micro = {
            "unconcat_tokens": [batch.ids[i, :n] for i, n in zip(rows[part].tolist(), totals, strict=True)],
            "total_lengths": totals, "response_lengths": lengths, "loss_masks": masks,
            "advantages": [data["advantages"][i] for i in part.tolist()],
            "log_probs": [data["log_probs"][i] for i in part.tolist()],
        }  # fmt: skip

        def sum_of_sample_mean(x: Tensor, lengths=lengths, masks=masks) -> Tensor:
            parts = zip(x.split(lengths), masks, strict=True)
            return sum((y * mask).sum() / mask.sum().clamp(min=1) for y, mask in parts)

        loss, logged = slime.policy_loss(slime_args(), micro, logits[None], sum_of_sample_mean)
        (loss / 16).backward()
        reused = {"conspo/score_drift", "conspo/weight_drift", "conspo/trust_region_fraction"}
        assert set(logged) == {"loss", "pg_loss", "entropy_loss", "ppo_kl", *reused}
        assert abs(float(logged["ppo_kl"])) < 1e-5


@pytest.mark.parametrize("per_micro_batch", [16, 4, 1])
def test_slime(per_micro_batch, monkeypatch):
    batch = FrameworkBatch()
    for name, module in slime_modules(batch).items():
        monkeypatch.setitem(sys.modules, name, module)
    data = slime_data(batch, torch.arange(16))
    slime.compute_advantages(slime_args(), data)
    slime_step(batch, torch.arange(16), data, per_micro_batch)
    assert relative(batch.accumulated(), batch.gradient()) < TOLERANCE


def test_slime_margin_follows_the_rollout_batches():
    schedule = {"conspo_margin_steps": 10, "conspo_margin_warmup_ratio": 1.0}
    batch, args = FrameworkBatch(), slime_args(conspo_margin=0.8, start_rollout_id=4, **schedule)
    result = []
    for step in (4, 5):
        data = slime_data(batch, torch.arange(16))
        slime.compute_advantages(args, data)
        result.append(torch.stack([x[0] for x in data["advantages"]]))
        margin = CosineMargin(target=0.8, warmup_ratio=1.0, total_steps=10)(step)
        expected = slime_data(batch, torch.arange(16))
        slime.compute_advantages(slime_args(conspo_margin=margin), expected)
        torch.testing.assert_close(result[-1], torch.stack([x[0] for x in expected["advantages"]]))
        assert data["conspo/margin"] == pytest.approx([margin] * 16)
    assert data.keys() > BATCH_METRICS
    assert not torch.equal(*result)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"rewards_normalization": True}, "disable-rewards-normalization"),
        ({"normalize_advantages": True}, "normalize-advantages"),
        ({"calculate_per_token_loss": True}, "calculate-per-token-loss"),
        ({"use_rollout_logprobs": True}, "use-rollout-logprobs"),
        ({"use_tis": True}, "use-tis"),
        ({"context_parallel_size": 2}, "context-parallel-size"),
        ({"loss_type": "policy_loss"}, "--loss-type custom_loss"),
    ],
)
def test_slime_settings_that_would_be_wrong_raise(changed, message):
    with pytest.raises(ValueError, match=message):
        slime.compute_advantages(slime_args(**changed), slime_data(FrameworkBatch(), torch.arange(16)))


def test_slime_rollouts_of_several_samples_and_kl_raise():
    data = slime_data(FrameworkBatch(), torch.arange(16))
    data["rollout_mask_sums"][2] = torch.tensor(99)
    with pytest.raises(ValueError, match="several samples"):
        slime.compute_advantages(slime_args(), data)
    with pytest.raises(ValueError, match="--use-kl-loss"):
        slime.policy_loss(slime_args(use_kl_loss=True), {}, torch.zeros(1, 1, 1), lambda x: x)


# prime-rl


@dataclass
class LossInputs:
    """One sequence of prime-rl's trainer, [seq] each (docs/algorithms.md)."""

    trainer_logprobs: Tensor
    inference_logprobs: Tensor
    ref_logprobs: Tensor | None
    advantages: Tensor
    loss_mask: Tensor
    loss_weights: Tensor | None


@dataclass
class LossOutputs:
    loss: Tensor
    metrics: dict[str, Tensor]


@pytest.fixture
def prime_rl_modules(monkeypatch):
    module = ModuleType("prime_rl.trainer.rl.loss")
    module.LossOutputs = LossOutputs
    for name in ("prime_rl", "prime_rl.trainer", "prime_rl.trainer.rl"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)


def prime_rl_gradient(batch: FrameworkBatch, inference: Tensor) -> tuple[Tensor, list[float]]:
    """Scored group by group, then one sequence after another; divided by the sum of all weights of the step."""
    streams: dict[int, prime_rl.TokenStream] = {}
    for group in range(4):
        rows = (batch.groups == group).nonzero()[:, 0].tolist()
        scored = prime_rl.group_streams(
            [inference[i, : batch.lengths[i]] for i in rows], [batch.mask[i, : batch.lengths[i]] for i in rows],
            batch.rewards[rows], **SETTINGS,
        )  # fmt: skip
        streams.update(zip(rows, scored, strict=True))
    total, drifts = sum(stream.rl_weights.sum() for stream in streams.values()), []
    for i, stream in streams.items():
        n = int(batch.lengths[i])
        mask = batch.mask[i, :n] & (stream.rl_weights != 0)
        logprobs = batch.response_logprobs()[i, :n]
        outputs = prime_rl.policy_loss(
            LossInputs(logprobs, inference[i, :n], None, stream.advantages, mask, stream.rl_weights)
        )
        (outputs.loss / total).backward()
        drifts.append(float(outputs.metrics["conspo/score_drift"]))
    return batch.accumulated(), drifts


def test_prime_rl_is_exact_where_the_engines_agree(prime_rl_modules):
    batch = FrameworkBatch()
    result, drifts = prime_rl_gradient(batch, batch.response_logprobs().detach())
    assert relative(result, batch.gradient()) < TOLERANCE
    assert max(drifts) == 0.0


def test_prime_rl_has_the_weights_of_the_inference_engine_where_they_do_not(prime_rl_modules):
    """Not ConSPO's gradient then: this says how far, and that the metric tells."""
    batch = FrameworkBatch()
    noise = 0.2 * torch.randn(16, batch.RESPONSE, generator=torch.Generator().manual_seed(3))
    result, drifts = prime_rl_gradient(batch, batch.response_logprobs().detach() + noise)
    assert 1e-3 < relative(result, batch.gradient()) < 0.2
    assert 0.01 < max(drifts) < 0.5


def test_prime_rl_without_weights_raises(prime_rl_modules):
    x = torch.zeros(3)
    with pytest.raises(ValueError, match="loss_weights"):
        prime_rl.policy_loss(LossInputs(x, x, None, x, x.bool(), None))
