"""Time and memory of every op beside its rivals and the limits of the machine, all in one run, interleaved.

python -m benchmarks.run --suite cpu --out benchmarks/results/cpu
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

from . import fused_linear, logits_path
from .logits_path import OPS, OURS, Exact, Inputs, Op
from .measure import Call, environment, interleaved, peak_bytes, wall
from .shapes import LINEAR_SUITES, SCORES, SUITES, LinearShape, Shape

COPY, READ = "limit: copy", "limit: read"
Row = dict[str, Any]


def limits(op: Op, logits: torch.Tensor, target: torch.Tensor) -> dict[str, Call]:
    """What the memory allows: a copy of the logits, and (for forward) the largest of their bits taken as integers."""
    calls = {COPY: Call(lambda: None, lambda _: target.copy_(logits))}
    if not op.backward:
        integers = logits.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[logits.element_size()])
        calls[READ] = Call(lambda: None, lambda _: integers.max())
    return calls


def measure_op(
    op: Op, shape: Shape, inputs: Inputs, exact: Exact, implementation: str, only: list[str], repeats: int
) -> Iterator[Row]:
    """One row per provider; those that are wrong or do not fit are not timed, and their row says so."""
    device = inputs.logits.device
    about = {
        "op": op.name, "shape": str(shape), "dtype": str(shape.dtype).removeprefix("torch."),
        "rollouts": shape.rollouts, "tokens": shape.tokens, "vocab_size": shape.vocab_size,
    }  # fmt: skip
    calls: dict[str, Call] = {}
    rows: dict[str, Row] = {}
    for name, candidate in logits_path.candidates(op, inputs, implementation).items():
        if only and name not in only:
            continue
        rows[name] = row = {**about, "provider": name}
        try:
            errors = logits_path.errors(op, candidate, inputs, exact)
            row |= {**errors._asdict(), "ok": errors.ok}
            if errors.ok:
                row["peak_bytes"] = peak_bytes(logits_path.call(op, candidate, inputs), device)
                calls[name] = logits_path.call(op, candidate, inputs)
            else:
                row["note"] = f"wrong, not timed: errors {errors.value:.1e}, {errors.gradient}"
        except torch.cuda.OutOfMemoryError:
            row |= {"ok": False, "note": "out of memory"}
            torch.cuda.empty_cache()
    timings = interleaved({**calls, **limits(op, inputs.logits, torch.empty_like(inputs.logits))}, device, repeats)
    copy_bandwidth = 2 * shape.logits_bytes / timings[COPY].median
    for name, timing in timings.items():
        row = rows.setdefault(name, {**about, "provider": name, "ok": True})
        moved = shape.logits_bytes * {COPY: 2, READ: 1}.get(name, op.passes)
        row |= {"seconds": asdict(timing), "bytes": moved, "bytes_per_second": moved / timing.median}
        row["copy_fraction"] = row["bytes_per_second"] / copy_bandwidth
        if OURS in timings:
            row["times_ours"] = timing.median / timings[OURS].median
    yield from rows.values()


def measure_linear(
    op: fused_linear.Op, shape: LinearShape, device: torch.device, implementation: str, only: list[str], repeats: int
) -> Iterator[Row]:
    """One row per provider of an op of the fused-linear path, and one for its bare GEMMs."""
    inputs = fused_linear.Inputs.of(shape, device)
    exact = fused_linear.Exact.of(inputs)
    about = {
        "op": op.name, "shape": str(shape), "dtype": str(shape.dtype).removeprefix("torch."), "gemms": op.gemms,
        "tokens": shape.tokens, "hidden_size": shape.hidden_size, "vocab_size": shape.vocab_size,
    }  # fmt: skip
    gemms = f"limit: {op.gemms} GEMM{'s' * (op.gemms > 1)}"
    calls: dict[str, Call] = {}
    rows: dict[str, Row] = {}
    for name, compute in fused_linear.candidates(op, inputs, implementation).items():
        if only and name not in only:
            continue
        rows[name] = row = {**about, "provider": name, "ok": True}
        calls[name] = timed = fused_linear.call(op, compute, inputs)
        if op.mode != "loss":
            errors = fused_linear.errors(op, compute, inputs, exact)
            row |= {**errors._asdict(), "ok": errors.ok}
            if not errors.ok:
                del calls[name]
                row["note"] = f"wrong, not timed: errors {errors.value:.1e}, {errors.gradient:.1e}"
                continue
        row["peak_bytes"] = peak_bytes(timed, device)
    calls[gemms] = fused_linear.bare_gemms(op, inputs)
    for name, timing in interleaved(calls, device, repeats).items():
        row = rows.setdefault(name, {**about, "provider": name, "ok": True})
        rate = op.gemms * shape.gemm_operations / timing.median
        row |= {"seconds": asdict(timing), "operations_per_second": rate}
    for row in rows.values():
        if "seconds" in row and gemms in rows:
            row["gemm_fraction"] = rows[gemms]["seconds"]["median"] / row["seconds"]["median"]
        if "seconds" in row and OURS in rows and "seconds" in rows[OURS]:
            row["times_ours"] = row["seconds"]["median"] / rows[OURS]["seconds"]["median"]
    yield from rows.values()


def measure_scores(device: torch.device, implementation: str, only: list[str], repeats: int) -> Iterator[Row]:
    """The objective alone: launches and dispatch, no memory to speak of."""
    calls = logits_path.score_calls(device, implementation)
    calls = {name: call for name, call in calls.items() if not only or name in only}
    values = {name: call.run(call.prepare())[0].double() for name, call in calls.items()}  # type: ignore[index]
    exact = logits_path.exact_weights(device)
    timings = interleaved(calls, device, repeats)
    for name, call in calls.items():
        row: Row = {
            "op": "scores + backward", "shape": "{} groups x {}".format(*SCORES), "dtype": "float32", "provider": name,
            "ok": torch.allclose(values[name], exact, rtol=1e-5, atol=1e-8),
            "seconds": asdict(timings[name]), "wall_seconds": asdict(wall(call, device, repeats)),
        }  # fmt: skip
        if OURS in timings:
            row["times_ours"] = timings[name].median / timings[OURS].median
        yield row


def table(rows: list[Row]) -> str:
    """The rows for people, medians and the quartiles around them in milliseconds."""
    lines = []
    for row in rows:
        seconds = row.get("seconds")
        line = [row["op"], row["shape"], row["provider"]]
        if seconds is None:
            lines.append([*line, row["note"], *[None] * 5])
            continue
        low, high = seconds["low"] * 1e3, seconds["high"] * 1e3
        moved, rate = row.get("bytes_per_second"), row.get("operations_per_second")
        fraction = row.get("copy_fraction", row.get("gemm_fraction"))
        lines.append(
            [
                *line,
                f"{seconds['median'] * 1e3:.3g}",
                f"{low:.3g} to {high:.3g}",
                f"{row['times_ours']:.2f}" if "times_ours" in row else None,
                f"{(moved or rate) / 1e9:.1f}" if moved or rate else None,
                f"{fraction:.0%}" if fraction else None,
                f"{row['peak_bytes'] / 2**20:.1f}" if "peak_bytes" in row else None,
            ]
        )
    headers = ["op", "shape", "provider", "ms", "quartiles", "x ours", "G/s", "of limit", "peak MiB"]
    return tabulate(lines, headers, disable_numparse=True, colalign=("left",) * 3 + ("right",) * 6)


def measure(arguments: argparse.Namespace) -> Iterator[Row]:
    device: torch.device = arguments.device
    common = {
        "implementation": arguments.implementation, "only": arguments.provider, "repeats": arguments.repeats,
    }  # fmt: skip
    for shape in SUITES[arguments.suite] if any(name in OPS for name in arguments.op) else ():
        inputs = Inputs.of(shape, device)
        exact = Exact.of(inputs)
        for name in arguments.op:
            if name in OPS:
                yield from measure_op(OPS[name], shape, inputs, exact, **common)
    for linear_shape in LINEAR_SUITES[arguments.suite]:
        for name in arguments.op:
            if name in fused_linear.OPS:
                yield from measure_linear(fused_linear.OPS[name], linear_shape, device, **common)
    if "scores + backward" in arguments.op:
        yield from measure_scores(device, **common)


def main() -> int:
    ops = [*OPS, *fused_linear.OPS, "scores + backward"]
    parser = argparse.ArgumentParser(
        "python -m benchmarks.run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--suite", choices=SUITES, default="quick")
    parser.add_argument("--out", type=Path, help="folder for SUITE.json, written anew after every op")
    parser.add_argument("--op", nargs="+", choices=ops, default=ops)
    parser.add_argument("--provider", nargs="+", default=[], help="only these, by the names of the table")
    parser.add_argument("--implementation", default="auto", help="of ours")
    parser.add_argument("--device", type=torch.device, help="default: cuda for the gpu suite, else cpu")
    parser.add_argument("--threads", type=int, help="CPU threads; default: torch's own")
    parser.add_argument("--repeats", type=int, default=11, help="of which the median is taken, after two warm-ups")
    arguments = parser.parse_args()
    if arguments.device is None:
        arguments.device = torch.device("cuda" if arguments.suite == "gpu" else "cpu")
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    started = time.perf_counter()
    report: dict[str, Any] = {"suite": arguments.suite, "environment": environment(arguments.device), "rows": []}
    for row in measure(arguments):
        report["rows"].append(row)
        report["seconds"] = time.perf_counter() - started
        if arguments.out is not None:
            write(arguments.out / f"{arguments.suite}.json", report)
    print("\n".join(f"{name}: {value}" for name, value in report["environment"].items()), end="\n\n")
    print(table(report["rows"]))
    print(
        f"\nms: medians of {arguments.repeats}, interleaved. G/s: GB/s of the bytes that have to move, and of what a "
        "copy reaches; or GFLOP/s, and of what the bare GEMMs reach"
    )
    return 0 if all(row["ok"] for row in report["rows"] if row["provider"] == OURS) else 1


def write(path: Path, report: dict[str, Any]) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".partial")
    temporary.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)


if __name__ == "__main__":
    raise SystemExit(main())
