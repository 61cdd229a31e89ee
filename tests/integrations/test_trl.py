"""`ConSPOTrainer` in the real TRL, on the CPU: its steps have the gradient of the whole batch's `conspo_loss`."""

from __future__ import annotations

import functools
import math
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import ranks
import torch
import trl
import trl_parts as parts
from torch import Tensor

import conspo_kernels as ck
from conspo_kernels.integrations.required import required
from conspo_kernels.integrations.trl import ConSPOConfig, ConSPOTrainer

FOUR = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4}  # 16 rollouts, groups of 4
# Rollouts for one step, in four micro-batches or one; for two steps; twice; for half of a step; for a quarter of one.
RUNS: dict[str, dict[str, Any]] = {
    "micro-batches": FOUR | {"max_steps": 2},
    "one micro-batch": {"per_device_train_batch_size": 16, "max_steps": 2},
    "two steps": FOUR | {"steps_per_generation": 8, "max_steps": 3},
    "two iterations": FOUR | {"num_iterations": 2, "max_steps": 3},
    "two generations": FOUR | {"steps_per_generation": 2, "group_denominator": "all", "max_steps": 2},
    "four generations": FOUR | {"steps_per_generation": 1, "group_denominator": "all", "max_steps": 2},
    "lora": FOUR | {"peft_config": "lora", "learning_rate": 2.0, "max_steps": 2},
    "no tokens": FOUR | {"mask_truncated_completions": True, "max_completion_length": 16},
}


def lora() -> peft.LoraConfig:
    return peft.LoraConfig(target_modules=["q_proj", "down_proj"], r=2, lora_dropout=0.1, task_type="CAUSAL_LM")


@functools.cache
def trained(name: str) -> Any:
    options = dict(RUNS[name])
    if options.pop("peft_config", None):
        options["peft_config"] = lora()
    trainer = parts.trainer(parts.SCRATCH.name, **options)
    trainer.train()
    return trainer


def part(rollouts: dict[str, Any], rows: slice) -> dict[str, Any]:
    return {name: x[rows] if isinstance(x, Tensor) and x.dim() else x for name, x in rollouts.items()}


def rollouts_of(trainer: Any, step: int) -> list[dict[str, Any]]:
    """Those of one optimizer step, in TRL's order before it shuffles them: a part for each generation."""
    accumulation, generation = trainer.args.gradient_accumulation_steps, trainer.args.steps_per_generation
    if generation < accumulation:
        count = accumulation // generation
        return trainer.generations[step * count : (step + 1) * count]
    steps = generation // accumulation
    rows = accumulation * trainer.args.per_device_train_batch_size
    start = step % steps * rows
    return [part(trainer.generations[step // (steps * trainer.num_iterations)], slice(start, start + rows))]


def expected(trainer: Any, step: int, dtype: torch.dtype) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of the whole batch, at the parameters that the step started from."""
    policy = parts.model()
    if "lora" in next(iter(trainer.recorder.gradients[0])):
        policy = peft.get_peft_model(policy, lora()).eval()
    policy.load_state_dict(trainer.recorder.parameters[step])
    policy = policy.to(dtype)
    rollouts = rollouts_of(trainer, step)
    loss = parts.whole_loss(policy, rollouts, 4 if trainer.args.group_denominator == "all" else None)
    return loss.detach(), parts.gradients_of(policy, loss)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", RUNS)
def test_a_step_has_the_gradient_of_the_whole_batch(name: str, dtype: torch.dtype) -> None:
    trainer = trained(name)
    logged = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert len(trainer.recorder.gradients) == len(logged) == trainer.args.max_steps
    for step, gradients in enumerate(trainer.recorder.gradients):
        loss, wanted = expected(trainer, step, dtype)
        assert parts.difference(gradients, wanted) < 1e-6
        assert logged[step] == pytest.approx(loss.item(), rel=1e-5)


def test_the_groups_were_scattered() -> None:
    trainer = trained("micro-batches")
    assert [len(set(it["conspo_groups"].tolist())) > 1 for it in trainer._buffered_inputs] == [True] * 4
    assert any(it["conspo_rewards"].isnan().any() for it in trainer.generations)
    assert (trained("no tokens").generations[0]["completion_mask"].sum(1) == 0).any()


def test_one_group_per_micro_batch_would_be_another_gradient() -> None:
    """The tolerance can fail: the loss of each micro-batch alone, averaged as GRPO does, is off by far more."""
    trainer = trained("micro-batches")
    _, wanted = expected(trainer, 1, torch.float64)
    policy = parts.model()
    policy.load_state_dict(trainer.recorder.parameters[1])
    micro_batches = [it | {"conspo_weights": None} for it in trainer._buffered_inputs]
    (parts.whole_loss(policy, micro_batches, None) / 4).backward()
    assert parts.difference({name: p.grad for name, p in policy.named_parameters()}, wanted) > 0.1


def test_the_papers_constants_are_the_defaults(tmp_path: Path) -> None:
    """Its section 5.1; `test_defaults.py` has the other signatures."""
    settings = ConSPOConfig(output_dir=str(tmp_path), report_to="none", bf16=False)
    assert (settings.tau, settings.margin, settings.margin_warmup_ratio) == (10.0, 0.01, 0.3)


def test_metrics_and_the_margin_are_in_trls_logs(tmp_path: Path) -> None:
    trainer = parts.trainer(
        tmp_path,
        **FOUR,
        max_steps=4,
        margin_warmup_ratio=0.5,
        per_device_eval_batch_size=4,
        eval_dataset=parts.prompts(2),
    )
    trainer.train()
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert [row["conspo/margin"] for row in rows] == pytest.approx([0, 0.15, 0.3, 0.3])
    for row, rollouts in zip(rows, trainer.generations, strict=True):
        assert row["conspo/loss"] == pytest.approx(row["loss"], rel=1e-5)
        assert row["conspo/skipped_rollouts"] == rollouts["conspo_rewards"].isnan().sum()
        assert row["conspo/score_gap"] == pytest.approx(row["conspo/score_pos_mean"] - row["conspo/score_neg_mean"])
        assert row["conspo/score_drift"] < 1e-6
        assert row["entropy"] > 0
    evaluated = trainer.evaluate()
    assert evaluated["eval_loss"] >= 0
    row = trainer.state.log_history[-1]
    assert row["eval_conspo/margin"] == pytest.approx(0.3)
    assert "eval_conspo/score_drift" not in row


@pytest.mark.parametrize("name", ["micro-batches", "two steps", "two iterations"])
def test_a_resumed_run_goes_on_identically(name: str, tmp_path: Path) -> None:
    options = RUNS[name] | {"max_steps": 5, "save_strategy": "steps", "save_steps": 3, "optim": "adamw_torch"}
    options |= {"learning_rate": 1e-2, "margin_warmup_ratio": 0.8}
    whole = parts.trainer(tmp_path, **options)
    whole.train()
    saved = torch.load(tmp_path / "checkpoint-3" / "training_args.bin", weights_only=False)
    assert (type(saved), saved.tau) == (ConSPOConfig, 0.7)
    resumed = parts.trainer(tmp_path / "resumed", policy=parts.model(seed=9), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    for step in range(2):
        for name in whole.recorder.parameters[0]:
            torch.testing.assert_close(
                resumed.recorder.parameters[step][name], whole.recorder.parameters[step + 3][name], rtol=0, atol=0
            )
    logged = [
        [{name: x for name, x in row.items() if name == "loss" or "conspo" in name} for row in it.state.log_history]
        for it in (whole, resumed)
    ]
    assert logged[0][:5] == logged[1][:5]
    assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True))


RANK_RUNS: list[dict[str, Any]] = [
    {"per_device_train_batch_size": 6},  # 12 rollouts: of the second group each rank has two
    {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2, "num_iterations": 2, "max_steps": 2},
]


def on_rank(rank: int, size: int) -> list[dict[str, Any]]:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
    results = []
    for options in RANK_RUNS:
        trainer = parts.trainer(parts.SCRATCH.name, ddp_backend="gloo", seed=4, **options)
        assert trainer.accelerator.num_processes == size
        trainer.train()
        recorder = trainer.recorder
        results.append(
            {
                "rollouts": trainer.generations,
                "gradients": recorder.gradients,
                "parameters": recorder.parameters,
                "logged": [row["loss"] for row in trainer.state.log_history if "loss" in row],
            }
        )
    return results


@functools.cache
def on_ranks() -> list[list[dict[str, Any]]]:
    return ranks.run(2, on_rank)


@pytest.mark.parametrize("run", range(len(RANK_RUNS)))
def test_a_group_over_two_ranks(run: int) -> None:
    results = [of_rank[run] for of_rank in on_ranks()]
    rewards, groups = ([it["rollouts"][0][f"conspo_{name}"] for it in results] for name in ("rewards", "groups"))
    assert groups[0].tolist() == [0, 0, 0, 0, 1, 1]
    assert groups[1].tolist() == [1, 1, 2, 2, 2, 2]
    assert len({bool(reward > 0.5) for reward in (*rewards[0][4:], *rewards[1][:2]) if reward == reward}) == 2
    for step in range(len(results[0]["gradients"])):
        policy = parts.model()
        policy.load_state_dict({k.removeprefix("module."): x for k, x in results[0]["parameters"][step].items()})
        # Each rank pads its rollouts by itself, so scores are taken rank by rank.
        rollouts = [it["rollouts"][0] for it in results]
        scores = torch.cat([scores_of(policy, it) for it in rollouts])
        loss = ck.conspo_loss_from_scores(scores, torch.cat(rewards), torch.cat(groups), **parts.CONTRAST)
        loss.backward()
        wanted = {name: p.grad for name, p in policy.named_parameters()}
        for it in results:
            got = {name.removeprefix("module."): x for name, x in it["gradients"][step].items()}
            assert parts.difference(got, wanted) < 1e-6
        assert results[0]["logged"][step] == pytest.approx(loss.item(), rel=1e-5)


def scores_of(policy: Any, it: dict[str, Any]) -> Tensor:
    ids = torch.cat([it["prompt_ids"], it["completion_ids"]], dim=1)
    attended = torch.cat([it["prompt_mask"], it["completion_mask"]], dim=1)
    response = torch.cat([torch.zeros_like(it["prompt_mask"]), it["completion_mask"]], dim=1)
    logits = policy(input_ids=ids, attention_mask=attended).logits
    logprobs = ck.token_logprobs(logits, ids, response_mask=response, shift=True)
    return ck.sequence_scores(logprobs, ids, response_mask=response, shift=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tau": 0.0}, "tau must be positive and finite, got 0.0"),
        ({"margin": math.inf}, "margin must be finite, got inf"),
        ({"margin_warmup_ratio": 2.0}, "margin_warmup_ratio must be in [0, 1], got 2.0"),
        ({"loss_head": "liger"}, "loss_head must be 'auto', 'conspo' or 'trl', got 'liger'"),
        ({"trust_region": 0.0}, "trust_region must be positive and finite, or None, got 0.0"),
        ({"group_denominator": "none"}, "group_denominator must be 'valid' or 'all', got 'none'"),
        ({"beta": 0.1}, "beta=0.1 has no meaning for ConSPO"),
        ({"loss_type": "dapo"}, "loss_type='dapo' has no meaning for ConSPO"),
        ({"epsilon_high": 0.3}, "epsilon_high=0.3 has no meaning for ConSPO"),
        ({"disable_dropout": False}, "disable_dropout=False"),
        ({"use_vllm": True, "vllm_importance_sampling_correction": True}, "vllm_importance_sampling_correction=True"),
        (
            {"parallelism_config": SimpleNamespace(tp_enabled=True, cp_enabled=False, sp_enabled=False)},
            "tensor parallel",
        ),
        (FOUR | {"steps_per_generation": 6}, "steps_per_generation (6) must be a multiple of"),
        (
            {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "steps_per_generation": 8},
            "gradient_accumulation_steps (2) of num_generations (4), or groups would be cut",
        ),
        (FOUR | {"steps_per_generation": 2}, "Set group_denominator='all', or steps_per_generation="),
        (FOUR | {"steps_per_generation": 2, "num_iterations": 2, "group_denominator": "all"}, "num_iterations (2) 1"),
    ],
)
def test_what_would_not_be_conspo_raises(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    defaults = {"num_generations": 4, "per_device_train_batch_size": 4}
    with pytest.raises(ValueError, match=re.escape(message)):
        ConSPOConfig(**parts.settings(tmp_path, **(defaults | options)))


def test_settings_from_a_command_line(tmp_path: Path) -> None:
    arguments = f"--output_dir {tmp_path} --use_cpu true --bf16 false --tau 0.5 --group_denominator all".split()
    (parsed,) = trl.TrlParser((ConSPOConfig,)).parse_args_and_config(arguments)
    assert (parsed.tau, parsed.margin, parsed.group_denominator, parsed.loss_type) == (0.5, 0.01, "all", "conspo")


def test_the_classes_have_their_public_names() -> None:
    for name, value in (("ConSPOConfig", ConSPOConfig), ("ConSPOTrainer", ConSPOTrainer)):
        assert f"{value.__module__}.{value.__qualname__}" == f"conspo_kernels.integrations.trl.{name}"
        assert pickle.loads(pickle.dumps(value)) is value


def test_another_config_raises(tmp_path: Path) -> None:
    args = trl.GRPOConfig(**parts.settings(tmp_path))
    with pytest.raises(TypeError, match="args must be a ConSPOConfig or None, got GRPOConfig"):
        ConSPOTrainer(
            parts.model(), parts.even, args, train_dataset=parts.prompts(8), processing_class=parts.tokenizer()
        )


def test_a_router_raises(tmp_path: Path) -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    tiny = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    tiny |= {"num_key_value_heads": 1, "num_local_experts": 2, "vocab_size": 14, "output_router_logits": True}
    with pytest.raises(ValueError, match=re.escape("set router_aux_loss_coef=0.0")):
        parts.trainer(tmp_path, MixtralForCausalLM(MixtralConfig(**tiny)), **FOUR)


def test_an_older_trl_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trl, "__version__", "1.15.2")
    with pytest.raises(
        ImportError, match=re.escape("trl >= 1.16 is needed, got 1.15.2: pip install 'conspo-kernels[trl]'")
    ):
        required("trl")


def test_importing_needs_no_trl() -> None:
    script = """
import sys
sys.modules["trl"] = None  # as if it were not installed
import conspo_kernels
from conspo_kernels.integrations import trl
assert not {"transformers", "peft", "datasets", "accelerate"} & set(sys.modules)
for name in ("ConSPOConfig", "ConSPOTrainer", "enable_fused_loss_head"):
    try:
        getattr(trl, name)()
    except ImportError as error:
        assert "pip install 'conspo-kernels[trl]'" in str(error), error
    else:
        raise AssertionError(name)
try:
    trl.Missing
except AttributeError as error:
    assert "Missing" in str(error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
