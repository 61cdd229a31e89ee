"""The recipes for a GPU, each configuration run in the small: with stand-ins for the model, the data and vLLM."""

from __future__ import annotations

import dataclasses
import json
import math
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

REPOSITORY = Path(__file__).resolve().parents[2]
RECIPES = REPOSITORY / "examples" / "recipes"
CONFIGURATIONS = sorted(path.name for path in RECIPES.glob("*.yaml") if path.name != "small.yaml")
sys.path.insert(0, str(RECIPES))

import math_rl  # noqa: E402
from math_policy import build_policy, merged_weights  # noqa: E402
from math_problems import Draws, Problem, last_number, reward, sums  # noqa: E402
from samplers import GenerateSampler, VLLMSampler  # noqa: E402

from conspo_kernels import conspo_loss  # noqa: E402


def small(configuration: str, *changes: str) -> math_rl.Settings:
    return math_rl.read_settings([str(RECIPES / configuration), str(RECIPES / "small.yaml"), *changes])


@pytest.mark.parametrize("configuration", CONFIGURATIONS)
def test_a_configuration_runs_in_the_small(configuration: str, tmp_path: Path) -> None:
    settings = small(configuration, f"out={tmp_path}", "steps=3", "eval_every=2")
    records = math_rl.train(settings)
    lines = [json.loads(line) for line in (tmp_path / "steps.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2]
    assert ["held_out" in line for line in lines] == [False, True, True]
    assert all(math.isfinite(record["loss"]) for record in records)
    valid = [record for record in records if record["valid_group_fraction"] > 0]
    assert valid
    assert all(record["loss"] > 0 and record["grad_norm"] > 0 for record in valid)
    assert list((tmp_path / "model").glob("*.safetensors"))
    assert bool(settings.lora_rank) == bool(list((tmp_path / "model").glob("adapter_*")))


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_the_steps_gradient_is_that_of_one_batch(lora_rank: int) -> None:
    """Of packed micro-batches that cut groups apart, against the model's own logits of all rollouts at once."""
    settings = small(CONFIGURATIONS[0], f"lora_rank={lora_rank}", "micro_batch_tokens=17", "temperature=0.7")
    policy = build_policy("tiny", lora_rank, "float32", "sdpa", True, "cpu")
    perturb(policy.model)
    rollouts = math_rl.roll_out(policy, GenerateSampler(policy), sums("train")[:2], 4, settings)
    rollouts = dataclasses.replace(rollouts, rewards=torch.tensor([1.0, 0, 0, 1, 0, 1, 0, 0]))
    assert len(list(math_rl.micro_batches(rollouts, 17, policy.device))) > 2
    policy.model.train()
    math_rl.accumulate(policy, rollouts, 0.1, settings)
    result = [p.grad.clone() for p in policy.trained]
    policy.model.zero_grad()
    rows = [p + r for p, r in zip(rollouts.prompts, rollouts.responses, strict=True)]
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    kept = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    position = torch.arange(longest)
    response = kept * (position >= torch.tensor([len(p) for p in rollouts.prompts])[:, None])
    logits = policy.model(input_ids=ids, attention_mask=kept).logits
    conspo_loss(
        logits, ids, rollouts.rewards, 4, response_mask=response, shift=True, temperature=0.7, margin=0.1
    ).backward()
    largest = max(p.grad.norm() for p in policy.trained)
    assert largest > 0
    for value, parameter in zip(result, policy.trained, strict=True):
        assert (value - parameter.grad).norm() <= 1e-5 * largest


def perturb(model: torch.nn.Module) -> None:
    """LoRA's second matrices are zero as they come: its first ones would have no gradient."""
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)


def test_merged_weights_are_those_of_a_merged_model() -> None:
    """Under the names of a checkpoint, and the model keeps its own, bit for bit."""
    policy = build_policy("tiny", 4, "float32", "sdpa", False, "cpu")
    perturb(policy.model)
    before = {name: value.clone() for name, value in policy.model.state_dict().items()}
    result = {name: value.clone() for name, value in merged_weights(policy.model)}
    assert all(before[name].equal(value) for name, value in policy.model.state_dict().items())
    expected = policy.model.merge_and_unload().state_dict()
    assert result.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(result[name], value, rtol=0, atol=1e-6)


def test_a_sampled_tokens_frequency_is_its_probability() -> None:
    """The stand-in's sampler draws from the whole distribution at the temperature that the loss assumes."""
    policy = build_policy("tiny", 0, "float32", "sdpa", False, "cpu")
    prompt = policy.tokenizer.prompt("3+4=")
    defaults = {"top_k": 2, "top_p": 0.5, "repetition_penalty": 3.0}  # as pretrained models bring them
    policy.model.generation_config.update(**defaults)
    with torch.no_grad():
        policy.model.lm_head.weight.mul_(10)
        logits = policy.model(input_ids=torch.tensor([prompt])).logits[0, -1]
    probabilities = (logits / 0.7).softmax(-1)
    samples = GenerateSampler(policy).sample([prompt], 4000, 1, 0.7)[0]
    counts = torch.bincount(torch.tensor([row[0] for row in samples]), minlength=len(logits))
    deviation = (probabilities * (1 - probabilities) / 4000).sqrt()
    assert ((counts / 4000 - probabilities).abs() <= 5 * deviation + 1e-3).all()
    assert 0.05 < probabilities.max() < 0.9


@pytest.mark.parametrize(
    ("text", "number"),
    [("so it is 1,250.50 dollars", "1250.5"), ("3 - 5 = -2.", "-2"), ("12.0", "12"), ("100", "100"), ("none", None)],
)
def test_last_number(text: str, number: str | None) -> None:
    assert last_number(text) == number


def test_rewards_and_draws() -> None:
    assert reward(Problem("", "1250"), "The answer is\n1,250") == 1.0
    assert reward(Problem("", "7"), "70") == 0.0
    train, test = sums("train"), sums("test")
    assert not {p.question for p in train} & {p.question for p in test}
    draws = Draws(train, seed=0)
    assert {p.question for p in draws.take(len(train))} == {p.question for p in train}


def test_settings_that_are_none_raise() -> None:
    with pytest.raises(TypeError, match="learning_rat"):
        small(CONFIGURATIONS[0], "learning_rat=1")
    settings = small(CONFIGURATIONS[0], "sampler=greedy")
    with pytest.raises(ValueError, match="sampler must be 'vllm' or 'generate', got 'greedy'"):
        math_rl.make_sampler(build_policy("tiny", 0, "float32", "sdpa", False, "cpu"), settings)


def test_without_vllm_the_setting_raises_rather_than_sample_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    settings = math_rl.read_settings([str(RECIPES / CONFIGURATIONS[0])])
    assert settings.sampler == "vllm"
    with pytest.raises(ImportError, match="vllm"):
        math_rl.make_sampler(build_policy("tiny", 0, "float32", "sdpa", False, "cpu"), settings)


def test_the_vllm_sampler_on_a_stub(monkeypatch: pytest.MonkeyPatch) -> None:
    """No vLLM runs here: a stub with the names that the sampler calls, as TRL 1.16 calls them for vLLM 0.22 to 0.31."""
    policy = build_policy("tiny", 4, "float32", "sdpa", False, "cpu")
    perturb(policy.model)
    engine = build_policy("tiny", 0, "float32", "sdpa", False, "cpu").model
    calls: list[object] = []

    class StubLLM:
        def __init__(self, **options: object) -> None:
            calls.append(options["model"])
            runner = SimpleNamespace(
                model=SimpleNamespace(load_weights=lambda pairs: engine.load_state_dict(dict(pairs)))
            )
            worker = SimpleNamespace(driver_worker=SimpleNamespace(model_runner=runner))
            self.llm_engine = SimpleNamespace(model_executor=worker)

        def reset_prefix_cache(self) -> None:
            calls.append("cache reset")

        def generate(
            self, requests: list[dict[str, list[int]]], params: SimpleNamespace, use_tqdm: bool
        ) -> list[object]:
            calls.append(params)
            return [
                SimpleNamespace(
                    outputs=[SimpleNamespace(token_ids=(request["prompt_token_ids"][0], i)) for i in range(params.n)]
                )
                for request in requests
            ]

    stub = SimpleNamespace(LLM=StubLLM, SamplingParams=lambda **options: SimpleNamespace(**options))
    monkeypatch.setitem(sys.modules, "vllm", stub)
    for name in ("VLLM_ENABLE_V1_MULTIPROCESSING", "RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "0")  # the sampler's own go with the test
    sampler = VLLMSampler(policy, "name", 0.3, 100, seed=0)
    assert sampler.sample([[7, 8], [9]], 2, 5, 0.7) == [[[7, 0], [7, 1]], [[9, 0], [9, 1]]]
    params = calls[1]
    assert (params.temperature, params.top_p, params.top_k, params.max_tokens) == (0.7, 1.0, 0, 5)
    sampler.update()
    assert calls[::2] == ["name", "cache reset"]
    ids = torch.tensor([policy.tokenizer.prompt("1+2=3")])
    with torch.no_grad():
        torch.testing.assert_close(engine(input_ids=ids).logits, policy.model(input_ids=ids).logits, rtol=0, atol=1e-5)


def test_the_packed_example(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """It exits with a message where packed is not padded."""
    monkeypatch.setattr(sys, "argv", ["transformers_packed.py"])
    runpy.run_path(str(REPOSITORY / "examples" / "transformers_packed.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert "padded  16 x 250 = 4000 tokens" in printed
    assert "packed  1026 tokens" in printed
