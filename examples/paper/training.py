"""One run of the protocol: from the warmed-up policy of its seed to the accuracy after the last step."""

from __future__ import annotations

import dataclasses
import functools
import math
import random
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from objectives import OBJECTIVES, coefficients, dr_grpo, informative, rollout_means
from policy import Policy, build_char_policy
from records import replace_atomically
from rollout import Rollouts, accuracy, sample
from sequences import read_prompts_once
from tasks import Entry, RunningSums, SpellBackward, Task
from torch import Tensor
from transformers import set_seed
from warmup import warm_up

from conspo_kernels import CosineMargin, token_logprobs, weighted_logprob_loss

from . import protocol
from .protocol import Run

CPU = torch.device("cpu")


def generator_of(seed: int, purpose: str) -> torch.Generator:
    """A stream of its own for each purpose, the same whatever the method."""
    return torch.Generator().manual_seed(random.Random(f"paper {seed} {purpose}").getrandbits(63))


@functools.cache
def task_of(name: str) -> Task:
    kept = protocol.HELD_OUT + protocol.VALIDATION
    return SpellBackward(held_out=kept) if name == "spell_backward" else RunningSums(held_out=kept)


def problems_of(task: Task) -> tuple[list[Entry], list[Entry]]:
    """Held-out and validation problems; neither is ever trained on."""
    return task.held_out[: protocol.HELD_OUT], task.held_out[protocol.HELD_OUT :]


def warmed_up(name: str, seed: int, folder: Path) -> Policy:
    """The policy that every method of a seed starts from: made once on one thread, then read."""
    torch.set_num_threads(1)
    task = task_of(name)
    set_seed(seed)
    policy = build_char_policy(CPU, getattr(task, "signs", ""))
    path = folder / f"warm-up_{name}_{seed}.pt"
    if not path.exists():
        warm_up(
            policy, task, max_steps=3000, target_accuracy=protocol.WARMUP_ACCURACY, lr=protocol.WARMUP_LR[name],
            batch_size=64, rng=random.Random(f"paper {seed} warm-up"), generator=generator_of(seed, "warm-up"),
            show=False,
        )  # fmt: skip
        folder.mkdir(parents=True, exist_ok=True)
        replace_atomically(path, lambda file: torch.save(policy.model.state_dict(), file))
    policy.model.load_state_dict(torch.load(path, weights_only=True))
    return dataclasses.replace(policy, read=read_prompts_once)  # a group's prompt is read once: 1.5 times faster here


def mean_entropy_and_logprobs(logits: Tensor, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """log-probabilities [s, t] and mask [s, t], aligned with the logits, and the mean entropy per response token."""
    logprobs, entropy = token_logprobs(logits.detach(), ids, response_mask=mask, shift=True, return_entropy=True)
    aligned = F.pad(mask[:, 1:], (0, 1)).to(logprobs.dtype)
    return logprobs, aligned, (entropy * aligned).sum() / aligned.sum()


def update(
    run: Run, policy: Policy, optimizer: torch.optim.Optimizer, rollouts: Rollouts, margin: float | None
) -> dict[str, float]:
    """The updates of one batch of rollouts; what was seen before the first of them."""
    objective, seen = OBJECTIVES[protocol.METHODS[run.method].objective], {}
    constants = {k: v for k, v in run.constants.items() if k not in ("margin", "margin_warmup")}
    if objective is dr_grpo:
        constants["max_length"] = task_of(run.task).max_new_tokens
    if margin is not None:
        constants["margin"] = margin
    old: Tensor | None = None
    for _ in range(protocol.UPDATES[run.setting]):
        logits = policy.logits(rollouts.batch)
        ids, response_mask = rollouts.batch.last_columns(logits)
        logprobs, mask, entropy = mean_entropy_and_logprobs(logits, ids, response_mask)
        if old is None:
            old = logprobs
            seen = observed(rollouts, logprobs, mask, entropy)
        _loss, c = coefficients(objective, logprobs, old, mask, rollouts.rewards, protocol.GROUP, **constants)
        optimizer.zero_grad(set_to_none=True)
        weighted_logprob_loss(logits, ids, c, response_mask=response_mask, shift=True, inplace=True).backward()
        norm = torch.nn.utils.clip_grad_norm_(policy.model.parameters(), protocol.MAX_GRAD_NORM)
        seen.setdefault("gradient_norm", norm.item())
        optimizer.step()
    return seen


def observed(rollouts: Rollouts, logprobs: Tensor, mask: Tensor, entropy: Tensor) -> dict[str, float]:
    """What the figures show of a batch of rollouts."""
    scores, right = rollout_means(logprobs, mask), rollouts.rewards > 0.5
    valid = informative(rollouts.rewards, protocol.GROUP)
    gap = scores[valid & right].mean() - scores[valid & ~right].mean()
    return {
        "reward": rollouts.rewards.mean().item(),
        "entropy": entropy.item(),
        "response_length": rollouts.lengths.float().mean().item(),
        "score_gap": gap.item(),
        "valid_groups": valid.float().mean().item(),
    }


def rounded(value: float) -> float | None:
    """As JSON has it: None for what is no number, the score gap of a step without a valid group."""
    return round(value, 5) if math.isfinite(value) else None


def train(run: Run, warm_ups: Path) -> dict[str, Any]:
    """The whole run, on one thread: the same numbers on the same machine."""
    torch.set_num_threads(1)
    started, steps = time.perf_counter(), protocol.STEPS[run.setting]
    task, policy = task_of(run.task), warmed_up(run.task, run.seed, warm_ups)
    held_out, validation = problems_of(task)
    optimizer = torch.optim.Adam(policy.model.parameters(), lr=run.lr)
    schedule = None
    if "margin" in run.constants:
        schedule = CosineMargin(steps, run.constants["margin"], run.constants["margin_warmup"])
    prompts, sampling = random.Random(f"paper {run.seed} prompts"), generator_of(run.seed, "rollouts")
    curve: list[dict[str, float]] = []
    evaluations: dict[str, float] = {}

    def evaluate(problems: list[Entry], purpose: str) -> float:
        samples = protocol.EVALUATION_SAMPLES
        return accuracy(policy, task, problems, samples=samples, generator=generator_of(run.seed, purpose))

    for step in range(steps):
        if run.seed in protocol.SEEDS and step % protocol.EVALUATE_EVERY == 0:  # tuning needs no curve
            evaluations[str(step)] = evaluate(held_out, "evaluation")
        entries = task.draw(prompts, protocol.PROMPTS)
        rollouts = sample(policy, task, entries, copies=protocol.GROUP, generator=sampling)
        curve.append(update(run, policy, optimizer, rollouts, None if schedule is None else schedule(step)))
    evaluations[str(steps)] = evaluate(held_out, "evaluation")
    return {
        "run": asdict(run),
        "constants": run.constants,
        protocol.DECIDES: evaluations[str(steps)],
        "validation_accuracy": evaluate(validation, "validation"),
        "held_out_curve": evaluations,
        "curve": {name: [rounded(row[name]) for row in curve] for name in curve[0]},
        "seconds": round(time.perf_counter() - started, 1),
    }
