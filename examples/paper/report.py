"""The tables and the curves of the recorded runs: means over seeds, and differences to ConSPO in pairs of seeds."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from records import replace_atomically

from . import protocol
from .protocol import DECIDES, LEARNING_RATES, METHODS, SEEDS, TASKS, UPDATES, Run

matplotlib.use("Agg")  # before pyplot is imported: there may be no display
import matplotlib.pyplot as plt

Results = dict[str, dict[str, Any]]
Finished = dict[str, list[dict[str, Any]]]  # of a task and setting: by method, the rows of SEEDS
REFERENCE = "conspo"
CURVES = {
    "reward": "fraction of rollouts solved",
    "entropy": "entropy (nats per token)",
    "response_length": "response length (tokens)",
    "score_gap": "score gap, right - wrong (nats per token)",
    "valid_groups": "fraction of valid groups",
}
SMOOTHING = 10  # steps
DPI = 72


def final_rows(results: Results, task: str, setting: str, method: str) -> list[dict[str, Any]]:
    """The rows of SEEDS in their order; empty unless all are there."""
    validation = {name: row["validation_accuracy"] for name, row in results.items()}
    taken = protocol.chosen(task, setting, method, validation)
    if taken is None:
        return []
    rows = [results.get(run.name) for run in protocol.final_runs(task, setting, method, taken)]
    return [row for row in rows if row is not None] if None not in rows else []


def finished(results: Results, task: str, setting: str) -> Finished:
    """The methods that have all their rows."""
    rows = {method: final_rows(results, task, setting, method) for method in protocol.methods_in(setting)}
    return {method: there for method, there in rows.items() if there}


def compared(done: Finished) -> dict[str, list[float]]:
    """Held-out accuracy minus ConSPO's, seed by seed, of every other method; nothing without ConSPO's."""
    if REFERENCE not in done:
        return {}
    pairs = {method: zip(rows, done[REFERENCE], strict=True) for method, rows in done.items() if method != REFERENCE}
    return {method: [row[DECIDES] - its[DECIDES] for row, its in rows] for method, rows in pairs.items()}


def standard_error(values: Sequence[float]) -> float:
    return statistics.stdev(values) / math.sqrt(len(values))


def sign_flip(differences: Sequence[float]) -> float:
    """Two-sided p-value of a mean difference: the share of sign assignments whose mean is at least as far from 0."""
    observed = abs(sum(differences))
    sums = [abs(sum(s * d for s, d in zip(signs, differences, strict=True)))
            for signs in itertools.product((1, -1), repeat=len(differences))]  # fmt: skip
    return sum(value >= observed - 1e-12 for value in sums) / len(sums)


def table(done: Finished, setting: str) -> Iterator[str]:
    """Markdown, the best method first; `> 2 SE` marks a difference to ConSPO beyond two standard errors."""
    yield "| method | constants, learning rate | held-out accuracy, mean ± SE | minus ConSPO, paired ± SE | p | |"
    yield "|---|---|---|---|---|---|"
    against = compared(done)
    lines = []
    for method, rows in done.items():
        values = [row[DECIDES] for row in rows]
        run = Run(**rows[0]["run"])
        settings = ", ".join(k if v is True else f"{k} {v:g}" for k, v in run.constants.items()) or "none of its own"
        cells = [method, f"{settings}; {run.lr:g}", f"{statistics.mean(values):.1%} ± {standard_error(values):.1%}"]
        if method not in against:
            cells += ["", "", ""]
        else:
            differences = against[method]
            mean, error = statistics.mean(differences), standard_error(differences)
            cells += [f"{mean:+.1%} ± {error:.1%}", f"{sign_flip(differences):.2f}"]
            cells.append("> 2 SE" if abs(mean) > 2 * error else "")
        lines.append((statistics.mean(values), f"| {' | '.join(cells)} |"))
    yield from (line for _value, line in sorted(lines, key=lambda pair: -pair[0]))
    for method, about in METHODS.items():
        if setting in about.same_as:
            yield f"| {method} | | equals {about.same_as[setting]} here | | | |"


def start(done: Finished) -> str:
    """The held-out accuracy of the policies that all methods start from."""
    values = [row["held_out_curve"]["0"] for row in done.get(REFERENCE, [])]
    return f"Before training: {statistics.mean(values):.1%} ± {standard_error(values):.1%}." if values else ""


def tuning_table(results: Results, task: str, setting: str) -> Iterator[str]:
    """Markdown: validation accuracy of the tuning seed after the last step, at each learning rate."""
    yield f"| validation accuracy, seed {protocol.TUNING_SEED} | {' | '.join(f'{lr:g}' for lr in LEARNING_RATES)} |"
    yield "|---|" + "---|" * len(LEARNING_RATES)
    for method in protocol.methods_in(setting):
        cells = []
        for lr in LEARNING_RATES:
            runs = [run for run in protocol.tuning_runs(task, setting, method) if run.lr == lr]
            rows = [results[run.name] for run in runs if run.name in results]
            cells.append(" / ".join(f"{row['validation_accuracy']:.1%}" for row in rows))
        yield f"| {method} | {' | '.join(cells)} |"


def running_mean(values: Sequence[float | None]) -> list[float]:
    """Over the last SMOOTHING steps; a step without a number (no valid group) does not count."""
    means = []
    for end in range(1, len(values) + 1):
        window = [value for value in values[max(0, end - SMOOTHING) : end] if value is not None]
        means.append(statistics.mean(window) if window else math.nan)
    return means


def plot(done: Finished, title: str, methods: Sequence[str], path: Path) -> None:
    """Means over seeds with bands of two standard errors: held-out accuracy, then what the rollouts show."""
    figure, axes = plt.subplots(2, 3, figsize=(13, 7), constrained_layout=True)
    for color, method in enumerate(methods):
        if method not in done:
            continue
        rows = done[method]
        steps = [int(step) for step in rows[0]["held_out_curve"]]
        series = [[row["held_out_curve"][step] for step in row["held_out_curve"]] for row in rows]
        _band(axes.flat[0], steps, series, color, method)
        for ax, name in zip(axes.flat[1:], CURVES, strict=True):
            smooth = [running_mean(row["curve"][name]) for row in rows]
            _band(ax, list(range(1, len(smooth[0]) + 1)), smooth, color, method)
    titles = [f"held-out accuracy, mean of {len(SEEDS)} seeds ± 2 SE", *CURVES.values()]
    for ax, name in zip(axes.flat, titles, strict=True):
        ax.set_title(name, fontsize=10)
        ax.set_xlabel("step")
        ax.grid(alpha=0.3)
    axes.flat[0].legend(fontsize=8)
    figure.suptitle(title)
    replace_atomically(path, lambda temporary: figure.savefig(temporary, dpi=DPI))
    plt.close(figure)


def _band(ax: Any, steps: list[int], series: list[list[float]], color: int, label: str) -> None:
    means = [statistics.mean(values) for values in zip(*series, strict=True)]
    errors = [2 * standard_error(values) for values in zip(*series, strict=True)]
    ax.plot(steps, means, color=f"C{color}", label=label, linewidth=1.2)
    low, high = ([m + sign * e for m, e in zip(means, errors, strict=True)] for sign in (-1, 1))
    ax.fill_between(steps, low, high, color=f"C{color}", alpha=0.15, linewidth=0)


def overview(results: Results, path: Path) -> None:
    """Every comparison on one page: a dot per seed, the mean and two standard errors."""
    shape = len(TASKS), len(UPDATES)
    figure, axes = plt.subplots(*shape, figsize=(12, 8), constrained_layout=True, squeeze=False)
    for ax, (task, setting) in zip(axes.flat, itertools.product(TASKS, UPDATES), strict=True):
        differences = compared(finished(results, task, setting))
        order = sorted(differences, key=lambda name: statistics.mean(differences[name]))
        for height, method in enumerate(order):
            points = [100 * value for value in differences[method]]
            mean, band = statistics.mean(points), 2 * standard_error(points)
            ax.plot(points, [height] * len(points), "o", color="C0", alpha=0.35, markersize=4, markeredgewidth=0)
            ax.errorbar(mean, height, xerr=band, fmt="o", color="C0", capsize=3)
        ax.axvline(0, color="0.4", linewidth=1)
        ax.set_yticks(range(len(order)), order)
        ax.set_title(f"{task}, {setting}", fontsize=10)
        ax.grid(axis="x", alpha=0.3)
    figure.suptitle(f"Held-out accuracy minus {REFERENCE}'s, in points: {len(SEEDS)} seeds, mean ± 2 standard errors")
    replace_atomically(path, lambda temporary: figure.savefig(temporary, dpi=DPI))
    plt.close(figure)


BASELINES = [name for name in METHODS if name == REFERENCE or name in ("grpo", "dapo", "dr_grpo", "disco")]
RATIOS = [name for name in METHODS if name in (REFERENCE, "grpo", "gmpo", "cispo", "sapo")]
ABLATIONS = [REFERENCE, *[name for name in METHODS if name.startswith(("conspo,", "linear"))]]
PLOTS = {"baselines": BASELINES, "ratios": RATIOS, "ablations": ABLATIONS}


def write(results: Results, out: Path) -> None:
    """report.md, the overview, and a plot for each task, setting and set of methods."""
    out.mkdir(parents=True, exist_ok=True)
    overview(results, out / "overview.png")
    hours = sum(row["seconds"] for row in results.values()) / 3600
    lines = [
        "# The paper in small: all tables and curves",
        "",
        f"Written by `make paper` from {len(results)} of {protocol.number_of_runs()} runs: {hours:.1f} hours of one",
        "thread, the warm-ups not counted. The protocol is `examples/paper/protocol.py`; each run is a line of",
        "`examples/paper/results/runs.jsonl`. [What follows from it](index.md) is on a page of its own.",
        "",
        f"SE: standard error over {len(SEEDS)} seeds. p: two-sided sign-flip test over them; its least value is",
        f"{2 / 2 ** len(SEEDS):.2f}.",
        "",
        "![Every method's held-out accuracy minus ConSPO's](overview.png)",
        "",
    ]
    for task, setting in itertools.product(TASKS, UPDATES):
        done, title = finished(results, task, setting), f"{task}, {setting}"
        lines += [f"## {title}", "", f"{TASKS[task].capitalize()}. {start(done)}", "", *table(done, setting), ""]
        for name, methods in PLOTS.items():
            if not done.keys().isdisjoint(methods):
                picture = f"{task}_{setting.replace(' ', '-')}_{name}.png"
                plot(done, title, methods, out / picture)
                lines += [f"![{title}: {name}]({picture})", ""]
        lines += ["Tuning, by learning rate; the candidates of the constants are apart by a slash:", ""]
        lines += [*tuning_table(results, task, setting), ""]
    replace_atomically(out / "report.md", lambda file: file.write_text("\n".join(lines), encoding="utf-8"))
