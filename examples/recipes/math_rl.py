"""ConSPO on grade-school mathematics with one GPU: vLLM samples, transformers trains, the logits are never whole.

    pip install 'conspo-kernels[transformers]' peft pyyaml datasets vllm
    python examples/recipes/math_rl.py examples/recipes/qwen2.5-1.5b-lora.yaml
    python examples/recipes/math_rl.py examples/recipes/smollm2-1.7b-full.yaml learning_rate=2e-6
    python examples/recipes/math_rl.py examples/recipes/qwen2.5-1.5b-lora.yaml examples/recipes/small.yaml   # on a CPU

Settings come from files and from NAME=VALUE; the later one wins. `small.yaml` puts stand-ins in place of the model, the
data and vLLM, and leaves the rest of a configuration as it is: it shows that the loop runs, and nothing about
mathematics. On a GPU nothing of this has been run: none was at hand.

Micro-batches are packed up to a number of tokens, so a group's rollouts may lie in several. The scores of all of them
come first, then the weights of the whole step, then the gradient: it is that of one large batch.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from math_policy import Policy, build_policy
from math_problems import SOURCES, Draws, Problem, reward
from samplers import GenerateSampler, Sampler, VLLMSampler
from torch import Tensor

from conspo_kernels import CosineMargin, conspo_weights, linear_conspo_scores, linear_weighted_score_loss
from conspo_kernels.integrations.transformers import from_unpadded, head_inputs


@dataclasses.dataclass(frozen=True)
class Settings:
    model: str  # of the hub, or "tiny"
    problems: str  # gsm8k or sums
    sampler: str  # vllm or generate
    steps: int
    lora_rank: int = 0  # 0: all weights are trained
    prompts_per_step: int = 32
    group_size: int = 16
    max_new_tokens: int = 1024
    temperature: float = 1.0
    learning_rate: float = 2e-6
    max_grad_norm: float = 1.0
    tau: float = 10.0  # with the next two and the learning rate: the paper's (its section 5.1)
    margin: float = 0.01  # nats per token
    margin_warmup: float = 0.3  # fraction of the steps over which it rises
    micro_batch_tokens: int = 16_384
    workspace_mib: float = 1024  # tiles of logits
    dtype: str = "bfloat16"
    attention: str = "flash_attention_2"
    gradient_checkpointing: bool = True
    vllm_memory: float = 0.3  # fraction of the GPU
    vllm_max_length: int = 2048
    eval_problems: int = 256
    eval_every: int = 25
    device: str = "cuda"
    seed: int = 0
    out: str = "runs/math_rl"


def read_settings(sources: list[str]) -> Settings:
    """Files and NAME=VALUE, of which the later wins. A name that is no setting, or a missing one, raises TypeError."""
    values: dict[str, Any] = {}
    for source in sources:
        name, assignment, value = source.partition("=")
        values |= {name: yaml.safe_load(value)} if assignment else yaml.safe_load(Path(source).read_text())
    kinds = {field.name: type(field.default) for field in dataclasses.fields(Settings)}
    # YAML takes 1e-6 for text.
    values = {name: float(value) if kinds.get(name) is float else value for name, value in values.items()}
    return Settings(**values)


@dataclasses.dataclass(frozen=True)
class Rollouts:
    """One entry per rollout, those of a prompt next to each other."""

    prompts: list[list[int]]
    responses: list[list[int]]
    rewards: Tensor
    prompt_ids: Tensor


def roll_out(policy: Policy, sampler: Sampler, problems: list[Problem], copies: int, settings: Settings) -> Rollouts:
    prompts = [policy.tokenizer.prompt(problem.question) for problem in problems]
    sampled = sampler.sample(prompts, copies, settings.max_new_tokens, settings.temperature)
    rewards = [
        reward(problem, policy.tokenizer.text(response))
        for problem, responses in zip(problems, sampled, strict=True)
        for response in responses
    ]
    return Rollouts(
        [prompt for prompt in prompts for _ in range(copies)],
        [response for responses in sampled for response in responses],
        torch.tensor(rewards),
        torch.arange(len(problems)).repeat_interleave(copies),
    )


def micro_batches(rollouts: Rollouts, most: int, device: torch.device) -> Iterator[tuple[list[int], dict[str, Any]]]:
    """Rollouts packed in order, up to `most` tokens or one rollout: their indices, and the batch."""
    lengths = [len(p) + len(r) for p, r in zip(rollouts.prompts, rollouts.responses, strict=True)]
    start = 0
    while start < len(lengths):
        stop, tokens = start + 1, lengths[start]
        while stop < len(lengths) and tokens + lengths[stop] <= most:
            tokens += lengths[stop]
            stop += 1
        chosen = list(range(start, stop))
        ids = [i for s in chosen for i in rollouts.prompts[s] + rollouts.responses[s]]
        mask = [flag for s in chosen for flag in [0] * len(rollouts.prompts[s]) + [1] * len(rollouts.responses[s])]
        offsets = torch.tensor([0, *lengths[start:stop]]).cumsum(0)
        yield (
            chosen,
            from_unpadded(torch.tensor(ids, device=device), offsets, response_mask=torch.tensor(mask, device=device)),
        )
        start = stop


def accumulate(policy: Policy, rollouts: Rollouts, margin: float, settings: Settings) -> dict[str, float]:
    """The gradient of the whole step's loss, one micro-batch after another; its metrics."""
    parts = list(micro_batches(rollouts, settings.micro_batch_tokens, policy.device))
    head: dict[str, Any] = {"temperature": settings.temperature, "workspace_mib": settings.workspace_mib}
    with torch.no_grad(), policy.autocast():
        scores = torch.cat([linear_conspo_scores(**head_inputs(policy.model, batch), **head) for _, batch in parts])
    result = conspo_weights(
        scores, rollouts.rewards, rollouts.prompt_ids, tau=settings.tau, margin=margin, return_metrics=True
    )
    for chosen, batch in parts:
        weights = result.weights[chosen[0] : chosen[-1] + 1]
        with policy.autocast():
            loss = linear_weighted_score_loss(**head_inputs(policy.model, batch), weights=weights, **head)
        loss.backward()
    return {name.removeprefix("conspo/"): value.item() for name, value in result.metrics.items()}


def make_sampler(policy: Policy, settings: Settings) -> Sampler:
    if settings.sampler == "vllm":
        return VLLMSampler(policy, settings.model, settings.vllm_memory, settings.vllm_max_length, settings.seed)
    if settings.sampler == "generate":
        return GenerateSampler(policy)
    raise ValueError(f"sampler must be 'vllm' or 'generate', got {settings.sampler!r}")


def train(settings: Settings) -> list[dict[str, float]]:
    """One record per step, written to `out`/steps.jsonl as they come."""
    torch.manual_seed(settings.seed)
    policy = build_policy(
        settings.model, settings.lora_rank, settings.dtype, settings.attention, settings.gradient_checkpointing,
        settings.device,
    )  # fmt: skip
    policy.model.train()
    sampler = make_sampler(policy, settings)
    draws = Draws(SOURCES[settings.problems]("train"), settings.seed)
    held_out = SOURCES[settings.problems]("test")[: settings.eval_problems]
    optimizer = torch.optim.AdamW(policy.trained, lr=settings.learning_rate, weight_decay=0.0)
    margin = CosineMargin(settings.steps, settings.margin, settings.margin_warmup)
    out = Path(settings.out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "settings.json").write_text(json.dumps(dataclasses.asdict(settings), indent=2))
    records = []
    with (out / "steps.jsonl").open("w") as file:
        for step in range(settings.steps):
            start = time.perf_counter()
            rollouts = roll_out(policy, sampler, draws.take(settings.prompts_per_step), settings.group_size, settings)
            sampled = time.perf_counter()
            record = {"step": float(step), "reward": rollouts.rewards.mean().item()}
            record |= accumulate(policy, rollouts, margin(step), settings)
            record["grad_norm"] = torch.nn.utils.clip_grad_norm_(policy.trained, settings.max_grad_norm).item()
            optimizer.step()
            optimizer.zero_grad()
            record |= {"sampling_s": sampled - start, "training_s": time.perf_counter() - sampled}
            sampler.update()
            if (step + 1) % settings.eval_every == 0 or step + 1 == settings.steps:
                record["held_out"] = roll_out(policy, sampler, held_out, 1, settings).rewards.mean().item()
            records.append(record)
            file.write(json.dumps(record) + "\n")
            file.flush()
            print("  ".join(f"{name} {value:.3g}" for name, value in record.items()), flush=True)
    policy.model.save_pretrained(out / "model")
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("settings", nargs="+", help="YAML files and NAME=VALUE; the later one wins")
    train(read_settings(parser.parse_args().settings))


if __name__ == "__main__":
    main()
