"""The study's runs that are not there yet, in the order of the protocol, then its page.

Records are lines of results/PART.jsonl, written as each run ends: a command that was stopped goes on where it was.

    PYTHONPATH=examples python -m paper                    # everything; hours
    PYTHONPATH=examples python -m paper --hours 1.5        # start no run after so long
    PYTHONPATH=examples python -m paper --plan             # what is there and what is missing, by part
    PYTHONPATH=examples python -m paper --page             # figures and tables from the records alone
    PYTHONPATH=examples python -m paper --repeat NAME      # a recorded run again, from its warm-up on: the same number,
                                                           # or exit code 1
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from . import protocol
from .protocol import Run, Unit

RESULTS = Path(__file__).parent / "results"
ROOT = Path(__file__).parent.parent.parent


def read(folder: Path) -> dict[str, dict[str, Any]]:
    """Records by the names of their units."""
    lines = [line for path in sorted(folder.glob("*.jsonl")) for line in path.read_text(encoding="utf-8").splitlines()]
    rows = [json.loads(line) for line in lines]
    return {protocol.unit_of(row).name: row for row in rows}


def conditions() -> dict[str, str]:
    """Under which a record came to be. Sources that no commit has raise: nobody could repeat the run."""
    from conspo_kernels import __version__
    from conspo_kernels.backends.registry import choose

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()

    sources = ("examples/*.py", "examples/demo", "examples/paper/*.py", "conspo_kernels", "csrc")
    changed = git("status", "--porcelain", "--", *sources)
    if changed:
        raise SystemExit(f"records name a commit: commit these first\n{changed}")
    import torch

    cpu = [line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
           if line.startswith("model name")] if sys.platform == "linux" else []  # fmt: skip
    kernels = choose("auto", torch.device("cpu"))
    return {
        "commit": git("rev-parse", "--short=12", "HEAD"),
        "versions": f"torch {torch.__version__}, conspo_kernels {__version__} ({kernels})",
        "processor": cpu[0] if cpu else platform.processor(),
    }


def perform(unit: Unit, warm_ups: Path) -> dict[str, Any]:
    from .direction import probe
    from .training import train

    return train(unit, warm_ups) if isinstance(unit, Run) else probe(unit, warm_ups)


def next_of(results: protocol.Results, only: str) -> tuple[str, Unit] | None:
    """The first unit that is missing, and its part."""
    for part, units in protocol.planned(results).items():
        for unit in units:
            if unit.name not in results and only in f"{part}: {unit.name}":
                return part, unit
    return None


def execute(out: Path, warm_ups: Path, only: str, hours: float) -> None:
    """One unit after another, recorded as each ends."""
    results, by, stop = read(out), conditions(), time.monotonic() + 3600 * hours
    with tqdm(initial=len(results), unit="run") as bar:
        while time.monotonic() < stop and (following := next_of(results, only)) is not None:
            part, unit = following
            bar.set_postfix_str(f"{part}: {unit.name}")
            row = {**protocol.parameters(unit), **perform(unit, warm_ups), **by}
            with (out / f"{part.replace(', ', '-')}.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(row, separators=(",", ":")) + "\n")
            results[unit.name] = row
            bar.update()


def repeat(name: str, results: protocol.Results) -> int:
    """A recorded unit once more, from nothing: 0 if it gives the recorded result to the last digit."""
    before = results[name]["result"]
    with tempfile.TemporaryDirectory() as warm_ups:
        after = perform(protocol.unit_of(results[name]), Path(warm_ups))["result"]
    print(f"{name}: recorded {before!r}, now {after!r}; recorded at {results[name]['commit']}")
    return int(before != after)


def plan(results: protocol.Results) -> str:
    """A line for each part: the runs that are there of those that can be named now, core-hours used and expected."""
    lines = []
    for part, units in protocol.planned(results).items():
        there = [results[unit.name]["cpu_seconds"] for unit in units if unit.name in results]
        hours = f"{sum(there) / 3600:.2f} core-hours, {protocol.HOURS[part]:.1f} expected"
        lines.append(f"{part:18} {len(there):4} of {len(units):4} runs named so far; {hours}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "python -m paper", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the records")
    parser.add_argument("--warm-ups", type=Path, default=Path("runs/paper"), help="folder of the policies at the start")
    parser.add_argument("--only", default="", help="units whose `PART: NAME` contains this")
    parser.add_argument("--hours", type=float, default=float("inf"), help="start no run after so long")
    parser.add_argument("--plan", action="store_true", help="what is there and what is missing")
    parser.add_argument("--page", action="store_true", help="figures and tables, no run")
    parser.add_argument("--repeat", metavar="NAME", help="one recorded run again")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    results = read(args.out)
    if args.plan:
        print(plan(results))
        return 0
    if args.repeat is not None:
        if args.repeat not in results:
            parser.error(f"--repeat: no recorded run has the name {args.repeat!r}")
        return repeat(args.repeat, results)
    if not args.page:
        execute(args.out, args.warm_ups, args.only, args.hours)
    from . import report

    report.write(read(args.out))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
