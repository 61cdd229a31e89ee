"""One picture of a run: reward, score gap and margin over its steps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # before pyplot is imported: there may be no display
import matplotlib.pyplot as plt

from .records import replace_atomically

SMOOTHING = 10  # steps; a step's reward is a mean over few prompts, and jumps with their difficulty


def running_mean(values: Sequence[float], width: int) -> list[float]:
    """Mean over the last `width` values, over fewer at the start."""
    return [sum(values[max(0, end - width) : end]) / min(width, end) for end in range(1, len(values) + 1)]


def plot_run(rows: Sequence[dict[str, float]], path: Path, title: str) -> None:
    steps = [row["step"] for row in rows]
    reward = [row["reward_mean"] for row in rows]
    figure, (top, middle, bottom) = plt.subplots(3, 1, figsize=(7, 8), sharex=True, constrained_layout=True)
    top.plot(steps, reward, color="C0", alpha=0.3, label="step")
    top.plot(steps, running_mean(reward, SMOOTHING), color="C0", label=f"mean of {SMOOTHING} steps")
    top.set_ylabel("reward\n(fraction of rollouts solved)")
    top.legend(loc="lower right")
    middle.plot(steps, [row["conspo/score_gap"] for row in rows], color="C1")
    middle.set_ylabel("score gap, right - wrong\n(nats per token)")
    bottom.plot(steps, [row["conspo/margin"] for row in rows], color="C2")
    bottom.set_ylabel("margin\n(nats per token)")
    bottom.set_xlabel("step")
    for axes in (top, middle, bottom):
        axes.grid(alpha=0.3)
    figure.suptitle(title)
    replace_atomically(path, lambda temporary: figure.savefig(temporary, dpi=120))
    plt.close(figure)
