"""The targets of the library, and what a run of the gpu suite says of each: met, missed, or not measured and why.

A target is read from rows that carry its name, so the same code judges the tiny stand-in, whose figures mean nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from benchmarks.timing.logits_path import OURS
from benchmarks.timing.rows import Row, outlasted
from benchmarks.timing.tables import markdown

MIB = 2**20
FORWARD, BACKWARD, LOSS = "forward", "in-place backward", "loss + backward"
L4 = {"Llama": 0.85, "Gemma": 0.85, "GPT-2": 0.80, "rows": 0.70}


WORDS = ("met", "met, of those timed", "missed", "not measured")


class Verdict(NamedTuple):
    """met: None where it was not measured.  partly: some of those to be compared with were not timed."""

    target: str
    what: str
    wanted: str
    found: str
    met: bool | None
    partly: bool = False

    @property
    def word(self) -> str:
        met = "met, of those timed" if self.partly else "met"
        return "not measured" if self.met is None else met if self.met else "missed"


class Rows(NamedTuple):
    """Measurements, and the checks of `behaviour.py`, to look things up in."""

    measured: Sequence[Row]
    behaviour: Sequence[Row]

    def one(self, op: str, target: str, provider: str) -> Row:
        """The row, or one that only says why there is none."""
        for row in self.measured:
            if row["op"] == op and row["provider"] == provider and target in row.get("target", "").split():
                return row
        return {"note": "not run"}

    def peers(self, op: str, target: str) -> list[Row]:
        found = [row for row in self.measured if row["op"] == op and target in row.get("target", "").split()]
        return [row for row in found if row["provider"] != OURS and not row["provider"].startswith("limit")]


def at_least(target: str, what: str, wanted: float, row: Row, key: str, unit: str = "") -> Verdict:
    """A figure of a row that has to reach a number: a share in percent, or with a unit as it is."""
    say: Callable[[float], str] = (lambda x: f"{x:.2f}{unit}") if unit else (lambda x: f"{x:.0%}")
    if key not in row:
        return Verdict(target, what, f">= {say(wanted)}", row.get("note", "no figure"), None)
    found = ", ".join(filter(None, [say(row[key]), outlasted(row)]))
    return Verdict(target, what, f">= {say(wanted)}", found, row[key] >= wanted)


def logits_targets(rows: Rows) -> Iterator[Verdict]:
    yield at_least("L1", "forward, of the copy bandwidth", 0.92, rows.one(FORWARD, "L1", OURS), "copy_fraction")
    trl = rows.one(FORWARD, "L1", "TRL kernel")
    yield at_least("L1", "TRL's kernel, time over ours", 1.0, trl, "times_ours", "x")
    backward = rows.one(BACKWARD, "L2", OURS)
    yield at_least("L2", "in-place backward, of the copy bandwidth", 0.92, backward, "copy_fraction")
    if "peak_bytes" in backward:
        found, whole = backward["peak_bytes"], backward["bytes"] // 2
        found_text = f"{found / MIB:.1f} of {whole / MIB:.0f} MiB"
        yield Verdict("L2", "in-place backward, memory", "no [N, V] buffer", found_text, found < whole / 8)
    else:
        yield Verdict("L2", "in-place backward, memory", "no [N, V] buffer", backward.get("note", "no figure"), None)
    liger = rows.one(LOSS, "L3", "Liger GRPO, sequence")
    yield at_least("L3", "Liger's sequence-level GRPO, time over ours", 1.25, liger, "times_ours", "x")
    yield at_least("L3", "eager, time over ours", 2.5, rows.one(LOSS, "L3", "eager"), "times_ours", "x")
    for name, wanted in L4.items():
        for op in (FORWARD, BACKWARD):
            row = rows.one(op, f"L4-{name}", OURS)
            about = f"{row.get('shape', name)}: {op}, of the copy bandwidth"
            yield at_least("L4", about, wanted, row, "copy_fraction")
    yield from scores_targets(rows)


def scores_targets(rows: Rows) -> Iterator[Verdict]:
    """The objective alone, and whether anything of the loss waits for the device."""
    row = rows.one("scores + backward", "L5", OURS)
    what = "scores + InfoNCE, forward and backward on the device"
    if "seconds" in row:
        seconds, wall = row["seconds"]["median"], row["wall_seconds"]["median"]
        found = f"{seconds * 1e6:.0f} us (wall {wall * 1e6:.0f} us)"
        yield Verdict("L5", what, "<= 40 us", found, seconds <= 40e-6)
    else:
        yield Verdict("L5", what, "<= 40 us", row["note"], None)
    waits = next((row["found"] for row in rows.behaviour if row["what"] == "synchronisation"), None)
    found = "needs a GPU, or not run" if waits is None else waits or "none"
    yield Verdict("L5", "loss + backward: synchronisations", "none", found, None if waits is None else not waits)


def linear_targets(rows: Rows) -> Iterator[Verdict]:
    for target, name, wanted in (
        ("F1", "recompute", 0.80), ("F2", "store", 0.80), ("F2", "known weights", 0.80), ("F3", "frozen head", 0.75),
    ):  # fmt: skip
        row = rows.one(f"linear, {name}", target, OURS)
        yield at_least(target, f"{name}, of the bare GEMMs' rate", wanted, row, "gemm_fraction")
    liger = rows.one("linear, recompute", "F1-Liger", "Liger fused scaled CE")
    yield at_least("F1", "Liger's fused CE at its shape, time over ours", 1.0, liger, "times_ours", "x")
    peers = rows.peers("linear, known weights", "F2")
    timed = {row["provider"]: row["times_ours"] for row in peers if "times_ours" in row}
    absent = [row["provider"] for row in peers if "times_ours" not in row]
    what = "known weights: fastest rival's time over ours"
    if timed:
        name = min(timed, key=timed.__getitem__)
        found = f"{timed[name]:.2f}x ({name})" + (f"; not timed: {', '.join(absent)}" if absent else "")
        yield Verdict("F2", what, "> 1.00x", found, timed[name] > 1, partly=bool(absent))
    else:
        yield Verdict("F2", what, "> 1.00x", f"not timed: {', '.join(absent) or 'all'}", None)
    half = rows.one("linear loss", "F4", f"{OURS}, half of the groups valid")
    fraction = {"speed": 1 / half["times_ours"]} if "times_ours" in half else half
    yield at_least("F4", "all groups valid, time over half of them", 1.7, fraction, "speed", "x")


def behaviour_targets(rows: Rows) -> Iterator[Verdict]:
    memory = [row for row in rows.behaviour if row["what"] == "memory"]
    if not memory:
        yield Verdict(
            "M1", "fused linear, memory beyond gradients and accumulator", "<= workspace + 64", "not run", None
        )
    for row in memory:
        allowed = row["workspace_bytes"] + 64 * MIB
        what = f"{row['op']}, {row['shape']}: memory beyond gradients and accumulator"
        found = f"{row['extra_bytes'] / MIB:.1f} MiB"
        yield Verdict("M1", what, f"<= {allowed / MIB:.0f} MiB", found, row["extra_bytes"] <= allowed)
    row = next((row for row in rows.behaviour if row["what"] == "recompilations"), None)
    what = "recompilations in 20 lengths and margins: Triton, dynamo"
    if row is None:
        yield Verdict("C1", what, "0, 0", "not run", None)
    else:
        seen = row["triton_in_warmup"] > 0  # else no compilation was recorded
        met = row["triton"] == row["dynamo"] == 0 if seen else None
        found = f"{row['triton']}, {row['dynamo']} ({row['backend']})" if seen else "no compilation was seen"
        yield Verdict("C1", what, "0, 0", found, met)


def verdicts(rows: Rows) -> list[Verdict]:
    found = [*logits_targets(rows), *linear_targets(rows), *behaviour_targets(rows)]
    return sorted(found, key=lambda verdict: "LFMC".index(verdict.target[0]))


def table(found: Sequence[Verdict]) -> str:
    lines = [(v.target, v.what, v.wanted, v.found, v.word) for v in found]
    return markdown(("target", "what", "wanted", "found", "verdict"), lines, text_columns=5)
