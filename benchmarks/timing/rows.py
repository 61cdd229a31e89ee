"""Measurements as rows: one per op, shape and provider, with the correctness gate, memory and times."""

from __future__ import annotations

import functools
import traceback
from collections.abc import Callable, Generator, Iterator, Mapping
from typing import Any, NamedTuple

import torch

from benchmarks.timing import fused_linear, logits_path
from benchmarks.timing.logits_path import OURS, Exact, Inputs, Op
from benchmarks.timing.measure import Call, interleaved, peak_bytes, wall
from benchmarks.timing.shapes import SCORES, LinearShape, Shape

COPY, READ = "limit: copy", "limit: read"
FEW = (OURS, "eager")  # of a shape that is there for its own sake
Row = dict[str, Any]


class Choice(NamedTuple):
    """implementation: of ours.  only: these providers, all if empty.  skip: not these."""

    device: torch.device
    implementation: str = "auto"
    only: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()
    repeats: int = 11
    linear_repeats: int = 11
    warmups: int = 2

    def __contains__(self, provider: object) -> bool:
        return (not self.only or provider in self.only) and provider not in self.skip


def outlasted(row: Row) -> str:
    """Why a figure may be the host's time and not the GPU's; empty where it is not."""
    count = row.get("outlasted", 0)
    return f"queueing outlasted the spin in {count} of {row['seconds']['repeats']}" if count else ""


def gated(row: Row, package: str | None, gate: Callable[[], Row]) -> bool:
    """Whether a provider is to be timed; else the row says why not: absent, wrong, failed or out of memory.

    gate: what adds to the row, `ok` at least.
    """
    try:
        row |= gate()
    except torch.cuda.OutOfMemoryError:
        torch.cuda.empty_cache()
        row |= {"ok": False, "status": "out of memory", "note": "out of memory"}
    except ModuleNotFoundError as error:
        missing = (error.name or str(error)).partition(".")[0]
        needs = "" if missing == package else f" ({package} needs {missing})"
        row |= {"ok": False, "status": "not installed", "note": f"not installed: {package or missing}{needs}"}
    except Exception as error:  # a rival that breaks is a result, and does not end the run
        what = (str(error).strip().splitlines() or [""])[0][:200]
        where = traceback.extract_tb(error.__traceback__)[-1]
        note = f"failed: {type(error).__name__}: {what} ({where.filename.rpartition('/')[2]}:{where.lineno})"
        row |= {"ok": False, "status": "failed", "note": note}
    else:
        row["status"] = "timed" if row["ok"] else "wrong"
    return bool(row["ok"])


def gate_result(
    errors: logits_path.Errors | fused_linear.Errors, gradient: str, timed: Call, device: torch.device
) -> Row:
    """What the correctness gate adds to a row: the errors, and the peak memory of what is right.  gradient: as text."""
    if not errors.ok:
        note = f"wrong, not timed: errors {errors.value:.1e}, {gradient}"
        return {**errors._asdict(), "ok": False, "note": note}
    return {**errors._asdict(), "ok": True, "peak_bytes": peak_bytes(timed, device)}


def passed(
    candidates: Mapping[str, Any],
    about: Row,
    few: bool,
    choice: Choice,
    call_of: Callable[[Any], Call],
    gate: Callable[[Any, Call], Row],
) -> Generator[Row, None, tuple[dict[str, Row], dict[str, Call]]]:
    """The rows and the calls of the providers that are to be timed; yields the rows of the others at once.

    about: what all rows say.  few: only the providers of FEW.  gate: as of `gated`, of a candidate and its call.
    """
    rows: dict[str, Row] = {}
    calls: dict[str, Call] = {}
    for name, candidate in candidates.items():
        if name not in choice or (few and name not in FEW):
            continue
        row, timed = {**about, "provider": name}, call_of(candidate)
        if gated(row, candidate.package, functools.partial(gate, candidate, timed)):
            rows[name], calls[name] = row, timed
        else:
            yield row
    return rows, calls


def limits(op: Op, logits: torch.Tensor, target: torch.Tensor) -> dict[str, Call]:
    """What the memory allows: a copy of the logits, and (for forward) the largest of their bits taken as integers."""
    calls = {COPY: Call(lambda: None, lambda _: target.copy_(logits))}
    if not op.backward:
        integers = logits.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[logits.element_size()])
        calls[READ] = Call(lambda: None, lambda _: integers.max())
    return calls


def measure_op(op: Op, shape: Shape, inputs: Inputs, exact: Exact, choice: Choice) -> Iterator[Row]:
    """One row per provider; those that are wrong, absent or do not fit are not timed, and their row says so at once."""
    about = {
        "op": op.name, "shape": str(shape), "target": shape.target, "dtype": str(shape.dtype).removeprefix("torch."),
        "rollouts": shape.rollouts, "tokens": shape.tokens, "vocab_size": shape.vocab_size,
        "plain": shape.plain, "operations": op.operations(shape),
    }  # fmt: skip
    target = torch.empty_like(inputs.logits)  # there from the first, so that what passes the gate fits beside it
    torch._dynamo.reset()  # past eight shapes of one function it would fall back to eager, and not say so

    def gate(candidate: logits_path.Candidate, timed: Call) -> Row:
        errors = logits_path.errors(op, candidate, inputs, exact)
        return gate_result(errors, f"{errors.gradient}", timed, choice.device)

    candidates = logits_path.candidates(op, inputs, choice.implementation)
    rows, calls = yield from passed(
        candidates, about, shape.few, choice, lambda candidate: logits_path.call(op, candidate, inputs), gate
    )
    timings = interleaved({**calls, **limits(op, inputs.logits, target)}, choice.device, choice.repeats, choice.warmups)
    copy_bandwidth = 2 * shape.logits_bytes / timings[COPY].median
    for name, timing in timings.items():
        row = rows.setdefault(name, {**about, "provider": name, "ok": True, "status": "timed"})
        moved = shape.logits_bytes * {COPY: 2, READ: 1}[name] if name in (COPY, READ) else op.bytes(shape)
        row |= {**timing.fields(), "bytes": moved, "bytes_per_second": moved / timing.median}
        row["copy_fraction"] = row["bytes_per_second"] / copy_bandwidth
        if OURS in timings:
            row["times_ours"] = timing.median / timings[OURS].median
    yield from rows.values()


def measure_linear(
    op: fused_linear.Op, shape: LinearShape, inputs: fused_linear.Inputs, exact: fused_linear.Exact, choice: Choice
) -> Iterator[Row]:
    """One row per provider of an op of the fused-linear path, and one for its bare GEMMs."""
    about = {
        "op": op.name, "shape": str(shape), "target": shape.target, "dtype": str(shape.dtype).removeprefix("torch."),
        "gemms": op.gemms, "tokens": shape.tokens, "hidden_size": shape.hidden_size, "vocab_size": shape.vocab_size,
        "plain": shape.softcap is None, "operations": op.gemms * shape.gemm_operations,
        "bytes": op.gemms * shape.gemm_bytes,
    }  # fmt: skip
    gemms = f"limit: {op.gemms} GEMM{'s' * (op.gemms > 1)}"

    def gate(candidate: fused_linear.Candidate, timed: Call) -> Row:
        if op.mode == "loss":  # gated by the tests
            return {"ok": True, "peak_bytes": peak_bytes(timed, choice.device)}
        errors = fused_linear.errors(op, candidate, inputs, exact)
        return gate_result(errors, f"{errors.gradient:.1e}", timed, choice.device)

    candidates = fused_linear.candidates(op, inputs, choice.implementation)
    rows, calls = yield from passed(
        candidates, about, shape.few, choice, lambda candidate: fused_linear.call(op, candidate.compute, inputs), gate
    )
    calls[gemms] = fused_linear.bare_gemms(op, inputs)
    for name, timing in interleaved(calls, choice.device, choice.linear_repeats, choice.warmups).items():
        row = rows.setdefault(name, {**about, "provider": name, "ok": True, "status": "timed"})
        row |= {**timing.fields(), "operations_per_second": row["operations"] / timing.median}
    for row in rows.values():
        row["gemm_fraction"] = rows[gemms]["seconds"]["median"] / row["seconds"]["median"]
        if OURS in rows:
            row["times_ours"] = row["seconds"]["median"] / rows[OURS]["seconds"]["median"]
    yield from rows.values()


def measure_scores(choice: Choice) -> Iterator[Row]:
    """The objective alone: launches and dispatch, no memory to speak of."""
    device = choice.device
    calls = logits_path.score_calls(device, choice.implementation)
    calls = {name: call for name, call in calls.items() if name in choice}
    values = {name: call.run(call.prepare())[0].double() for name, call in calls.items()}  # type: ignore[index]
    exact = logits_path.exact_weights(device)
    timings = interleaved(calls, device, choice.repeats, choice.warmups)
    for name, call in calls.items():
        row: Row = {
            "op": "scores + backward", "shape": "{} groups x {}".format(*SCORES), "target": "L5", "dtype": "float32",
            "provider": name, "plain": True, "status": "timed",
            "ok": torch.allclose(values[name], exact, rtol=1e-5, atol=1e-8),
            **timings[name].fields(), "wall_seconds": wall(call, device, choice.repeats).fields()["seconds"],
        }  # fmt: skip
        if OURS in timings:
            row["times_ours"] = timings[name].median / timings[OURS].median
        yield row
