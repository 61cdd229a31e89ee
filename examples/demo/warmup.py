"""Supervised warm-up: a policy that solves some prompts but not most, so that groups have both rights and wrongs."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from tqdm import tqdm

from .policy import Policy
from .rollout import accuracy, supervised_batch
from .tasks import Entry, Task

PROBE_EVERY = 25
PROBE_PROMPTS = 256


def warm_up(
    policy: Policy,
    task: Task,
    *,
    max_steps: int,
    target_accuracy: float,
    lr: float,
    batch_size: int,
    rng: random.Random,
    generator: torch.Generator,
    show: bool = True,
    measure: Callable[[Sequence[Entry]], float] | None = None,
) -> int:
    """Train on right answers until sampled accuracy on training prompts reaches the target; returns the steps taken.

    Training dynamics differ from seed to seed far more than the policies do that reach one accuracy, so the stop is by
    accuracy. Its probe draws from the training prompts: the held-out ones decide nothing.  measure: the accuracy of the
    policy on a probe; None: that of one sample per prompt.
    """
    optimizer = torch.optim.AdamW(policy.model.parameters(), lr=lr, weight_decay=0.0)
    reached = 0.0
    with tqdm(range(1, max_steps + 1), desc="warm-up", unit="step", disable=not show) as bar:
        for step in bar:
            batch = supervised_batch(policy, task, task.draw(rng, batch_size))
            logits = policy.logits(batch)
            ids, mask = batch.last_columns(logits)
            targets = torch.where(mask.bool(), ids, -100)
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), targets[:, 1:].flatten())
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(policy.model.parameters(), 1.0)
            optimizer.step()
            if step % PROBE_EVERY == 0:
                probe = task.draw(rng, PROBE_PROMPTS)
                if measure is None:
                    reached = accuracy(policy, task, probe, samples=1, generator=generator)
                else:
                    reached = measure(probe)
                bar.set_postfix(loss=f"{loss.item():.3f}", accuracy=f"{reached:.3f}")
                if reached >= target_accuracy:
                    return step
    return max_steps
