"""A sweep over the demo's constants: tau, target margin, its warm-up, learning rate, and GRPO beside them.

Every run takes the same number of rollouts. The supervised warm-up of a seed is done once and read by all its runs. A
run whose line is already in `results.jsonl` is not repeated, so a sweep that was stopped goes on where it was.

    PYTHONPATH=examples python -m demo.sweep    # about 70 s a run on one core; results.jsonl and table.md in runs/sweep
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import train

from .records import replace_atomically

LAST = 10  # steps over which the end of a run is averaged
END_METRICS = (
    "reward_mean",
    "sampled_logprob_mean",
    "finished_fraction",
    "response_length_mean",
    "conspo/score_pos_mean",
    "conspo/score_neg_mean",
    "conspo/score_gap",
    "conspo/pos_prob_mean",
    "conspo/valid_group_fraction",
)


@dataclass(frozen=True)
class Trial:
    """What differs between runs; the rest is as in train.py."""

    loss: str = "conspo"
    tau: float = 1.0
    margin: float = 0.0
    margin_warmup: float = 0.5
    lr: float = 1e-4
    seed: int = 0

    def arguments(self) -> list[str]:
        return [f"--{name.replace('_', '-')}={value}" for name, value in asdict(self).items()]

    @property
    def name(self) -> str:
        return "_".join(str(value) for value in asdict(self).values())


TAUS = [Trial(tau=tau) for tau in (0.1, 0.3, 1.0, 3.0, 10.0)]
MARGINS = [Trial(margin=margin) for margin in (0.25, 0.5, 1.0, 2.0)]
SHARP_MARGINS = [Trial(tau=0.3, margin=margin) for margin in (0.5, 1.0)]
MARGIN_WARMUPS = [Trial(margin=0.5, margin_warmup=ratio) for ratio in (0.0, 1.0)]
BASELINE = [Trial(loss="grpo")]
LEARNING_RATES = [Trial(loss=loss, lr=lr) for lr in (3e-4, 1e-3) for loss in ("conspo", "grpo")]
SEEDS = [Trial(loss=loss, seed=seed) for seed in (1, 2) for loss in ("conspo", "grpo")]
TRIALS = [*TAUS, *BASELINE, *MARGINS, *SHARP_MARGINS, *MARGIN_WARMUPS, *LEARNING_RATES, *SEEDS]


def end_of_run(metrics_file: Path) -> dict[str, float]:
    """Means of the last steps; steps without a valid group have no score gap and count for nothing there."""
    rows = [json.loads(line) for line in metrics_file.read_text().splitlines()[-LAST:]]
    means = {}
    for name in END_METRICS:
        values = [row[name] for row in rows if row[name] is not None]
        means[name] = sum(values) / len(values) if values else float("nan")
    return means


def run(trial: Trial, out: Path, options: list[str]) -> dict[str, Any]:
    """One run of train.py in this process; raises KeyboardInterrupt where that was interrupted."""
    folder = out / trial.name
    warm_start = out / f"warm-up-{trial.seed}.pt"
    code = train.main([*options, *trial.arguments(), f"--warm-start={warm_start}", f"--out={folder}"])
    if code == train.INTERRUPTED:
        shutil.rmtree(folder)
        raise KeyboardInterrupt
    summary = json.loads((folder / "summary.json").read_text())
    return {
        **asdict(trial),
        "steps": summary["steps"],
        "accuracy_before": summary["accuracy_before"],
        "accuracy_after": summary["accuracy_after"],
        "greedy_accuracy_before": summary["details"]["greedy_accuracy_before"],
        "greedy_accuracy_after": summary["details"]["greedy_accuracy_after"],
        "seconds": summary["details"]["reinforcement_seconds"],
        "end": end_of_run(folder / "metrics.jsonl"),
    }


def final_scores(end: dict[str, float]) -> str:
    if math.isnan(end["conspo/score_gap"]):
        return "no group with a right one"
    return f"{end['conspo/score_pos_mean']:.2f} / {end['conspo/score_neg_mean']:.2f}"


def table(results: list[dict[str, Any]]) -> Iterator[str]:
    """Markdown; scores are those of the last steps' rollouts, in nats per token."""
    head = ["loss", "tau", "margin", "warm-up ratio", "lr", "seed", "sampled before -> after", "greedy before -> after"]
    head += ["right / wrong score at the end", "finished in time", "RL seconds"]
    yield f"| {' | '.join(head)} |"
    yield "|" + "---|" * len(head)
    for row in results:
        conspo, curriculum = row["loss"] == "conspo", row["loss"] == "conspo" and row["margin"] > 0
        cells = [
            row["loss"],
            f"{row['tau']:g}" if conspo else "",
            f"{row['margin']:g}" if conspo else "",
            f"{row['margin_warmup']:g}" if curriculum else "",
            f"{row['lr']:.0e}".replace("e-0", "e-"),
            str(row["seed"]),
            f"{row['accuracy_before']:.1%} -> {row['accuracy_after']:.1%}",
            f"{row['greedy_accuracy_before']:.1%} -> {row['greedy_accuracy_after']:.1%}",
            final_scores(row["end"]),
            f"{row['end']['finished_fraction']:.0%}",
            f"{row['seconds']:.0f}",
        ]
        yield f"| {' | '.join(cells)} |"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], epilog="Other options go to train.py, for every run."
    )
    parser.add_argument("--sweep-out", type=Path, default=Path("runs/sweep"))
    args, options = parser.parse_known_args()
    out: Path = args.sweep_out
    out.mkdir(parents=True, exist_ok=True)
    lines = out / "results.jsonl"
    results = [json.loads(line) for line in lines.read_text().splitlines()] if lines.exists() else []
    done = {Trial(**{name: row[name] for name in asdict(Trial())}) for row in results}
    try:
        for number, trial in enumerate(TRIALS, start=1):
            if trial in done:
                continue
            print(f"[{number}/{len(TRIALS)}] {trial}", flush=True)
            results.append(run(trial, out, options))
            with lines.open("a", encoding="utf-8") as file:
                file.write(json.dumps(results[-1]) + "\n")
    except KeyboardInterrupt:
        print("interrupted; the runs that ended are kept")
        return train.INTERRUPTED
    finally:
        replace_atomically(out / "table.md", lambda file: file.write_text("\n".join(table(results)) + "\n"))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
