"""The page's tables and figures, from the records. The page's own words stand between them and are written by hand."""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from demo.records import replace_atomically

from . import compare, protocol
from .protocol import MAIN, PRIMARY, SEEDS, SENSITIVITY, Results, Run, Start

PAGE = Path(__file__).parent.parent.parent / "docs" / "paper"
PAPER = {  # averages over its benchmarks, R1-Distill-Qwen-1.5B: figure 3, read off, and sections 5.2 and 5.3
    "conspo": 44.4, "tau 1": 40.0, "tau 5": 43.2, "tau 20": 43.6, "linear": 42.7, "M 0": 44.1, "M 0.05": 43.0,
    "alpha 0.1": 43.9, "alpha 1": 43.0,
}  # fmt: skip


def points(differences: Sequence[float], digits: int = 1) -> str:
    """Mean and interval in points."""
    if not differences:
        return ""
    mean, half = 100 * statistics.mean(differences), 100 * compare.half_width(differences)
    return f"{mean:+.{digits}f} ± {half:.{digits}f}" if len(differences) > 1 else f"{mean:+.{digits}f} (one seed)"


def directions(results: Results) -> Iterator[str]:
    """Part 0, by factors: changes of accuracy in points, paired over seeds."""
    yield f"| points of accuracy | {' | '.join(protocol.STARTS)} |"
    yield "|---|" + "---|" * len(protocol.STARTS)
    columns = [changes(results, policy) for policy in protocol.STARTS]
    if not any(columns):
        return
    cells = [points([change[protocol.LINEAR] for change in column], 2) for column in columns]
    yield f"| linear gap: group weight 1, equal shares | {' | '.join(cells)} |"
    for name in EFFECTS:
        cells = [points([effect(change, name) for change in column], 2) for column in columns]
        yield f"| {name} | {' | '.join(cells)} |"
    yield f"| seeds | {' | '.join(str(len(column)) for column in columns)} |"


Direction = tuple[str, str, str]  # group weight, credit, margin
Change = dict[Direction, float]  # of accuracy


def changes(results: Results, policy: str) -> list[Change]:
    """One for each seed that is there."""
    names = [Start(policy, seed).name for seed in protocol.DIRECTION_SEEDS]
    return [dict(zip(protocol.DIRECTIONS, results[name]["change"], strict=True)) for name in names if name in results]


def effects() -> Iterator[tuple[str, list[tuple[Direction, Direction]]]]:
    """What the table of part 0 shows: the mean of these differences between two directions."""
    weights, shares = protocol.GROUP_WEIGHTS, protocol.CREDITS
    yield "GRPO's direction - linear", [(protocol.GRPO, protocol.LINEAR)]
    yield "ConSPO's, 10 / 0.01 - linear", [(protocol.CONSPO, protocol.LINEAR)]
    for credit in shares[1:]:
        yield f"shares at tau {credit} - equal shares", [((w, credit, "0"), (w, "flat", "0")) for w in weights]
    for weight in weights[1:]:
        yield f"group weight {weight} - weight 1", [((weight, c, "0"), ("1", c, "0")) for c in shares]
    for margin in protocol.MARGINS[1:]:
        pairs = [(("mean q", c, margin), ("mean q", c, "0")) for c in shares[1:]]
        yield f"margin {margin} - none, in ConSPO's own group weight", pairs


def effect(change: Change, name: str) -> float:
    return statistics.mean(change[one] - change[other] for one, other in EFFECTS[name])


EFFECTS = dict(effects())


def tuning(results: Results, task: str) -> Iterator[str]:
    """Accuracy on the validation problems, mean of the tuning seeds, at each rate that was tried."""
    runs = {method: protocol.tuning(task, method, results)[0] for method in MAIN}
    rates = sorted({run.lr for some in runs.values() for run in some if run.name in results})
    if not rates:
        return
    yield f"| validation accuracy | {' | '.join(f'{lr:g}' for lr in rates)} |"
    yield "|---|" + "---|" * len(rates)
    for method, some in runs.items():
        best = protocol.tuning(task, method, results)[1]
        cells = []
        for lr in rates:
            found = list(compare.values(results, [run for run in some if run.lr == lr]).values())
            text = f"{statistics.mean(found):.1%}" if found else ""
            text += f" ({len(found)} of {len(protocol.tuning_seeds(task))} seeds)" * (
                0 < len(found) < len(protocol.tuning_seeds(task))
            )
            cells.append(f"**{text}**" if best is not None and lr == protocol.rate(best) else text)
        yield f"| {method} | {' | '.join(cells)} |"


def finals(results: Results, task: str, shift: int = 0) -> dict[str, list[Run]]:
    """By method, the runs at its best rate times 2^shift, of the seeds of which no run is missing."""
    methods = list(MAIN) if shift == 0 or task == "spell_backward" else PRIMARY
    runs = {method: list(protocol.finals(task, [method], (shift,), results)) for method in methods}
    return compare.complete(results, runs)


def main_table(results: Results, task: str) -> Iterator[str]:
    """Part 1: every method at its best rate and at the two beside it."""
    best, half, twice = (finals(results, task, shift) for shift in (0, -1, 1))
    if not best["conspo"]:
        return
    yield f"{len(best['conspo'])} seeds."
    yield ""
    yield "| method | rate | accuracy | minus ConSPO, points | p | at half the rate | at twice |"
    yield "|---|---|---|---|---|---|---|"
    differences = {method: compare.paired(results, runs, best["conspo"]) for method, runs in best.items()}
    p_values = {method: compare.sign_flip(d) for method, d in differences.items() if method != "conspo"}
    primary = "grpo" if task == "spell_backward" else None
    corrected = compare.holm({method: p for method, p in p_values.items() if method != primary})
    for method in sorted(best, key=lambda method: -statistics.mean(differences[method])):
        p = f"**{p_values[method]:.3f}**" if method == primary else f"{corrected.get(method, 1):.3f}"
        cells = [method, f"{best[method][0].lr:g}", mean_of(results, best[method])]
        cells += ["", ""] if method == "conspo" else [points(differences[method]), p]
        cells += [mean_of(results, beside.get(method, [])) for beside in (half, twice)]
        yield f"| {' | '.join(cells)} |"


def rates_table(results: Results, task: str) -> Iterator[str]:
    """Part 1 as a curve: differences to ConSPO at the same rate, at the three rates that ConSPO has."""
    runs: dict[str, dict[float, list[Run]]] = {method: {} for method in MAIN}
    for run in protocol.finals(task, list(MAIN), (-1, 0, 1), results):
        if run.name in results:
            runs[run.method].setdefault(run.lr, []).append(run)
    rates = sorted(runs["conspo"])
    if len(rates) < 2:
        return
    yield f"| minus ConSPO at the same rate, points | {' | '.join(f'{lr:g}' for lr in rates)} |"
    yield "|---|" + "---|" * len(rates)
    for method in MAIN:
        if method != "conspo":
            pairs = [compare.paired(results, runs[method].get(lr, []), runs["conspo"][lr]) for lr in rates]
            yield f"| {method} | {' | '.join(points(differences) for differences in pairs)} |"


def part_1(results: Results, task: str) -> Iterator[str]:
    yield from main_table(results, task)
    yield ""
    yield from rates_table(results, task)


def mean_of(results: Results, runs: Sequence[Run], of: int = len(SEEDS)) -> str:
    """Accuracy, with the number of seeds where there are fewer."""
    found = list(compare.values(results, runs).values())
    some = f" ({len(found)} seeds)" if len(found) < of else ""
    return f"{statistics.mean(found):.1%}{some}" if found else ""


def cause_runs(results: Results, updates: str) -> dict[float, dict[str, list[Run]]]:
    """Part 2's runs by rate and method, of the seeds that every method has at that rate."""
    runs: dict[float, dict[str, list[Run]]] = {}
    for run in protocol.cause(results):
        if run.updates == updates:
            runs.setdefault(run.lr, {}).setdefault(run.method, []).append(run)
    return {lr: compare.complete(results, runs[lr]) for lr in sorted(runs)}


def cause_table(results: Results) -> Iterator[str]:
    """Part 2: accuracy and, in points, what it has over ConSPO without a bound; GRPO in mini-batches is in part 1."""
    for updates in ("mini-batches", "repetition"):
        by_rate = cause_runs(results, updates)
        if not any(runs["conspo"] for runs in by_rate.values()):
            continue
        yield f"| {updates} | {' | '.join(f'{lr:g}' for lr in by_rate)} |"
        yield "|---|" + "---|" * len(by_rate)
        for method in next(iter(by_rate.values())):
            cells = [mean_of(results, runs[method], len(protocol.CAUSE_SEEDS)) for runs in by_rate.values()]
            if method != "conspo":
                gains = [points(compare.paired(results, runs[method], runs["conspo"])) for runs in by_rate.values()]
                cells = [f"{cell} ({gain})" if gain else cell for cell, gain in zip(cells, gains, strict=True)]
            yield f"| {method} | {' | '.join(cells)} |"
        yield ""


def sensitivity_runs(results: Results) -> dict[str, list[Run]]:
    """Part 3's runs by what differs, of the seeds that all have."""
    runs: dict[str, list[Run]] = {}
    for run in protocol.sensitivity(results):
        runs.setdefault(run.method, []).append(run)
    return compare.complete(results, runs)


def sensitivity_table(results: Results) -> Iterator[str]:
    """Part 3: one constant at a time, beside the paper's values."""
    runs = sensitivity_runs(results)
    if not any(runs.values()):
        return
    yield f"{len(runs['conspo'])} seeds."
    yield ""
    yield "| ConSPO with | accuracy | minus tau 10, M 0.01, alpha 0.3, points | p | the paper's average |"
    yield "|---|---|---|---|---|"
    differences = {name: compare.paired(results, runs[name], runs["conspo"]) for name in SENSITIVITY}
    corrected = compare.holm({name: compare.sign_flip(d) for name, d in differences.items()})
    for name in ("conspo", *SENSITIVITY):
        cells = ["", ""] if name == "conspo" else [points(differences[name]), f"{corrected[name]:.3f}"]
        yield f"| {name} | {mean_of(results, runs[name])} | {' | '.join(cells)} | {PAPER.get(name, '')} |"


def pretrained_curves(results: Results) -> dict[str, list[list[float]]]:
    """Held-out accuracy before and after, by method and seed."""
    curves: dict[str, list[list[float]]] = {}
    for unit in protocol.planned(results)["pretrained"]:
        if isinstance(unit, Run) and unit.name in results:
            curves.setdefault(unit.method, []).append(results[unit.name]["accuracy"])
    return curves


def pretrained_table(results: Results) -> Iterator[str]:
    """Part 4: before and after, by seed."""
    yield "| method | held-out accuracy by seed, before -> after |"
    yield "|---|---|"
    for method, curves in pretrained_curves(results).items():
        yield f"| {method} | {'; '.join(f'{curve[0]:.1%} -> {curve[-1]:.1%}' for curve in curves)} |"


TABLES: dict[str, Callable[[Results], Iterator[str]]] = {
    "directions": directions,
    "tuning": lambda results: tuning(results, "spell_backward"),
    "main": lambda results: part_1(results, "spell_backward"),
    "cause": cause_table,
    "sensitivity": sensitivity_table,
    "pretrained": pretrained_table,
    "sums_tuning": lambda results: tuning(results, "long_sums"),
    "sums": lambda results: part_1(results, "long_sums"),
}


# Figures: what they show in words, and the parts of which one has a run. A table of the same name stands below.
FIGURES = {
    "overview": ("Four parts in one figure: means over seeds with 95 % intervals", ("directions", "tuning")),
    "directions": ("Change of accuracy by shares, group weight and margin, for four starts", ("directions",)),
    "main": ("Accuracy over a run, by learning rate, and against ConSPO", ("tuning",)),
    "cause": ("Divergence, gradient norm and scores over a run, by score and bound", ("cause",)),
    "sensitivity": ("Accuracy by tau, margin and warm-up, and the paper's averages", ("sensitivity",)),
    "pretrained": ("Accuracy before and after, by method and seed", ("pretrained",)),
    "sums": ("The sums: accuracy over a run, by learning rate, and against ConSPO", ("sums, tuning",)),
}


def drawn(results: Results) -> list[str]:
    """The figures whose parts have runs of their own: ConSPO's of part 1 count in part 1 alone."""
    plan = protocol.planned(results)
    main = {unit.name for unit in plan["main"] + plan["neighbours"]}
    there = {part for part, units in plan.items()
             if any(unit.name in results and (part in ("main", "neighbours") or unit.name not in main)
                    for unit in units)}  # fmt: skip
    return [name for name, (_about, parts) in FIGURES.items() if there & set(parts)]


def filled(page: str, results: Results) -> str:
    """The page with the figures and tables of these records between its marks."""
    figures = drawn(results)

    def block(match: re.Match[str]) -> str:
        name = match["name"]
        body = f"![{FIGURES[name][0]}]({name}.png)\n\n" if name in figures else ""
        if name in TABLES:
            lines = list(TABLES[name](results))
            body += "\n".join(lines) if len([line for line in lines if line]) > 2 else "No run yet."
        return f"<!-- records: {name} -->\n\n{body.strip()}\n\n<!-- end -->"

    return re.sub(r"<!-- records: (?P<name>\w+) -->.*?<!-- end -->", block, page, flags=re.DOTALL)


def write(results: Results, page: Path = PAGE) -> None:
    """Tables into index.md, and the figures beside it."""
    from . import figures

    text = filled((page / "index.md").read_text(encoding="utf-8"), results)
    replace_atomically(page / "index.md", lambda file: file.write_text(text, encoding="utf-8"))
    figures.draw(results, page)
