"""The page's figures, from the records: an overview, and one for each part that has runs."""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # before pyplot is imported: there may be no display
import matplotlib.pyplot as plt
from demo.records import replace_atomically

from . import compare, protocol, report
from .protocol import CAUSE, MAIN, Results, Run

DPI = 100
TASK = "spell_backward"
COLOURS = {name: f"C{index}" for index, name in enumerate(MAIN)} | {
    "conspo, trust region": "C9", "conspo of ratios": "C8", "conspo of clipped ratios": "C7",
}  # fmt: skip


def seeds_of(count: int) -> str:
    return f"{count} seed{'s' * (count != 1)}"


def empty(ax: Any) -> None:
    ax.text(0.5, 0.5, "no whole seed yet", ha="center", va="center", color="0.5", transform=ax.transAxes)
    ax.set(xticks=[], yticks=[])


def with_intervals(ax: Any, rows: dict[str, list[float]], unit: str) -> None:
    """A row for each list of differences, in points: a dot per seed, the mean and its 95 % interval."""
    order = sorted((name for name in rows if rows[name]), key=lambda name: statistics.mean(rows[name]))
    if not order:
        empty(ax)
        return
    for height, name in enumerate(order):
        values = [100 * value for value in rows[name]]
        half = compare.half_width(values) if len(values) > 1 else 0.0
        ax.plot(values, [height] * len(values), "o", color="C0", alpha=0.3, markersize=3.5, markeredgewidth=0)
        ax.errorbar(statistics.mean(values), height, xerr=half, fmt="o", color="C0", capsize=3, markersize=5)
    ax.axvline(0, color="0.4", linewidth=1)
    ax.set_yticks(range(len(order)), [f"{name} ({len(rows[name])})" for name in order], fontsize=8)
    ax.set_xlabel(unit, fontsize=9)
    ax.grid(axis="x", alpha=0.3)


def against_conspo(results: Results, task: str) -> dict[str, list[float]]:
    runs = report.finals(results, task)
    return {name: compare.paired(results, runs[name], runs["conspo"]) for name in runs if name != "conspo"}


def against_centre(results: Results) -> dict[str, list[float]]:
    """Differences of part 3 to ConSPO's own constants."""
    runs = report.sensitivity_runs(results)
    return {name: compare.paired(results, runs[name], runs["conspo"]) for name in runs if name != "conspo"}


def credit_effects(results: Results) -> dict[str, dict[str, list[float]]]:
    """Part 0, by start: the change against equal shares, mean over group weights, of each tau; one value per seed."""
    names = [f"shares at tau {credit} - equal shares" for credit in protocol.CREDITS[1:]]
    return {
        policy: {name: [report.effect(change, name) for change in report.changes(results, policy)] for name in names}
        for policy in protocol.STARTS
    }


def draw_credit(ax: Any, results: Results) -> None:
    """tau falls to the right: the sharper the shares, the further right."""
    for index, (policy, effects) in enumerate(credit_effects(results).items()):
        if not any(effects.values()):
            continue
        means = [100 * statistics.mean(values) for values in effects.values()]
        halves = [100 * compare.half_width(values) if len(values) > 1 else 0.0 for values in effects.values()]
        count = len(next(iter(effects.values())))
        where = [x + 0.06 * (index - 1.5) for x in range(len(means))]
        ax.errorbar(where, means, yerr=halves, marker="o", capsize=3, label=f"{policy} ({seeds_of(count)})")
    ax.axhline(0, color="0.4", linewidth=1)
    ax.set_xticks(range(4), [f"tau: {credit}" for credit in protocol.CREDITS[1:]])
    ax.set_ylabel("points against equal shares")
    ax.legend(fontsize=8, title="start", title_fontsize=8)
    ax.grid(alpha=0.3)


def draw_cause(ax: Any, results: Results) -> None:
    """What each method of part 2 has over ConSPO without a bound, by rate: mini-batches, then repetition."""
    by_rate = [(updates, lr, runs) for updates in ("mini-batches", "repetition")
               for lr, runs in report.cause_runs(results, updates).items() if len(runs["conspo"]) > 1]  # fmt: skip
    if not by_rate:
        empty(ax)
        return
    for index, name in enumerate(("grpo", *list(CAUSE)[1:])):
        for place, (_updates, _lr, runs) in enumerate(by_rate):
            if name in runs:
                gains = [100 * gain for gain in compare.paired(results, runs[name], runs["conspo"])]
                label = name if place == len(by_rate) - 1 else None
                where, half = place + 0.12 * (index - 1.5), compare.half_width(gains)
                ax.errorbar(where, statistics.mean(gains), yerr=half, fmt="o", capsize=2, markersize=4,
                            color=COLOURS[name], label=label)  # fmt: skip
    ax.axhline(0, color="0.4", linewidth=1)
    ax.set_xticks(range(len(by_rate)), [f"{updates}\n{lr:g}" for updates, lr, _runs in by_rate], fontsize=8)
    ax.set_ylabel("points against ConSPO without a bound")
    ax.legend(fontsize=8, loc="upper left")
    ax.grid(axis="y", alpha=0.3)


def overview(results: Results) -> Any:
    figure, axes = plt.subplots(2, 2, figsize=(12, 8.5), constrained_layout=True)
    unit = "accuracy minus ConSPO's, points (seeds)"
    with_intervals(axes[0, 0], against_conspo(results, TASK), unit)
    axes[0, 0].set_title("1. Baselines, each rollout used once", fontsize=10)
    draw_credit(axes[0, 1], results)
    axes[0, 1].set_title("0. One step of equal divergence: sharper credit", fontsize=10)
    draw_cause(axes[1, 0], results)
    axes[1, 0].set_title("2. A batch used again, by score and bound", fontsize=10)
    with_intervals(axes[1, 1], against_centre(results), "accuracy minus tau 10, M 0.01, alpha 0.3, points (seeds)")
    axes[1, 1].set_title("3. ConSPO's constants, one at a time", fontsize=10)
    figure.suptitle(f"{TASK}: means over seeds with 95 % intervals")
    return figure


def directions(results: Results) -> Any:
    figure, axes = plt.subplots(1, 2, figsize=(12, 4.5), constrained_layout=True)
    draw_credit(axes[0], results)
    axes[0].set_title("shares within a group", fontsize=10)
    names = [name for name in report.EFFECTS if " - linear" in name or name.startswith(("group", "margin"))]
    for index, policy in enumerate(protocol.STARTS):
        found = report.changes(results, policy)
        for height, name in enumerate(names):
            values = [100 * report.effect(change, name) for change in found]
            if values:
                half = compare.half_width(values) if len(values) > 1 else 0.0
                axes[1].errorbar(statistics.mean(values), height + 0.12 * (index - 1.5), xerr=half, fmt="o",
                                 color=f"C{index}", capsize=2, markersize=4)  # fmt: skip
    axes[1].axvline(0, color="0.4", linewidth=1)
    axes[1].set_yticks(range(len(names)), [name.replace(", in ", ",\nin ") for name in names], fontsize=8)
    axes[1].set_xlabel("points")
    axes[1].set_title("group weights and margins", fontsize=10)
    axes[1].grid(alpha=0.3)
    figure.suptitle("Part 0: the exact change of accuracy after a step of 0.02 nats per token")
    return figure


def mean_curve(results: Results, runs: Sequence[Run], name: str) -> list[float]:
    """Mean over the runs that are there, and over the numbers among their values; NaN where none has one."""
    rows = [results[run.name] for run in runs if run.name in results]
    columns = zip(*(row["accuracy"] if name == "accuracy" else row["seen"][name] for row in rows), strict=True)
    numbers = ([value for value in column if value is not None] for column in columns)
    return [statistics.mean(values) if values else math.nan for values in numbers]


def main_part(results: Results, task: str = TASK) -> Any:
    figure, axes = plt.subplots(1, 3, figsize=(14, 4.5), constrained_layout=True)
    every, finals = protocol.SIZES[task].every, report.finals(results, task)
    for method in MAIN:
        curve = mean_curve(results, finals[method], "accuracy")
        if curve:
            axes[0].plot([every * i for i in range(len(curve))], [100 * y for y in curve], label=method,
                         color=COLOURS[method], linewidth=2.2 if method == "conspo" else 1.2)  # fmt: skip
        runs, _best = protocol.tuning(task, method, results)
        rates = sorted({run.lr for run in runs if run.name in results})
        heights = [100 * statistics.mean(compare.values(results, [r for r in runs if r.lr == lr]).values())
                   for lr in rates]  # fmt: skip
        axes[1].plot(rates, heights, marker="o", markersize=4, color=COLOURS[method], label=method,
                     linewidth=2.2 if method == "conspo" else 1.2)  # fmt: skip
    axes[0].set(xlabel="batch of rollouts", ylabel="held-out accuracy, %", title="at the best rate")
    axes[1].set(xlabel="learning rate", ylabel="validation accuracy, %", title="tuning seeds")
    axes[1].set_xscale("log")
    tried = sorted({float(x) for line in axes[1].get_lines() for x in line.get_xdata()})
    axes[1].set_xticks(tried, [f"{lr:g}" for lr in tried], minor=False)
    axes[1].set_xticks([], minor=True)
    axes[1].legend(fontsize=7)
    with_intervals(axes[2], against_conspo(results, task), "accuracy minus ConSPO's, points (seeds)")
    for ax in axes[:2]:
        ax.grid(alpha=0.3)
    figure.suptitle(f"Part 1: {task}, each rollout used once in four mini-batches")
    return figure


def cause_part(results: Results) -> Any:
    """Courses over a run at the rate that is ConSPO's best in mini-batches, halved for repetition."""
    figure, axes = plt.subplots(2, 4, figsize=(15, 6.5), constrained_layout=True)
    names = {"kl": "KL over a batch, nats per token", "norm_last": "norm of the last gradient",
             "wrong_change": "change of wrong scores", "right_change": "change of right scores"}  # fmt: skip
    for row, updates in zip(axes, ("mini-batches", "repetition"), strict=True):
        lr, by_method = list(report.cause_runs(results, updates).items())[1]  # the rate in the middle
        count = len(by_method["conspo"])
        for method, runs in by_method.items():
            for ax, name in zip(row, names, strict=True):
                curve = mean_curve(results, runs, name)
                ax.plot(range(1, len(curve) + 1), curve, color=COLOURS[method], label=method, linewidth=1.5)
        for ax, title in zip(row, names.values(), strict=True):
            ax.set_title(f"{updates}, {lr:g}, {seeds_of(count)}:\n{title}", fontsize=8)
            ax.grid(alpha=0.3)
            if not count:
                empty(ax)
            elif "KL" in title or "norm" in title:
                ax.set_yscale("log")
        if count:
            row[0].legend(fontsize=7)
    figure.suptitle("Part 2: what one batch does to the policy, by eighths of a run")
    return figure


def sensitivity_part(results: Results) -> Any:
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.5), constrained_layout=True)
    differences = against_centre(results)
    with_intervals(axes[0], differences, "accuracy minus tau 10, M 0.01, alpha 0.3, points (seeds)")
    axes[0].set_title("here", fontsize=10)
    centre = report.PAPER["conspo"]
    names = sorted((name for name in report.PAPER if name != "conspo"), key=lambda name: report.PAPER[name])
    axes[1].barh(range(len(names)), [report.PAPER[name] - centre for name in names], color="0.6")
    axes[1].set_yticks(range(len(names)), names, fontsize=8)
    axes[1].set_xlabel("average minus that of the paper's constants, points")
    axes[1].set_title("the paper, one run each (figure 3, section 5.3)", fontsize=10)
    axes[1].grid(axis="x", alpha=0.3)
    figure.suptitle("Part 3: ConSPO's constants, one at a time")
    return figure


def pretrained_part(results: Results) -> Any:
    figure, ax = plt.subplots(figsize=(6, 4), constrained_layout=True)
    for method, curves in report.pretrained_curves(results).items():
        for seed, curve in enumerate(curves):
            ends = [100 * curve[0], 100 * curve[-1]]
            ax.plot([0, 1], ends, marker="o", color=COLOURS[method], label=None if seed else method)
    ax.set_xticks([0, 1], ["before", "after"])
    ax.set_ylabel("held-out accuracy, %")
    ax.set_title("Part 4: SmolLM2-135M-Instruct, a line per seed", fontsize=10)
    ax.legend(fontsize=8)
    ax.grid(alpha=0.3)
    return figure


DRAW: dict[str, Callable[[Results], Any]] = {
    "overview": overview,
    "directions": directions,
    "main": main_part,
    "cause": cause_part,
    "sensitivity": sensitivity_part,
    "pretrained": pretrained_part,
    "sums": functools.partial(main_part, task="long_sums"),
}


def draw(results: Results, folder: Path) -> None:
    """The figures of the parts that have runs."""
    for name in report.drawn(results):
        figure = DRAW[name](results)
        replace_atomically(folder / f"{name}.png", functools.partial(figure.savefig, dpi=DPI))
        plt.close(figure)
