"""The gpu suite: all that a GPU has to settle, each part in a process of its own, in at most seven minutes.

python -m benchmarks.run --suite gpu --out DIR            # needs PyTorch, Triton, numpy and a checkout, no more
python -m benchmarks.run --suite gpu-tiny --out DIR       # the same on tiny shapes and a simulated GPU

What is cheap and decides most comes first. A part ends at its time: what it has written by then counts, and time it
leaves goes to the parts after it. A process that a broken kernel takes down takes no other part with it.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.gpu_suite.targets import WORDS, Rows, table, verdicts
from benchmarks.gpu_suite.triton_cache import binaries
from benchmarks.timing.fused_linear import OPS as LINEAR_OPS
from benchmarks.timing.logits_path import OPS, OURS
from benchmarks.timing.tables import markdown, write

REPOSITORY = Path(__file__).resolve().parents[2]
SECONDS = 420  # of the whole suite
START = 20  # seconds until the first part: `import torch` on a cold disk
# Of Triton's compilations, counted: 37 binaries in the decisive gradients, 66 more in all gradients, each 0.3 to 1 s of
# one core. The parts hold them; with a cache that was made beforehand (`benchmarks/warm.py`) there are next to none.
WORKERS = 8  # of the tests; each compiles for itself, and holds a few GB
SLOW = ["torch.compile", "Liger chunked GRPO"]  # inductor takes seconds for each op and shape: a part of their own
LONG = ["tests of a GPU", "all gradients", "shared tests"]  # part of the tests without a GPU, too
# What tells most about right and wrong, in two dtypes.
DECISIVE = ["conspo_loss", "linear_conspo_loss", "weighted_score_loss", "linear_weighted_score_loss"]


class Part(NamedTuple):
    """seconds: its share of the suite's time.  needs: a module without which it is not run."""

    name: str
    arguments: list[str]
    seconds: float
    needs: str | None = None


def parts(suite: str, out: Path, wheels: Path | None) -> list[Part]:
    """What is run, in this order, as `python ARGUMENTS`."""
    tiny = suite == "gpu-tiny"
    to, at = ["--out", str(out)], ["--device", "cuda"]
    repeats = ["--repeats", "1", "--warmups", "1"] if tiny else ["--repeats", "7"]
    run = ["-m", "benchmarks.run", "--suite", suite, "--implementation", "triton", *at, *to, *repeats]
    run += ["--wheels", str(wheels.resolve())] if wheels else []
    tests = ["-m", "pytest", "-q", "-m", "gpu and not slow", "-p", "no:cacheprovider"]
    if importlib.util.find_spec("xdist"):
        tests += ["-n", str(min(WORKERS, os.cpu_count() or 1)), "--dist", "worksteal"]
    check = ["-m", "conspo_kernels", "gradcheck", *at, "--implementation", "triton"]
    decisive = [
        *check,
        "--dtype",
        "bf16",
        *(["fp32"] * (not tiny)),
        "--op",
        *(["sequence_scores"] if tiny else DECISIVE),
    ]
    only = ["--provider", OURS, "eager", f"{OURS}, half of the groups valid"] if tiny else ["--skip", *SLOW]
    slow = ["forward", "loss + backward", "linear, known weights"]
    compiled = [*run, "--name", "compiled", "--target", "L1", "F2", "--provider", OURS, *SLOW, "--op", *slow]
    all_parts = [
        Part("ceilings", ["-m", "benchmarks.timing.ceilings", *at, *to, *(["--tiny"] * tiny)], 30),
        Part("decisive gradients", decisive, 35),
        Part("tests of a GPU", [*tests, "--stop-after", "30", "tests/backends/test_gpu.py"], 40, needs="pytest"),
        Part("logits", [*run, "--name", "logits", *only, "--op", *OPS, "scores + backward"], 90),
        Part("linear", [*run, "--name", "linear", *only, "--op", *LINEAR_OPS], 75),
        Part("behaviour", ["-m", "benchmarks.timing.behaviour", "--suite", suite, *to], 25),
        Part("all gradients", check, 45),
        Part("shared tests", [*tests, "--stop-after", "20", "--ignore", "tests/backends/test_gpu.py"], 30, "pytest"),
        Part("compiled", compiled, 25),
        Part("report", ["-m", "benchmarks.report", str(out), *to, "--no-plots"], 5),
    ]
    return [part for part in all_parts if not (tiny and part.name in LONG)]


Outcome = dict[str, Any]


def run_part(part: Part, log: Path, seconds: float, environment: dict[str, str]) -> Outcome:
    """The part's process, its output in a log; what became of it."""
    if part.needs is not None and importlib.util.find_spec(part.needs) is None:
        return {"part": part.name, "status": "not run", "note": f"{part.needs} is not installed", "seconds": 0.0}
    started = time.monotonic()
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, *part.arguments], cwd=REPOSITORY, env=environment, stdout=output, stderr=output,
            start_new_session=True,
        )  # fmt: skip
        try:
            code = process.wait(max(seconds, 1.0))
            status = "done" if code == 0 else f"failed with exit code {code}"
        except subprocess.TimeoutExpired:
            status = f"stopped after {seconds:.0f} s"
        finally:  # also where this process is told to end
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # workers too; the group is this part's own
                process.wait()
    note = last_line(log)
    return {"part": part.name, "status": status, "note": note, "seconds": round(time.monotonic() - started, 1)}


def last_line(log: Path) -> str:
    lines = [line.strip("= \n") for line in log.read_text(encoding="utf-8", errors="replace").splitlines()]
    return next((line for line in reversed(lines) if line), "")[:100]


def read(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []


def interpreted(out: Path) -> bool:
    path = out / "environment.json"
    return path.exists() and json.loads(path.read_text(encoding="utf-8"))["triton_interpreted"]


def rivals(measured: Sequence[dict[str, Any]]) -> str:
    """The rivals that were timed, or why only PyTorch was."""
    others = [row for row in measured if not row["provider"].startswith((OURS, "limit"))]
    timed = dict.fromkeys(row["provider"] for row in others if row["status"] == "timed")
    absent = dict.fromkeys(row["note"] for row in others if row["status"] == "not installed")
    lines = [f"Timed beside ours: {', '.join(timed) or 'nobody'}."]
    if absent:
        lines.append(
            f"{'; '.join(absent)}. `python -m benchmarks.timing.wheels --out DIR` collects wheels for `--wheels DIR`."
        )
    return " ".join(lines)


def summary(out: Path, outcomes: Sequence[Outcome]) -> str:
    """What ran, and the targets; also written as targets.json and summary.md."""
    measured = [row for name in ("logits", "linear", "compiled") for row in read(out / f"{name}.json")]
    judged = verdicts(Rows(measured, read(out / "behaviour.json")))
    write(out / "targets.json", [{**verdict._asdict(), "verdict": verdict.word} for verdict in judged])
    lines = [(o["part"], o["status"], f"{o['seconds']:.0f}", o.get("compiled"), o["note"]) for o in outcomes]
    count = {word: sum(v.word == word for v in judged) for word in WORDS}
    ceilings = json.loads((out / "ceilings.json").read_text()) if (out / "ceilings.json").exists() else {}
    limits = "; ".join(f"{row['what']} {row['rate'] / 1e9:,.1f} G{row['unit']}" for row in ceilings.values())
    exposed = sum(row.get("outlasted", 0) > 0 for row in measured)
    stand_in = "A simulated GPU stood in for a real one: the figures mean nothing." if interpreted(out) else ""
    text = "\n\n".join(
        [
            *filter(None, [stand_in]),
            markdown(("part", "status", "s", "compiled", "last line"), lines, text_columns=2),
            f"Ceilings: {limits or 'not measured'}",
            rivals(measured),
            f"Queueing outlasted the spin in {exposed} of {len(measured)} rows: their time may be the host's.",
            table(judged),
            ", ".join(f"{number} {word}" for word, number in count.items()),
        ]
    )
    (out / "summary.md").write_text(text + "\n", encoding="utf-8")
    return text


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Who ends the suite ends the part that is running: it is no child that outlives its parent."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def run(suite: str, out: Path, wheels: Path | None) -> int:
    """All parts; 0 if each of them ended well, whatever the targets."""
    started = time.monotonic()
    out = out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])}
    environment["TRITON_INTERPRET"] = "1" if suite == "gpu-tiny" else "0"
    environment.pop("CONSPO_BUILD", None)  # the suite does not use the CPU's extension
    runner: Callable[..., Outcome] = run_part
    if suite == "gpu-tiny":
        if "triton" not in sys.modules:
            os.environ["TRITON_INTERPRET"] = "1"  # read when Triton defines the kernels
        from benchmarks.gpu_suite.dry_run import run_part as runner
    outcomes: list[Outcome] = []
    deadline = started
    cache = Path(os.environ.get("TRITON_CACHE_DIR", Path.home() / ".triton" / "cache"))
    print(f"Triton's cache {cache}: {binaries(cache)} binaries", flush=True)
    with _ended_by_signals():
        for part in parts(suite, out, wheels):
            deadline += part.seconds
            log = out / f"{part.name.replace(' ', '_')}.log"
            print(f"{part.name} ...", end=" ", flush=True)
            before = binaries(cache)
            outcomes.append(runner(part, log, deadline - time.monotonic(), environment))
            outcomes[-1]["compiled"] = binaries(cache) - before
            print(f"{outcomes[-1]['status']} in {outcomes[-1]['seconds']} s", flush=True)
            write(out / "parts.json", outcomes)
            text = summary(out, outcomes)
    print(f"\n{text}\n\n{time.monotonic() - started:.0f} s")
    return 0 if all(outcome["status"] in ("done", "not run") for outcome in outcomes) else 1
