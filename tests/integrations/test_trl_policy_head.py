"""`ConSPOTrainer` on this library's ops: the gradient of the whole batch's loss, whatever the model does to logits."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_models
import torch
import trl
import trl_parts as parts
from torch import Tensor

from conspo_kernels.integrations.trl import policy_head

FOUR = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4}  # 16 rollouts, groups of 4
TOKENS = {"vocab_size": 14, "bos_token_id": None, "eos_token_id": 1, "tie_word_embeddings": False}


def architecture(name: str) -> Any:
    """Llama alone, or one that does something to its logits."""
    return parts.model() if name == "Llama" else tiny_models.tiny_model(name, **TOKENS)


def logits_gradient(trainer: Any, policy: Any, step: int = 0, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Of the loss of all rollouts of a generation, from the model's own logits at the parameters of a step."""
    policy.load_state_dict(trainer.recorder.parameters[step], strict=False)  # a tied head is no parameter of its own
    policy = policy.to(dtype)
    return parts.gradients_of(policy, parts.whole_loss(policy, trainer.generations[0:1], None))


@pytest.mark.parametrize("batch", [FOUR, {"per_device_train_batch_size": 16}], ids=["micro-batches", "one"])
@pytest.mark.parametrize("name", ["Llama", "Gemma2", "Cohere", "Granite"])
def test_a_step_has_the_gradient_of_the_models_own_logits(name: str, batch: dict[str, Any], tmp_path: Path) -> None:
    with parts.counted(trl.trainer.utils._ChunkedLogProbFunction, "apply") as calls:
        trainer = parts.trainer(tmp_path, architecture(name), loss_head="conspo", temperature=0.8, **batch)
        trainer.train()
    assert calls == [0]
    policy = architecture(name)  # in fp32: Gemma's masked rows are NaN in fp64
    policy.load_state_dict(trainer.recorder.parameters[0])
    loss = parts.whole_loss(policy, trainer.generations[:1], None, temperature=0.8)
    assert parts.difference(trainer.recorder.gradients[0], parts.gradients_of(policy, loss)) < 1e-6


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant: bool, tmp_path: Path) -> None:
    settings = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    trainer = parts.trainer(tmp_path, loss_head="conspo", **FOUR, **settings)
    trainer.train()
    assert parts.difference(trainer.recorder.gradients[0], logits_gradient(trainer, parts.model())) < 1e-6


# A head in fp32 over a model in bf16: `cast_lm_head_to_fp32`.
@pytest.mark.parametrize("fp32_head", [False, True])
def test_autocast_in_bf16_is_as_good_as_trls_head(fp32_head: bool, tmp_path: Path) -> None:
    errors = {}
    for head in ("conspo", "trl"):
        settings = {"bf16": True, "loss_head": head, "cast_lm_head_to_fp32": fp32_head}
        trainer = parts.trainer(tmp_path, **FOUR, **settings)
        trainer.train()
        errors[head] = parts.difference(trainer.recorder.gradients[0], logits_gradient(trainer, parts.model()))
    assert 1e-4 < errors["trl"] < 0.05  # 16 bits show
    assert errors["conspo"] <= 2 * errors["trl"]


def test_trls_own_head(tmp_path: Path) -> None:
    with parts.counted(trl.trainer.utils._ChunkedLogProbFunction, "apply") as calls:
        trainer = parts.trainer(tmp_path, loss_head="trl", **FOUR)
        trainer.train()
    assert calls == [8]
    assert parts.difference(trainer.recorder.gradients[0], logits_gradient(trainer, parts.model())) < 1e-6


# The passes over a model that a step has: 4 with a graph, and 4 without one where TRL has not computed them itself.
@pytest.mark.parametrize(
    ("settings", "free", "known"),
    [(FOUR | {"max_steps": 2}, 8, 8), ({"per_device_train_batch_size": 16, "max_steps": 2}, 2, 0),
     (FOUR | {"steps_per_generation": 8, "max_steps": 3}, 8 + 4 + 8, 12),
     (FOUR | {"num_iterations": 2, "max_steps": 3}, 4 + 4 + 4, 12)],
)  # fmt: skip
def test_passes_over_the_rollouts(settings: dict[str, Any], free: int, known: int, tmp_path: Path) -> None:
    with (
        parts.counted(policy_head, "linear_token_logprobs") as without,
        parts.counted(policy_head, "linear_weighted_score_loss") as weighted,
    ):
        parts.trainer(tmp_path, **settings).train()
    assert (without, weighted) == ([free], [known])


def test_entropy_is_that_of_trls_head(tmp_path: Path) -> None:
    logged = []
    for head in ("conspo", "trl"):
        trainer = parts.trainer(tmp_path, loss_head=head, **FOUR, num_iterations=2, max_steps=3)
        trainer.train()
        logged.append([row["entropy"] for row in trainer.state.log_history if "entropy" in row])
    assert logged[0] == pytest.approx(logged[1], rel=1e-5)
    assert len(logged[0]) == 3


class Scaler:
    """What Accelerate has for fp16, of which nothing here overflows."""

    def __init__(self, scale: float) -> None:
        self.scale = scale

    def get_scale(self) -> float:
        return self.scale

    def is_enabled(self) -> bool:
        return True

    def step(self, optimizer: Any, closure: Any = None) -> None:
        optimizer.step(closure)

    def update(self) -> None:
        pass


def test_a_loss_scale_changes_no_bit(tmp_path: Path) -> None:
    """fp16 multiplies the loss in backward, after the gradient was rounded: the weights are multiplied instead."""
    gradients = []
    for scale in (1.0, 2.0**16):
        trainer = parts.trainer(tmp_path, loss_head="conspo", **FOUR)
        trainer.accelerator.scaler = Scaler(scale)
        trainer.accelerator.backward = lambda loss, scale=scale, **_: (loss * scale).backward()
        with parts.counted(policy_head, "linear_weighted_score_loss") as calls:
            trainer.train()
        assert calls == [4]
        gradients.append({name: x / scale for name, x in trainer.recorder.gradients[0].items()})
    assert all(torch.equal(gradients[1][name], x) for name, x in gradients[0].items())


class Shifted(type(parts.model())):  # type: ignore[misc]
    """A model that does to its logits what its config does not say."""

    def forward(self, *arguments: Any, **options: Any) -> Any:
        output = super().forward(*arguments, **options)
        return output if output.logits is None else type(output)(logits=output.logits + 1e-2 * output.logits**2)


def shifted() -> Any:
    policy = parts.model()
    policy.__class__ = Shifted
    return policy


NOT_FITTING: dict[str, tuple[dict[str, Any], str]] = {
    "other logits": ({"policy": shifted}, "Shifted makes other logits than its config says"),
    "compiled": ({"torch_compile": True}, "torch_compile=True compiles the model's own forward"),
}


@pytest.mark.parametrize("name", NOT_FITTING)
def test_what_does_not_fit_takes_trls_head_and_says_why(name: str, tmp_path: Path) -> None:
    options, reason = NOT_FITTING[name]

    def trainer(**settings: Any) -> Any:
        made = {key: value() if key == "policy" else value for key, value in options.items()}
        return parts.trainer(tmp_path, **FOUR, **made, **settings)

    with pytest.warns(UserWarning, match="TRL's own loss head") as seen:
        assert trainer()._head is None
    warned = [str(it.message) for it in seen if "own loss head" in str(it.message)]
    assert len(warned) == 1
    assert reason in warned[0]
    with pytest.raises(ValueError, match=re.escape(f'loss_head="conspo" does not fit: {reason}')):
        trainer(loss_head="conspo")


@pytest.mark.parametrize(
    ("precision", "stage", "reason"),
    [("no", 3, "ZeRO-3 shards the weight"), ("fp16", 2, "DeepSpeed scales the loss in fp16"), ("bf16", 2, None)],
)
def test_deepspeed(precision: str, stage: int, reason: str | None) -> None:
    state = SimpleNamespace(deepspeed_plugin=SimpleNamespace(zero_stage=stage))
    accelerator = SimpleNamespace(state=state, mixed_precision=precision, num_processes=1, autocast=torch.no_grad)
    args = SimpleNamespace(loss_head="conspo", torch_compile=False, cast_lm_head_to_fp32=False)
    if reason is None:
        assert policy_head.policy_head(parts.model(), args, accelerator, 1.0) is not None
        return
    with pytest.raises(ValueError, match=reason):
        policy_head.policy_head(parts.model(), args, accelerator, 1.0)


def test_a_model_that_fits_is_not_warned_about(tmp_path: Path) -> None:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        assert parts.trainer(tmp_path, **FOUR)._head is not None
    assert not [it for it in seen if "loss head" in str(it.message)]


def test_a_tied_head_gets_the_gradients_of_both_of_its_uses(tmp_path: Path) -> None:
    policy = parts.model(tie_word_embeddings=True)
    trainer = parts.trainer(tmp_path, policy, loss_head="conspo", **FOUR)
    trainer.train()
    wanted = logits_gradient(trainer, parts.model(tie_word_embeddings=True))
    assert "lm_head.weight" not in trainer.recorder.parameters[0]
    assert parts.difference(trainer.recorder.gradients[0], wanted) < 1e-6
