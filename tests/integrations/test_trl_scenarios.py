"""`ConSPOTrainer` used as TRL's users use theirs, and several updates on one batch: what each step's gradient is."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import trl_parts as parts
from datasets import Dataset
from torch import Tensor

import conspo_kernels as ck

FOUR = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4}  # 16 rollouts, groups of 4
EPSILON = 0.05


def conversations(count: int) -> Dataset:
    rows = [[{"role": "user", "content": prompt}] for prompt in parts.prompts(count)["prompt"]]
    return Dataset.from_dict({"prompt": rows})


def even_of_text(completions: list[Any], **_columns: Any) -> list[float]:
    """1 where a reply has an even number of letters. A conversation's reply is a list of messages."""
    return [float(len(reply[0]["content"].replace(" ", "")) % 2 == 0) for reply in completions]


def ends_early(completion_ids: list[list[int]], **_columns: Any) -> list[float | None]:
    """Of a second opinion that most rollouts do not get."""
    return [0.7 if len(ids) < 12 else None for ids in completion_ids]


def lora() -> peft.LoraConfig:
    return peft.LoraConfig(target_modules=["q_proj", "down_proj"], r=2, task_type="CAUSAL_LM")


SCENARIOS: dict[str, dict[str, Any]] = {
    "conversations": {"train_dataset": conversations(48), "reward_funcs": even_of_text},
    "several rewards": {"reward_funcs": [parts.even, ends_early], "reward_weights": [1.0, 0.5],
                        "max_completion_length": 12},
    "lora": {"peft_config": lora()},
    "a whole head in lora": {"peft_config": peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])},
    "truncated": {"mask_truncated_completions": True, "max_completion_length": 16, "max_steps": 1},
    "evaluation": {
        "eval_dataset": parts.prompts(4), "eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 4,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", SCENARIOS)
@pytest.mark.parametrize("batch", [FOUR, {"per_device_train_batch_size": 16}], ids=["micro-batches", "one"])
def test_a_step_has_the_gradient_of_the_whole_batch(name: str, batch: dict[str, Any], tmp_path: Path) -> None:
    settings = {"loss_head": "conspo", "learning_rate": 0.5, "max_steps": 2} | SCENARIOS[name] | batch
    trainer = parts.trainer(tmp_path, **settings)
    trainer.train()
    trained = [it for it in trainer.generations if len(it["completion_ids"]) == 16]
    for step in range(trainer.args.max_steps):
        policy = parts.model()
        if "peft_config" in SCENARIOS[name]:
            policy = peft.get_peft_model(policy, SCENARIOS[name]["peft_config"]).eval()
        policy.load_state_dict(trainer.recorder.parameters[step])
        wanted = parts.gradients_of(policy, parts.whole_loss(policy, trained[step : step + 1], None))
        assert parts.difference(trainer.recorder.gradients[step], wanted) < 1e-6
    if name == "evaluation":
        assert [row["eval_conspo/margin"] for row in trainer.state.log_history if "eval_loss" in row] == pytest.approx(
            [0.3, 0.3]
        )


def test_several_rewards_were_not_all_there(tmp_path: Path) -> None:
    trainer = parts.trainer(tmp_path, **SCENARIOS["several rewards"], **FOUR)
    trainer.train()
    rewards = trainer.generations[0]["conspo_rewards"]
    assert {round(x, 2) for x in rewards.tolist() if x == x} - {0.0, 1.0}  # 0.35 and 1.35
    assert rewards.isnan().any()


def test_a_tool_s_tokens_take_no_part(tmp_path: Path) -> None:
    """TRL's mask of what a tool wrote: its tokens are neither scored nor trained on."""
    trainer = parts.trainer(tmp_path, loss_head="conspo", **FOUR)
    generate = trainer._generate_and_score_completions

    def with_a_tool(inputs: Any) -> Any:
        rollouts = generate(inputs)
        rollouts["tool_mask"] = torch.ones_like(rollouts["completion_mask"])
        rollouts["tool_mask"][:, 1] = 0
        return rollouts

    trainer._generate_and_score_completions = with_a_tool
    trainer.train()
    policy = parts.model()
    policy.load_state_dict(trainer.recorder.parameters[0])
    it = trainer.generations[0]
    logprobs, mask = response_logprobs(policy, it), it["completion_mask"] * it["tool_mask"]
    scores = ck.sequence_scores(logprobs, torch.zeros_like(mask), response_mask=mask)
    loss = ck.conspo_loss_from_scores(scores, it["conspo_rewards"], it["conspo_groups"], **parts.CONTRAST)
    assert parts.difference(trainer.recorder.gradients[0], parts.gradients_of(policy, loss)) < 1e-6


def response_logprobs(policy: Any, it: dict[str, Any]) -> Tensor:
    """[B, C], with a graph."""
    ids = torch.cat([it["prompt_ids"], it["completion_ids"]], dim=1)
    attended = torch.cat([it["prompt_mask"], it["completion_mask"]], dim=1)
    logits = policy(input_ids=ids, attention_mask=attended).logits[:, :-1].log_softmax(-1)
    width = it["completion_ids"].shape[1]
    return logits.gather(2, ids[:, 1:, None])[:, -width:, 0]


def bounded_gradient(policy: Any, it: dict[str, Any]) -> tuple[dict[str, Tensor], int, int]:
    """Token by token, by the definition; how many tokens have a coefficient, and how many of them are stopped."""
    mask = it["completion_mask"]
    logprobs, old = response_logprobs(policy, it), it["old_per_token_logps"]
    scores = ck.sequence_scores(logprobs, torch.zeros_like(mask), response_mask=mask).detach().requires_grad_()
    contrast = ck.conspo_loss_from_scores(scores, it["conspo_rewards"], it["conspo_groups"], **parts.CONTRAST)
    (weights,) = torch.autograd.grad(contrast, scores)
    loss, pushed, stopped = torch.zeros(()), 0, 0
    for i, row in enumerate(mask.bool().tolist()):
        for t in (t for t, taken in enumerate(row) if taken and weights[i] != 0):
            c, ratio = float(weights[i]) / sum(row), math.exp(float(logprobs[i, t].detach() - old[i, t]))
            stop = (c < 0 and ratio > 1 + EPSILON) or (c > 0 and ratio < 1 - EPSILON)
            loss, pushed, stopped = loss + (0.0 if stop else c * logprobs[i, t]), pushed + 1, stopped + stop
    return parts.gradients_of(policy, loss), pushed, stopped


AGAIN = {"num_iterations": 3, "max_steps": 3, "learning_rate": 0.2}


@pytest.mark.parametrize("head", ["conspo", "trl"])
@pytest.mark.parametrize("batch", [FOUR, {"per_device_train_batch_size": 16}], ids=["micro-batches", "one"])
def test_a_trust_region_stops_what_a_loop_stops(head: str, batch: dict[str, Any], tmp_path: Path) -> None:
    trainer = parts.trainer(tmp_path, loss_head=head, trust_region=EPSILON, **batch, **AGAIN)
    trainer.train()
    logged = [row["conspo/trust_region_fraction"] for row in trainer.state.log_history if "loss" in row]
    for step, fraction in enumerate(logged):
        policy = parts.model()
        policy.load_state_dict(trainer.recorder.parameters[step])
        wanted, pushed, stopped = bounded_gradient(policy, trainer.generations[0])
        assert parts.difference(trainer.recorder.gradients[step], wanted) < 1e-5
        if batch is FOUR:  # logged per micro-batch, as a mean
            assert (fraction > 0) == (stopped > 0)
        else:
            assert fraction == pytest.approx(stopped / pushed)
    assert logged[0] == 0.0
    assert 0.0 < logged[1] < 1.0


@pytest.mark.parametrize("head", ["conspo", "trl"])
def test_the_first_update_has_the_same_bits_with_a_trust_region(head: str, tmp_path: Path) -> None:
    gradients = []
    for epsilon in (None, EPSILON):
        trainer = parts.trainer(tmp_path, loss_head=head, trust_region=epsilon, **FOUR, **AGAIN)
        trainer.train()
        gradients.append(trainer.recorder.gradients)
    assert all(torch.equal(gradients[1][0][name], x) for name, x in gradients[0][0].items())
    assert not all(torch.equal(gradients[1][1][name], x) for name, x in gradients[0][1].items())


def test_the_names_that_every_integration_logs(tmp_path: Path) -> None:
    trainer = parts.trainer(tmp_path, **FOUR)
    trainer.train()
    names = {"conspo/score_drift", "conspo/trust_region_fraction", "conspo/ordered_pairs", "conspo/score_std"}
    assert names < trainer.state.log_history[0].keys()
