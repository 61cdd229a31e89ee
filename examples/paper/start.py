"""Where a run starts: its task, its problems, and the policy that every method of a seed shares."""

from __future__ import annotations

import dataclasses
import functools
import random
from collections.abc import Sequence
from pathlib import Path

import torch
from demo.policy import Policy, build_char_policy
from demo.records import replace_atomically
from demo.rollout import accuracy, supervised_batch
from demo.sequences import read_prompts_once
from demo.smollm2 import build_smollm2_policy
from demo.tasks import Entry, OneDigitSums, RunningSums, SpellBackward, Task
from demo.warmup import warm_up
from transformers import set_seed

from conspo_kernels import token_logprobs

from . import protocol

CPU = torch.device("cpu")


class SpoiltSpelling(SpellBackward):
    """What the systematically wrong policy is taught: the last two letters swapped for words in a to h, 41 % of all."""

    def answer(self, entry: Entry) -> str:
        right = super().answer(entry)
        return right[:-2] + right[:-3:-1] if self.prompt(entry)[0] <= "h" else right


def generator_of(seed: int, purpose: str) -> torch.Generator:
    """A stream of its own for each purpose, the same whatever the method."""
    return torch.Generator().manual_seed(random.Random(f"paper {seed} {purpose}").getrandbits(63))


@functools.cache
def task_of(name: str) -> Task:
    held_out = protocol.HELD_OUT + protocol.VALIDATION
    match name:
        case "spell_backward":
            return SpellBackward(held_out=held_out)
        case "long_sums":
            return RunningSums(min_terms=4, max_terms=8, held_out=held_out, size=8_000)
        case "smollm2":
            return OneDigitSums(held_out=64)
    raise ValueError(f"name must be a task of the protocol, got {name!r}")


@torch.no_grad()
def exact_accuracy(policy: Policy, task: Task, entries: Sequence[Entry]) -> float:
    """The mean probability of a problem's one right answer: what sampled accuracy estimates, by one forward pass."""
    batch = supervised_batch(policy, task, entries)
    logits = policy.logits(batch)
    ids, mask = batch.last_columns(logits)
    return token_logprobs(logits, ids, response_mask=mask, shift=True).sum(1).double().exp().mean().item()


def measured(policy: Policy, task: Task, entries: Sequence[Entry], generator: torch.Generator) -> float:
    """Accuracy at temperature 1: exact where a problem has one right answer, else sampled."""
    if isinstance(task, SpellBackward):
        return exact_accuracy(policy, task, entries)
    return accuracy(policy, task, entries, samples=protocol.EVALUATION_SAMPLES, generator=generator)


def path_of(folder: Path, name: str, seed: int, rate: float, spoilt: bool) -> Path:
    return folder / f"{name}_{'spoilt_' if spoilt else ''}{rate:g}_{seed}.pt"


def teach(policy: Policy, name: str, seed: int, spoilt: bool, folder: Path) -> None:
    """One supervised run up to the highest of the protocol's pass rates; the weights are kept as it passes each."""
    task, rates = task_of(name), protocol.START[name] if not spoilt else (protocol.SPOILT,)
    generator = generator_of(seed, "warm-up")
    folder.mkdir(parents=True, exist_ok=True)

    def measure(entries: Sequence[Entry]) -> float:
        if isinstance(task, SpellBackward):
            reached = exact_accuracy(policy, task, entries)
        else:
            reached = accuracy(policy, task, entries, samples=1, generator=generator)
        for rate in rates:
            path = path_of(folder, name, seed, rate, spoilt)
            if reached >= rate and not path.exists():
                replace_atomically(path, lambda file: torch.save(policy.model.state_dict(), file))
        return reached

    warm_up(
        policy, SpoiltSpelling(held_out=len(task.held_out)) if spoilt else task, max_steps=3000,
        target_accuracy=max(rates), lr=protocol.WARMUP_LR[name], batch_size=64,
        rng=random.Random(f"paper {seed} warm-up"), generator=generator, show=False, measure=measure,
    )  # fmt: skip


def start_of(name: str, seed: int, folder: Path, rate: float | None = None, spoilt: bool = False) -> Policy:
    """The policy before training: pretrained, or warmed up to a pass rate; made once on one thread, then read.

    rate: None is that of the training runs, the protocol's first.
    """
    torch.set_num_threads(1)
    if name == "smollm2":
        return build_smollm2_policy(CPU)
    set_seed(seed)
    policy = build_char_policy(CPU, getattr(task_of(name), "signs", ""))
    policy = dataclasses.replace(policy, read=read_prompts_once)
    path = path_of(folder, name, seed, protocol.START[name][0] if rate is None else rate, spoilt)
    if not path.exists():
        teach(policy, name, seed, spoilt, folder)
    policy.model.load_state_dict(torch.load(path, weights_only=True))
    return policy
