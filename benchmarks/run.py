"""Time and memory of every op beside its rivals and the limits of the machine, all in one run, interleaved.

python -m benchmarks.run --suite cpu --out benchmarks/results/cpu
python -m benchmarks.run --suite gpu --out DIR    # all of it, as benchmarks/gpu_suite/suite.py has it
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.host_time import measure_host
from benchmarks.simulation.interpreter import hasten
from benchmarks.timing import fused_linear, wheels
from benchmarks.timing.logits_path import OPS, OURS, Exact, Inputs
from benchmarks.timing.measure import environment
from benchmarks.timing.rows import Choice, Row, measure_linear, measure_op, measure_scores, outlasted
from benchmarks.timing.shapes import LINEAR_SUITES, SUITES, LinearShape, Shape
from benchmarks.timing.tables import markdown, quartiles, write

SCORES_OP = "scores + backward"
HOST_OP = "host time"


def table(rows: list[Row]) -> str:
    """The rows for people, medians and the quartiles around them in milliseconds; on a GPU the host's time beside."""
    lines = []
    for row in rows:
        seconds = row.get("seconds")
        line = [row["op"], row["shape"], row["provider"]]
        if seconds is None:
            lines.append([*line, row["note"], *[None] * 7])
            continue
        moved, rate = row.get("bytes_per_second"), row.get("operations_per_second")
        fraction = row.get("copy_fraction", row.get("gemm_fraction"))
        lines.append(
            [
                *line,
                f"{seconds['median'] * 1e3:.3g}" + "!" * bool(outlasted(row)),
                quartiles(seconds),
                f"{row['times_ours']:.2f}" if "times_ours" in row else None,
                f"{(moved or rate) / 1e9:.1f}" if moved or rate else None,
                f"{fraction:.0%}" if fraction else None,
                f"{row['peak_bytes'] / 2**20:.1f}" if "peak_bytes" in row else None,
                f"{row['host_seconds'] * 1e6:.0f}" if "host_seconds" in row else None,
                row.get("sm_mhz"),
            ]
        )
    headers = ["op", "shape", "provider", "ms", "quartiles", "x ours", "G/s", "of limit", "peak MiB", "host us", "MHz"]
    return markdown(headers, lines, text_columns=3)


def measure(suite: str, ops: Sequence[str], choice: Choice, targets: Sequence[str] = ()) -> Iterator[Row]:
    """The rows of a suite, shape by shape.  targets: only the shapes of these; all if empty."""

    def wanted(shape: Shape | LinearShape) -> bool:
        return not targets or bool({*targets} & {*shape.target.split()})

    for shape in filter(wanted, SUITES[suite]) if any(name in OPS for name in ops) else ():
        inputs = Inputs.from_shape(shape, choice.device)
        exact = Exact.from_inputs(inputs)
        for name in ops:
            if name in OPS and (shape.entropy or not OPS[name].entropy):
                yield from _surviving(name, shape, measure_op(OPS[name], shape, inputs, exact, choice))
        del inputs, exact
    for linear in filter(wanted, LINEAR_SUITES[suite]) if any(name in fused_linear.OPS for name in ops) else ():
        if linear.needs is not None and importlib.util.find_spec(linear.needs) is None:
            yield _without(linear, linear.needs)
            continue
        hidden = fused_linear.Inputs.from_shape(linear, choice.device)
        exact_linear = fused_linear.Exact.from_inputs(hidden)
        for name in ops:
            if name in fused_linear.OPS:
                rows = measure_linear(fused_linear.OPS[name], linear, hidden, exact_linear, choice)
                yield from _surviving(name, linear, rows)
        del hidden, exact_linear
    if SCORES_OP in ops:
        yield from measure_scores(choice)
    if HOST_OP in ops and choice.device.type == "cpu" and choice.implementation in ("auto", "native"):
        yield from measure_host()


def _without(shape: LinearShape, module: str) -> Row:
    """A row that says why a shape has no other."""
    return {
        "op": "linear, recompute", "shape": str(shape), "provider": "Liger fused scaled CE", "target": shape.target,
        "ok": False, "status": "not installed", "note": f"not installed: {module}, without which it works in chunks",
    }  # fmt: skip


def _surviving(op: str, shape: Shape | LinearShape, rows: Iterator[Row]) -> Iterator[Row]:
    """The rows of an op; what ends it is a row too, and the next op has its turn. That it ended is no success."""
    try:
        yield from rows
    except RuntimeError as error:
        traceback.print_exc()
        note = f"failed: {type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
        about = {"op": op, "shape": str(shape), "provider": OURS, "target": shape.target}
        yield {**about, "ok": False, "status": "failed", "note": note}
        torch.cuda.empty_cache()  # does nothing where there is no GPU


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    ops = [*OPS, *fused_linear.OPS, SCORES_OP, HOST_OP]
    parser = argparse.ArgumentParser(
        "python -m benchmarks.run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--suite", choices=SUITES, default="quick", help="gpu-tiny: gpu on a simulated one")
    parser.add_argument("--out", type=Path, help="folder for SUITE.json, written anew after every op")
    parser.add_argument("--op", nargs="+", choices=ops, help="only these, without the rest of the gpu suite")
    parser.add_argument("--target", nargs="+", default=[], help="only the shapes of these targets")
    parser.add_argument("--provider", nargs="+", default=[], help="only these, by the names of the table")
    parser.add_argument("--skip", nargs="+", default=[], help="not these")
    parser.add_argument("--implementation", default="auto", help="of ours")
    parser.add_argument("--device", type=torch.device, help="default: cuda for the gpu suite, else cpu")
    parser.add_argument("--threads", type=int, help="CPU threads; default: torch's own")
    parser.add_argument("--repeats", type=int, default=11, help="of which the median is taken, after the warm-ups")
    parser.add_argument("--linear-repeats", type=int, help="of the fused-linear ops: on a CPU they take seconds")
    parser.add_argument("--warmups", type=int, default=2)
    parser.add_argument("--wheels", type=Path, metavar="DIR", help="wheels of rivals, unpacked for this run")
    parser.add_argument("--name", help="of the JSON file in place of the suite's")
    parsed = parser.parse_args(arguments)
    gpu = parsed.suite.startswith("gpu")
    parsed.device = parsed.device or torch.device("cuda" if gpu else "cpu")
    parsed.whole = gpu and parsed.op is None
    parsed.op = parsed.op or ops
    parsed.linear_repeats = parsed.linear_repeats or parsed.repeats
    if parsed.whole and parsed.out is None:
        parser.error("--suite gpu needs --out, a folder for its results")
    return parsed


def main(arguments: Sequence[str] | None = None) -> int:
    parsed = parse(arguments)
    if parsed.whole:
        from benchmarks.gpu_suite import suite

        return suite.run(parsed.suite, parsed.out, parsed.wheels)
    if parsed.threads is not None:
        torch.set_num_threads(parsed.threads)
    if os.environ.get("TRITON_INTERPRET") == "1":
        hasten()
    started = time.perf_counter()
    report: dict[str, Any] = {"suite": parsed.suite, "environment": environment(parsed.device), "rows": []}
    report["environment"]["wheels"] = wheels.use(parsed.wheels) if parsed.wheels else []
    report["environment"]["rivals"] = wheels.versions()
    choice = Choice(
        parsed.device, parsed.implementation, tuple(parsed.provider), tuple(parsed.skip), parsed.repeats,
        parsed.linear_repeats, parsed.warmups,
    )  # fmt: skip
    for row in measure(parsed.suite, parsed.op, choice, parsed.target):
        report["rows"].append(row)
        report["seconds"] = time.perf_counter() - started
        if parsed.out is not None:
            write(parsed.out / f"{parsed.name or parsed.suite}.json", report)
    print("\n".join(f"{name}: {value}" for name, value in report["environment"].items()), end="\n\n")
    print(table(report["rows"]))
    print(
        f"\nms: medians of {parsed.repeats} (linear: {parsed.linear_repeats}), interleaved. G/s: GB/s of the bytes "
        "that have to move, and of what a copy reaches; or GFLOP/s, and of what the bare GEMMs reach. host: until a\n"
        "call was queued; !: the GPU had begun by then, so that the time may be the host's. MHz: of the multiprocessors"
    )
    wrong = [row for row in report["rows"] if row["provider"] == OURS and not row["ok"]]
    timed = sum("seconds" in row for row in report["rows"])
    print(f"\n{timed} of {len(report['rows'])} rows timed; of ours wrong or failed: {len(wrong)}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
