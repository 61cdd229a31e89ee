"""Part 0: which weights of the rollouts are the better direction, without training.

From one policy and one batch of rollouts, for each choice of weights a step against the gradient of sum_i w_i s_i, of
the same length for all: DIVERGENCE nats per token between the old policy and the new. What counts is the exact change
of accuracy. No optimiser, no learning rate and no sampling stand between weights and result.
"""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

import torch
from demo.policy import Policy
from demo.rollout import sample
from demo.sequences import Batch
from objectives import informative, rollout_means
from torch import Tensor

from conspo_kernels import token_logprobs

from . import protocol
from .protocol import Start
from .start import exact_accuracy, generator_of, start_of, task_of
from .training import read, rows_of


def rollout_weights(
    scores: Tensor, right: Tensor, group_weight: str, tau: float | None, margin: float
) -> Tensor:  # [g, k] each
    """-u shared among the right rollouts of a group, u among the wrong ones: u by `group_weight`, shares by tau.

    tau None: equal shares. Else ConSPO's: q_i / sum q among the right, softmax(s / tau) among the wrong. "mean q" of
    all right rollouts makes the whole ConSPO's weights.
    """
    positive, negative = right.sum(1, keepdim=True), (~right).sum(1, keepdim=True)
    rate = positive / right.shape[1]
    u = {"1": torch.ones_like(rate), "sqrt(p(1-p))": (rate * (1 - rate)).sqrt(), "N/(N+1)": negative / (negative + 1)}
    if tau is None:
        return u[group_weight] * (~right / negative - right / positive)
    wrong = torch.where(right, -torch.inf, scores / tau)
    q = torch.where(right, torch.sigmoid(wrong.logsumexp(1, keepdim=True) - (scores - margin) / tau), 0.0)
    total = q.sum(1, keepdim=True)
    return (u | {"mean q": total / positive})[group_weight] * (wrong.softmax(1) - q / total)


def nats(text: str, spread: float) -> float | None:
    """A factor's level in nats per token: "flat" has none, spreads are those of the scores."""
    number, _, unit = text.partition(" ")
    return None if text == "flat" else float(number) * (spread if unit.startswith("spread") else 1.0)


class Probe:
    """Steps of one length from one policy."""

    def __init__(self, policy: Policy, seen: Batch) -> None:
        """seen: the rollouts on which the length of a step is measured."""
        self.policy, self.seen = policy, seen
        self.parameters = list(policy.model.parameters())
        self.origin = [p.detach().clone() for p in self.parameters]
        self.before, self.mask = self._predictions()
        self.length = 0.1  # of the last step, in parameters: where the search for the next begins

    @torch.no_grad()
    def _predictions(self) -> tuple[Tensor, Tensor]:
        logits = self.policy.logits(self.seen)
        mask = self.seen.last_columns(logits)[1]
        return logits.log_softmax(-1), torch.nn.functional.pad(mask[:, 1:], (0, 1)) > 0

    def divergence(self) -> float:
        """KL(before || now) per response token, over the vocabulary."""
        now, mask = self._predictions()
        return (self.before.exp() * (self.before - now)).sum(-1)[mask].mean().item()

    @torch.no_grad()
    def move(self, gradients: list[Tensor]) -> float:
        """Go against the gradients until the divergence is right, to a per cent; the divergence reached."""
        norm = torch.stack([g.norm() for g in gradients]).norm()
        for _ in range(12):
            for p, start, g in zip(self.parameters, self.origin, gradients, strict=True):
                p.copy_(start - self.length / norm * g)
            reached = self.divergence()
            if abs(reached / protocol.DIVERGENCE - 1) < 0.01:
                break
            self.length *= min(3.0, (protocol.DIVERGENCE / max(reached, 1e-9)) ** 0.5)
        return reached

    @torch.no_grad()
    def back(self) -> None:
        for p, start in zip(self.parameters, self.origin, strict=True):
            p.copy_(start)


def probe(start: Start, warm_ups: Path) -> dict[str, Any]:
    """The exact change of accuracy of every direction in the protocol, from one policy."""
    rate, spoilt = protocol.STARTS[start.policy]
    policy = start_of("spell_backward", start.seed, warm_ups, rate, spoilt)
    began, task, group = time.process_time(), task_of("spell_backward"), protocol.DIRECTION_GROUP
    entries = task.draw(random.Random(f"paper {start.seed} prompts"), protocol.DIRECTION_PROMPTS)
    rollouts = sample(policy, task, entries, copies=group, generator=generator_of(start.seed, "rollouts"))
    rows = informative(rollouts.rewards, group).nonzero()[:, 0]
    batch, right = rows_of(rollouts.batch, rows), (rollouts.rewards[rows] > 0.5).view(-1, group)
    logprobs, mask, _entropy = read(policy, batch)
    scores = rollout_means(logprobs, mask).view(-1, group)
    spread = scores.std(1).mean().item()
    held_out = task.held_out[: protocol.HELD_OUT]
    before = exact_accuracy(policy, task, held_out)

    logits = policy.logits(batch)
    ids, response_mask = batch.last_columns(logits)
    connected = token_logprobs(logits, ids, response_mask=response_mask, shift=True)
    prober = Probe(policy, rows_of(rollouts.batch, torch.arange(protocol.DIRECTION_SEEN * group)))
    changes, divergences = [], []
    weights = [
        rollout_weights(scores, right, weight, nats(credit, spread), nats(margin, spread) or 0.0).flatten()
        for weight, credit, margin in protocol.DIRECTIONS
    ]
    losses = [(rollout_means(connected, mask) * w).sum() for w in weights]
    gradients = [torch.autograd.grad(loss, prober.parameters, retain_graph=True) for loss in losses]
    for direction in gradients:
        divergences.append(prober.move(list(direction)))
        changes.append(exact_accuracy(policy, task, held_out) - before)
    prober.back()
    return {
        "result": changes[protocol.DIRECTIONS.index(protocol.CONSPO)],
        "before": round(before, 5),
        "valid_groups": len(rows) / len(rollouts.rewards),
        "spread": round(spread, 4),
        "divergence": [round(min(divergences), 5), round(max(divergences), 5)],
        "change": [round(change, 6) for change in changes],
        "cpu_seconds": round(time.process_time() - began, 1),
    }
