"""All runs of the protocol that are not there yet, then the report.

Results are lines of runs.jsonl, written as each run ends: a command that was stopped goes on where it was.

    PYTHONPATH=examples python -m paper                        # everything; hours
    PYTHONPATH=examples python -m paper --only running_sums    # runs whose name contains this
    PYTHONPATH=examples python -m paper --repeat NAME          # one recorded run again: the same number, or exit code 1
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from tqdm import tqdm

from . import protocol, report
from .protocol import Run
from .training import train

RESULTS = Path(__file__).parent / "results"
REPORT = Path(__file__).parent.parent.parent / "docs" / "paper"
Results = dict[str, dict[str, Any]]  # of a run, by its name


def read(path: Path) -> Results:
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    rows = [json.loads(line) for line in lines]
    return {Run(**row["run"]).name: row for row in rows}


def wanted(results: Results) -> list[Run]:
    """Every run that can be named now: tuning, and the final runs of what is tuned."""
    validation = {name: row["validation_accuracy"] for name, row in results.items()}
    runs = []
    for cell in protocol.cells():
        runs += protocol.tuning_runs(*cell)
        taken = protocol.chosen(*cell, validation)
        if taken is not None:
            runs += protocol.final_runs(*cell, taken)
    return runs


def execute(runs: Iterable[Run], out: Path, warm_ups: Path, workers: int, results: Results) -> None:
    """Run and record. Tuning and final runs of a cell may overlap with those of others, never with each other."""
    runs = list(runs)
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=spawn) as pool, tqdm(total=len(runs), unit="run") as bar:
        pending = [pool.submit(train, run, warm_ups) for run in runs]
        try:
            for future in as_completed(pending):
                row = future.result()
                with (out / "runs.jsonl").open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
                run = Run(**row["run"])
                results[run.name] = row
                bar.set_postfix_str(f"{run.name} {row[protocol.DECIDES]:.3f}")
                bar.update()
        except BaseException:
            for future in pending:
                future.cancel()
            raise


def make_warm_ups(runs: Iterable[Run], warm_ups: Path, workers: int) -> None:
    """The starting points, each by one process: two runs of a seed must not make it at once."""
    from .training import warmed_up

    missing = sorted({(run.task, run.seed) for run in runs})
    missing = [pair for pair in missing if not (warm_ups / f"warm-up_{pair[0]}_{pair[1]}.pt").exists()]
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=spawn) as pool:
        futures = [pool.submit(warmed_up, *pair, warm_ups) for pair in missing]
        for future in tqdm(as_completed(futures), total=len(futures), unit="warm-up", disable=not futures):
            future.result()


def repeat(name: str, results: Results, warm_ups: Path) -> int:
    """A recorded run once more: 0 if it gives the recorded accuracy."""
    before = results[name][protocol.DECIDES]
    after = train(Run(**results[name]["run"]), warm_ups)[protocol.DECIDES]
    print(f"{name}: recorded {before:.6f}, now {after:.6f}")
    return int(before != after)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m paper", description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of runs.jsonl")
    parser.add_argument("--report", type=Path, help="folder of report.md and the plots (docs/paper, or that of --out)")
    parser.add_argument("--warm-ups", type=Path, default=Path("runs/paper"), help="folder of the warmed-up policies")
    parser.add_argument("--workers", type=int, default=2, help="processes, one thread each")
    parser.add_argument("--only", default="", help="runs whose name contains this")
    parser.add_argument("--most", type=int, help="stop after so many runs")
    parser.add_argument("--repeat", metavar="NAME", help="one recorded run again")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    results = read(args.out / "runs.jsonl")
    if args.repeat is not None:
        if args.repeat not in results:
            parser.error(f"--repeat: no recorded run has the name {args.repeat!r}")
        return repeat(args.repeat, results, args.warm_ups)
    left = args.most
    while True:  # tuning first; what it decides adds the final runs
        runs = [run for run in wanted(results) if run.name not in results and args.only in run.name][:left]
        if not runs:
            break
        make_warm_ups(runs, args.warm_ups, args.workers)
        execute(runs, args.out, args.warm_ups, args.workers, results)
        left = None if left is None else left - len(runs)
    report.write(results, args.report or (REPORT if args.out == RESULTS else args.out))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
