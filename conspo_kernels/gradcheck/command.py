"""The gradient check: values and gradients of every door and implementation that runs here, against the fp64 oracle.

Inputs are rounded to the dtype that is checked; then the oracle (`reference.py`, differentiated by autograd) works on
them in fp64. What is allowed, in absolute numbers:

    fp64            1e-10 of the largest number that takes part; and torch.autograd.gradcheck, on a tiny shape
    fp32 and less   2 * the error of eager PyTorch in the same dtype + a floor of a few roundings, and from logits at
                    most 1e-5 for a log-probability, an entropy or a score
"""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.gradcheck import GradcheckError

from .gradcheck_cases import CASES, FROM_SCORES, SHAPES, Case, Inputs, build
from .gradcheck_outputs import call, eager, exact

DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
RELATIVE_FP64 = 1e-10
LOGPROB_ERROR = 1e-5  # whatever the dtype, for |logits| <= 50
TINY = ((2, 1), 5)  # for torch.autograd.gradcheck


@dataclass(frozen=True)
class Row:
    """One line of the table. Errors and tolerances are absolute; an error is None where it is not finite."""

    op: str
    case: str
    shape: str
    implementation: str
    dtype: str
    ok: bool
    value_error: float | None = None
    value_tolerance: float | None = None
    gradient_error: float | None = None
    gradient_tolerance: float | None = None
    autograd_gradcheck: bool | None = None  # None: not run
    note: str = ""


class Judged(NamedTuple):
    error: float
    tolerance: float

    @property
    def ok(self) -> bool:
        return self.error <= self.tolerance  # not so for NaN


def max_error(actual: Tensor, truth: Tensor) -> float:
    """The largest absolute difference; infinite where NaN and infinities are not in the same places."""
    actual, truth = actual.detach().double().cpu(), truth.detach().double().cpu()
    special = ~truth.isfinite()
    if actual.shape != truth.shape or not torch.equal(actual[special].nan_to_num(), truth[special].nan_to_num()):
        return torch.inf
    if not torch.equal(actual.isnan(), truth.isnan()):
        return torch.inf
    return (actual - truth)[~special].abs().max().item() if (~special).any() else 0.0


def magnitude(*values: Tensor) -> float:
    """The largest finite magnitude."""
    return max((v[v.isfinite()].abs().max().item() for v in values if v.isfinite().any()), default=0.0)


def gradient(outputs: dict[str, Tensor], names: Sequence[str], leaf: Tensor) -> Tensor:
    """Of a fixed weighting of the outputs, so that no entry counts like another."""
    terms = []
    for sign, name in zip((1.0, -1.0), names, strict=False):
        output = outputs[name]
        weighting = torch.linspace(1, 2, output.numel(), dtype=output.dtype, device=output.device)
        terms.append(sign * (weighting * output.flatten()).sum())
    (grad,) = torch.autograd.grad(torch.stack(terms).sum(), leaf)
    return grad


class Truth:
    """What the outputs and the gradient of a case have to be in one dtype, and how far off they may be."""

    def __init__(self, case: Case, inputs: Inputs) -> None:
        self.case, self.inputs, self.dtype = case, inputs, inputs.leaf.dtype
        leaf = inputs.leaf.detach().cpu().double().requires_grad_()
        self.outputs = exact(case, inputs, leaf)
        self.grad = gradient(self.outputs, case.graded, leaf) if case.graded else None
        self.eager: dict[str, Tensor] = {}
        self.eager_grad = None
        if self.dtype != torch.float64:
            leaf = inputs.leaf.detach().requires_grad_()
            self.eager = eager(case, inputs, leaf)
            self.eager_grad = gradient(self.eager, case.graded, leaf) if case.graded else None
        # A loss is a difference of scores, so theirs is the size that its rounding is relative to.
        scores = leaf if case.op in FROM_SCORES else self.outputs["scores"]
        self.size = magnitude(scores.detach())

    def judge_value(self, name: str, actual: Tensor) -> Judged:
        truth = self.outputs[name].detach()
        size = max(1.0, magnitude(truth), self.size)
        if self.dtype == torch.float64:
            allowed = RELATIVE_FP64 * size
        else:
            floor = 8 * torch.finfo(torch.float32).eps * size
            allowed = 2 * finite(max_error(self.eager[name], truth)) + floor
            if name not in ("loss", "weights") and not self.case.linear:  # whose logits are rounded to their dtype
                allowed = min(allowed, LOGPROB_ERROR)
        return Judged(max_error(actual, truth), allowed)

    def judge_gradient(self, actual: Tensor) -> Judged:
        assert self.grad is not None
        size, own = magnitude(self.grad), torch.finfo(self.dtype)
        if self.dtype == torch.float64:
            return Judged(max_error(actual, self.grad), RELATIVE_FP64 * size)
        assert self.eager_grad is not None
        tau = self.case.options.get("tau", 1.0)  # weights see scores / tau
        floor = (own.eps + torch.finfo(torch.float32).eps * self.size / tau) * size + own.tiny
        return Judged(max_error(actual, self.grad), 2 * finite(max_error(self.eager_grad, self.grad)) + floor)


def finite(error: float) -> float:
    """Where eager PyTorch fails altogether, it gives no licence."""
    return error if error < torch.inf else 0.0


def autograd_agrees(case: Case, implementation: str, device: torch.device) -> bool | None:
    """torch.autograd.gradcheck: finite differences of the implementation's own values; raises where they disagree."""
    # A second backward would raise, as it should.
    if not case.graded or case.options.get("inplace_backward") or case.known:
        return None
    inputs = build(case, TINY, torch.float64, device)

    def outputs(leaf: Tensor) -> tuple[Tensor, ...]:
        found = call(case, inputs, leaf, implementation)
        return tuple(found[name] for name in case.graded)

    # fast_mode: along random directions, as a forward per entry of the Jacobian takes minutes under the interpreter.
    return torch.autograd.gradcheck(outputs, (inputs.leaf,), fast_mode=True)


def judge(truth: Truth, implementation: str, device: torch.device) -> dict[str, Any]:
    """The fields of a row that tell what came out."""
    case, inputs = truth.case, truth.inputs
    outputs = call(case, inputs, inputs.leaf, implementation)
    values = [truth.judge_value(name, output) for name, output in outputs.items()]
    worst = max(values, key=lambda judged: judged.error / judged.tolerance)
    fields: dict[str, Any] = {"value_error": worst.error, "value_tolerance": worst.tolerance, "ok": worst.ok}
    if case.graded:
        judged = truth.judge_gradient(gradient(outputs, case.graded, inputs.leaf))
        fields |= {"gradient_error": judged.error, "gradient_tolerance": judged.tolerance}
        fields["ok"] &= judged.ok
    for name in ("value_error", "gradient_error"):
        if not fields.get(name, 0.0) < torch.inf:
            fields |= {name: None, "note": f"{name.replace('_', ' ')}: NaN or infinity in the wrong place"}
    if truth.dtype == torch.float64:
        try:
            fields["autograd_gradcheck"] = autograd_agrees(case, implementation, device)
        except GradcheckError as error:
            note = " ".join(str(error).split())
            fields |= {"autograd_gradcheck": False, "ok": False, "note": f"torch.autograd.gradcheck: {note}"}
    return fields


def rows(
    ops: Sequence[str], shapes: Sequence[str], dtypes: Sequence[str], implementations: Sequence[str],
    device: torch.device,
) -> Iterator[Row]:  # fmt: skip
    """Every check that is asked for, one after the other."""
    for shape in shapes:
        for case in CASES:
            if case.op not in ops:
                continue
            for dtype in dtypes:
                truth = Truth(case, build(case, SHAPES[shape], DTYPES[dtype], device))
                for implementation in implementations:
                    try:
                        with warnings.catch_warnings():  # numpy warns of what a GPU computes in silence: log 0
                            warnings.filterwarnings("ignore", module=r"triton\.runtime\.interpreter")
                            fields = judge(truth, implementation, device)
                    except Exception as error:  # one check that cannot run does not hide what the others say
                        fields = {"ok": False, "note": f"{type(error).__name__}: {error}"}
                    yield Row(case.op, case.name, shape, implementation, dtype, **fields)


def table_lines(table: Iterable[Row]) -> Iterator[str]:
    """The table as text, line by line as the checks end; what went wrong under its line."""
    op, name = (max(len(getattr(case, field)) for case in CASES) for field in ("op", "name"))
    line = f"{{:{op}}}  {{:{name}}}  {{:6}} {{:7}} {{:5}} {{:>9}} {{:>9}} {{:>9}} {{:>9}}  {{:9}} {{}}"
    yield line.format(
        "op", "case", "shape", "impl", "dtype", "value err", "allowed", "grad err", "allowed", "gradcheck", "verdict"
    )

    def number(value: float | None) -> str:
        return "-" if value is None else f"{value:.1e}"

    for row in table:
        errors = (row.value_error, row.value_tolerance, row.gradient_error, row.gradient_tolerance)
        numerical = {None: "-", True: "ok", False: "FAIL"}[row.autograd_gradcheck]
        yield line.format(
            row.op, row.case, row.shape, row.implementation, row.dtype, *map(number, errors), numerical,
            "ok" if row.ok else "FAIL",
        )  # fmt: skip
        if row.note:
            yield f"    {row.note}"


def gradcheck(
    *, ops: Sequence[str], shapes: Sequence[str], dtypes: Sequence[str], implementations: Sequence[str],
    not_run: dict[str, str], device: torch.device, interpreted: bool, as_json: bool,
) -> bool:  # fmt: skip
    """Run the checks and print them; whether all hold.

    not_run: implementations that cannot run here, and why.  interpreted: Triton's kernels run under its interpreter.
    """
    start = time.perf_counter()
    found: list[Row] = []

    def recorded() -> Iterator[Row]:
        for row in rows(ops, shapes, dtypes, implementations, device):
            found.append(row)
            yield row

    if not as_json:
        print(f"gradient check on {device}, against the fp64 oracle")
        if "triton" in implementations and interpreted:
            print(
                "Triton runs under its interpreter on the CPU: the kernels' arithmetic is checked, not what a GPU makes"
            )
        for name, reason in not_run.items():
            print(f"not run: {name}: {reason}")
        print(
            "allowed: fp64 1e-10 of the largest number; others 2 x the error of eager PyTorch in that dtype + rounding,"
        )
        print("         and at most 1e-5 for log-probabilities, entropies and scores of logits")
        print()
    for line in table_lines(recorded()):
        if not as_json:
            print(line, flush=True)
    seconds = time.perf_counter() - start
    failed = sum(not row.ok for row in found)
    if as_json:
        report = {
            "ok": failed == 0, "checks": len(found), "failed": failed, "device": str(device),
            "triton_interpreted": interpreted, "not_run": not_run, "seconds": seconds,
            "rows": [asdict(row) for row in found],
        }  # fmt: skip
        print(json.dumps(report, indent=1, allow_nan=False))
    else:
        print(f"\n{len(found)} checks, {failed} failed, {seconds:.1f} s")
    return failed == 0
