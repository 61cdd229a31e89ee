"""One check: a case in one dtype, its exact values and gradient, and how far an implementation is from them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.gradcheck import GradcheckError

from .cases import FROM_SCORES, Case, Inputs, build
from .outputs import call, eager, exact
from .tolerance import LOGPROB_ERROR, RELATIVE_FP64, allowed_error, grad_floor, magnitude, max_error, value_floor

TINY = ((2, 1), 5)  # for torch.autograd.gradcheck


class Judged(NamedTuple):
    error: float
    tolerance: float

    @property
    def ok(self) -> bool:
        return self.error <= self.tolerance  # not so for NaN


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
        self.eager_grad: Tensor | None = None
        if self.dtype != torch.float64:
            leaf = inputs.leaf.detach().requires_grad_()
            self.eager = eager(case, inputs, leaf)
            self.eager_grad = gradient(self.eager, case.graded, leaf) if case.graded else None
        # A loss is a difference of scores, so theirs is the size that its rounding is relative to.
        self.scores = (leaf if case.op in FROM_SCORES else self.outputs["scores"]).detach()

    def judge_value(self, name: str, actual: Tensor) -> Judged:
        truth = self.outputs[name].detach()
        size = magnitude(self.scores)
        if self.dtype == torch.float64:
            allowed = RELATIVE_FP64 * max(1.0, magnitude(truth), size)
        else:
            allowed = allowed_error(self.eager[name], truth, value_floor(truth, torch.float32, size))
            if name not in ("loss", "weights") and not self.case.linear:  # whose logits are rounded to their dtype
                allowed = min(allowed, LOGPROB_ERROR)
        return Judged(max_error(actual, truth), allowed)

    def judge_gradient(self, actual: Tensor) -> Judged:
        assert self.grad is not None
        if self.dtype == torch.float64:
            return Judged(max_error(actual, self.grad), RELATIVE_FP64 * magnitude(self.grad))
        assert self.eager_grad is not None
        tau = self.case.options.get("tau", 10.0)  # weights see scores / tau
        floor = grad_floor(self.grad, self.dtype, self.scores, tau)
        return Judged(max_error(actual, self.grad), allowed_error(self.eager_grad, self.grad, floor))


def autograd_agrees(case: Case, implementation: str, device: torch.device) -> bool | None:
    """torch.autograd.gradcheck: finite differences of the implementation's own values; raises where they disagree."""
    # A second backward would raise, as it should.
    if not case.graded or case.options.get("inplace_backward") or case.known:
        return None
    inputs = build(case, TINY, torch.float64, device)

    def outputs(leaf: Tensor) -> tuple[Tensor, ...]:
        outputs = call(case, inputs, leaf, implementation)
        return tuple(outputs[name] for name in case.graded)

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
