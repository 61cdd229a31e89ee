"""One training run: from the policy of its seed to the accuracy after the last batch of rollouts."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from demo.policy import Policy
from demo.rollout import Rollouts, sample
from demo.sequences import Batch
from objectives import OBJECTIVES, coefficients, dr_grpo, informative, rollout_means
from torch import Tensor

from conspo_kernels import CosineMargin, token_logprobs, trust_region, weighted_logprob_loss

from . import protocol
from .protocol import Run, Size
from .start import generator_of, measured, start_of, task_of


def rows_of(batch: Batch, rows: Tensor) -> Batch:
    """Some of a batch's sequences, whole groups of them."""
    columns = (batch.input_ids[rows], batch.attention_mask[rows], batch.response_mask[rows])
    return Batch(*columns, batch.prompt_columns, batch.copies)


@torch.no_grad()
def read(policy: Policy, batch: Batch) -> tuple[Tensor, Tensor, float]:
    """log-probabilities [s, t] of the responses, their mask [s, t], and the entropy per response token."""
    logits = policy.logits(batch)
    ids, mask = batch.last_columns(logits)
    logprobs, entropy = token_logprobs(logits, ids, response_mask=mask, shift=True, return_entropy=True)
    shifted = torch.nn.functional.pad(mask[:, 1:], (0, 1)).to(logprobs.dtype)
    return logprobs, shifted, ((entropy * shifted).sum() / shifted.sum()).item()


def parts_of(groups: int, updates: str) -> list[Tensor]:
    """The groups of each update: every rollout once, in four mini-batches, or all of them in each."""
    everything = torch.arange(groups)
    if updates == "repetition":
        return [everything] * protocol.UPDATES
    if updates == "one update":
        return [everything]
    return [part for part in everything.tensor_split(protocol.UPDATES) if len(part)]


def observed(logprobs: Tensor, mask: Tensor, rewards: Tensor, group_size: int) -> dict[str, float]:
    """Means over the groups with right and wrong rollouts, whose scores these are: spread, gap, ordered pairs."""
    scores, right = rollout_means(logprobs, mask).view(-1, group_size), rewards.view(-1, group_size) > 0.5
    pairs = right[:, :, None] & ~right[:, None, :]
    ordered = (pairs & (scores[:, :, None] > scores[:, None, :])).sum((1, 2)) / pairs.sum((1, 2))
    gap = (scores * right).sum(1) / right.sum(1) - (scores * ~right).sum(1) / (~right).sum(1)
    values = {"score_std": scores.std(1), "score_gap": gap, "ordered_pairs": ordered}
    return {name: value.mean().item() for name, value in values.items()}


def moved(policy: Policy, batch: Batch, old: Tensor, mask: Tensor, right: Tensor) -> dict[str, float]:
    """How far a batch's updates moved the policy: KL(old || now) per token by samples, scores of right and wrong."""
    now, _mask, _entropy = read(policy, batch)
    log_ratio = now - old
    divergence = (log_ratio.exp() - 1 - log_ratio)[mask > 0].mean().item()
    change = rollout_means(log_ratio, mask)
    outside = ((log_ratio.exp() - 1).abs() > 0.2)[mask > 0].double().mean().item()
    return {
        "kl": divergence,
        "outside": outside,
        "right_change": change[right].mean().item(),
        "wrong_change": change[~right].mean().item(),
    }


class Trainer:
    """The updates of one run."""

    def __init__(self, run: Run, policy: Policy, size: Size) -> None:
        self.run, self.policy, self.size = run, policy, size
        method = protocol.METHODS[run.method]
        self.objective, self.constants = OBJECTIVES[method.objective], dict(method.constants)
        self.epsilon = self.constants.pop("trust_region", None)
        margin = self.constants.pop("margin", None)
        self.schedule = None
        if margin is not None:
            alpha = self.constants.pop("alpha")
            self.schedule = CosineMargin(target=margin, warmup_ratio=alpha, total_steps=size.batches)
        if self.objective is dr_grpo:
            self.constants["max_length"] = task_of(run.task).max_new_tokens
        self.optimizer = torch.optim.Adam(policy.model.parameters(), lr=run.lr)

    def update(self, batch: Batch, old: Tensor, rewards: Tensor, constants: dict[str, Any]) -> float:
        """One step on these rollouts; the norm of its gradient."""
        logits = self.policy.logits(batch)
        ids, response_mask = batch.last_columns(logits)
        logprobs = token_logprobs(logits.detach(), ids, response_mask=response_mask, shift=True)
        mask = torch.nn.functional.pad(response_mask[:, 1:], (0, 1)).to(logprobs.dtype)
        _loss, c = coefficients(self.objective, logprobs, old, mask, rewards, batch.copies, **constants)
        c = trust_region(c, logprobs, old, self.epsilon)
        self.optimizer.zero_grad(set_to_none=True)
        weighted_logprob_loss(logits, ids, c, response_mask=response_mask, shift=True, inplace=True).backward()
        grads = [p.grad for p in self.policy.model.parameters() if p.grad is not None]
        self.optimizer.step()
        return torch.nn.utils.get_total_norm(grads).item()

    def learn(self, rollouts: Rollouts, step: int, look: bool) -> dict[str, float]:
        """All updates of one batch of rollouts, and what was seen before the first (and, if `look`, after the last)."""
        group = self.size.group
        seen = {"reward": rollouts.rewards.mean().item(), "length": rollouts.lengths.float().mean().item()}
        rows = informative(rollouts.rewards, group).nonzero()[:, 0]
        seen["valid_groups"] = len(rows) / len(rollouts.rewards)
        if not len(rows):
            return seen
        batch, rewards = rows_of(rollouts.batch, rows), rollouts.rewards[rows]
        old, mask, seen["entropy"] = read(self.policy, batch)
        seen |= observed(old, mask, rewards, group)
        constants = dict(self.constants)
        if self.schedule is not None:
            constants["margin"] = self.schedule(step)
        norms = []
        for groups in parts_of(len(rows) // group, self.run.updates):
            part = (groups[:, None] * group + torch.arange(group)).flatten()
            norms.append(self.update(rows_of(batch, part), old[part], rewards[part], constants))
        seen |= {"norm_first": norms[0], "norm_last": norms[-1]}
        return seen | moved(self.policy, batch, old, mask, rewards > 0.5) if look else seen


def intervals(rows: list[dict[str, float]], every: int) -> Iterator[dict[str, float | None]]:
    """Means over each so many batches of what is a number in them; None, as JSON has it, where nothing is."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    for begin in range(0, len(rows), every):
        values = {name: [r[name] for r in rows[begin : begin + every] if math.isfinite(r.get(name, math.nan))]
                  for name in names}  # fmt: skip
        yield {name: float(f"{sum(x) / len(x):.4g}") if x else None for name, x in values.items()}


def train(run: Run, warm_ups: Path) -> dict[str, Any]:
    """The whole run, on one thread: the same numbers on the same machine."""
    torch.set_num_threads(1)
    size = protocol.SIZES[run.task]
    task, policy = task_of(run.task), start_of(run.task, run.seed, warm_ups)
    started = time.process_time()
    trainer = Trainer(run, policy, size)
    held_out, validation = task.held_out[: protocol.HELD_OUT], task.held_out[protocol.HELD_OUT :]
    tuning = run.seed in protocol.TUNING_SEEDS  # such a run sees the validation problems alone
    prompts, sampling = random.Random(f"paper {run.seed} prompts"), generator_of(run.seed, "rollouts")
    rows, accuracies = [], []
    for step in range(size.batches):
        if step % size.every == 0 and not tuning:
            accuracies.append(measured(policy, task, held_out, generator_of(run.seed, "evaluation")))
        entries = task.draw(prompts, size.prompts)
        rollouts = sample(policy, task, entries, copies=size.group, generator=sampling)
        rows.append(trainer.learn(rollouts, step, look=(step + 1) % size.every == 0))
    problems, purpose = (validation, "validation") if tuning else (held_out, "evaluation")
    accuracies.append(measured(policy, task, problems, generator_of(run.seed, purpose)))
    seen = list(intervals(rows, size.every))
    return {
        "result": accuracies[-1],
        "accuracy": [round(value, 5) for value in accuracies],
        "seen": {name: [interval[name] for interval in seen] for name in seen[0]},
        "cpu_seconds": round(time.process_time() - started, 1),
    }
