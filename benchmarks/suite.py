"""The gpu suite: all that a GPU has to settle, each part in a process of its own, in under eight minutes.

python -m benchmarks.run --suite gpu --out DIR            # needs PyTorch, Triton and a checkout, no more
python -m benchmarks.run --suite gpu-tiny --out DIR       # the same on tiny shapes under Triton's interpreter

A part ends at its time: what it has written by then counts, and time it leaves goes to the parts after it. A process
that a broken kernel takes down takes no other part with it.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .fused_linear import OPS as LINEAR_OPS
from .logits_path import OPS, OURS
from .tables import markdown, write
from .targets import Rows, table, verdicts

REPOSITORY = Path(__file__).resolve().parent.parent
SLOW = ["torch.compile", "Liger chunked GRPO"]  # inductor takes seconds for each op and shape: a part of their own


class Part(NamedTuple):
    """seconds: its share of the suite's time.  needs: a module without which it is not run."""

    name: str
    arguments: list[str]
    seconds: float
    needs: str | None = None


def parts(suite: str, out: Path, wheels: Path | None) -> list[Part]:
    """What is run, in this order, as `python ARGUMENTS`."""
    tiny = suite == "gpu-tiny"
    device = "cpu" if tiny else "cuda"
    to, at = ["--out", str(out)], ["--device", device]
    repeats = ["--repeats", "1", "--warmups", "0"] if tiny else ["--repeats", "7"]
    run = ["-m", "benchmarks.run", "--suite", suite, "--implementation", "triton", *at, *to, *repeats]
    run += ["--wheels", str(wheels.resolve())] if wheels else []
    tests = [
        "-m",
        "pytest",
        "-q",
        "-m",
        "gpu",
        "-p",
        "no:cacheprovider",
        *(["tests/test_gpu.py", "-k", "views"] * tiny),
    ]
    if not tiny and importlib.util.find_spec("xdist"):
        tests += ["-n", "4"]  # each worker compiles for itself, and holds a few GB
    check = ["-m", "conspo_kernels", "gradcheck", "--device", device, "--implementation", "triton"]
    check += ["--op", "sequence_scores", "--dtype", "fp32"] if tiny else []
    some = ["eager"] if tiny else []  # of the interpreter's rivals one is enough
    only = ["--provider", OURS, *some] if tiny else ["--skip", *SLOW]
    half = ["conspo_kernels, half of the groups valid"] if tiny else []
    timed = [name for name in OPS if not OPS[name].known]  # what Triton has
    timed = ["forward", "in-place backward", "loss + backward"] if tiny else [*timed, "scores + backward"]
    slow = ["forward + backward", "loss + backward", "linear, known weights"]
    found = [
        Part("build", ["setup.py", "-q", "build_ext", "--inplace"], 60),
        Part("ceilings", ["-m", "benchmarks.ceilings", *at, *to, *(["--tiny"] * tiny)], 20),
        Part("gradient check", check, 40),
        Part("tests", tests, 80, needs="pytest"),
        Part("logits", [*run, "--name", "logits", *only, "--op", *timed], 110),
        Part("linear", [*run, "--name", "linear", *only, *half, "--op", *LINEAR_OPS], 100),
        Part("behaviour", ["-m", "benchmarks.behaviour", "--suite", suite, *to], 25),
        Part("compiled", [*run, "--name", "compiled", "--provider", OURS, *SLOW, "--op", *slow], 30),
        Part("report", ["-m", "benchmarks.report", str(out), *to], 10),
    ]
    built = any((REPOSITORY / "conspo_kernels").glob("_C*.so"))
    return [part for part in found if not (part.name == "build" and built) and not (part.name == "compiled" and tiny)]


def run_part(part: Part, log: Path, seconds: float, environment: dict[str, str]) -> dict[str, Any]:
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
            os.killpg(process.pid, 9)  # workers too; the group is this part's own
            process.wait()
    note = _last_line(log)
    return {"part": part.name, "status": status, "note": note, "seconds": round(time.monotonic() - started, 1)}


def _last_line(log: Path) -> str:
    lines = [line.strip("= \n") for line in log.read_text(encoding="utf-8", errors="replace").splitlines()]
    return next((line for line in reversed(lines) if line), "")[:100]


def read(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []


def interpreted(out: Path) -> bool:
    path = out / "environment.json"
    return path.exists() and json.loads(path.read_text(encoding="utf-8"))["triton_interpreted"]


def summary(out: Path, outcomes: Sequence[dict[str, Any]]) -> str:
    """What ran, and the targets; also written as targets.json and summary.md."""
    measured = [row for name in ("logits", "linear", "compiled") for row in read(out / f"{name}.json")]
    found = verdicts(Rows(measured, read(out / "behaviour.json")))
    write(out / "targets.json", [{**verdict._asdict(), "verdict": verdict.word} for verdict in found])
    lines = [(o["part"], o["status"], f"{o['seconds']:.0f}", o["note"]) for o in outcomes]
    count = {word: sum(v.word == word for v in found) for word in ("met", "missed", "not measured")}
    ceilings = json.loads((out / "ceilings.json").read_text()) if (out / "ceilings.json").exists() else {}
    limits = "; ".join(f"{row['what']} {row['rate'] / 1e9:,.1f} G{row['unit']}" for row in ceilings.values())
    stand_in = "Triton's interpreter stood in for a GPU: the figures mean nothing." if interpreted(out) else ""
    text = "\n\n".join(
        [
            *filter(None, [stand_in]),
            markdown(("part", "status", "s", "last line"), lines, text_columns=2),
            f"Ceilings: {limits or 'not measured'}",
            table(found),
            ", ".join(f"{number} {word}" for word, number in count.items()),
        ]
    )
    (out / "summary.md").write_text(text + "\n", encoding="utf-8")
    return text


def run(suite: str, out: Path, wheels: Path | None) -> int:
    """All parts; 0 if each of them ended well, whatever the targets."""
    out = out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])}
    environment["TRITON_INTERPRET"] = "1" if suite == "gpu-tiny" else "0"
    outcomes: list[dict[str, Any]] = []
    deadline = time.monotonic()
    for part in parts(suite, out, wheels):
        deadline += part.seconds
        log = out / f"{part.name.replace(' ', '_')}.log"
        print(f"{part.name} ...", end=" ", flush=True)
        outcomes.append(run_part(part, log, deadline - time.monotonic(), environment))
        print(f"{outcomes[-1]['status']} in {outcomes[-1]['seconds']} s", flush=True)
        write(out / "parts.json", outcomes)
        text = summary(out, outcomes)
    print(f"\n{text}")
    return 0 if all(outcome["status"] in ("done", "not run") for outcome in outcomes) else 1
