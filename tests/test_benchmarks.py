"""The benchmarks run, refuse to time what is wrong, and count what they say they count."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks import fused_linear, logits_path
from benchmarks.baselines import eager_fp32, infonce
from benchmarks.logits_path import OPS, Candidate, Exact, Inputs
from benchmarks.measure import Call, Timing, interleaved, peak_bytes
from benchmarks.shapes import LinearShape, Shape

REPOSITORY = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
SHAPE = Shape(4, 3, 50, torch.float32, group_size=4)


def test_quick_suite(tmp_path: Path) -> None:
    """Every op from end to end; torch.compile, which takes a minute, is left out."""
    providers = ["conspo_kernels", "eager", "eager, fp32", "F.cross_entropy", "F.linear_cross_entropy"]
    command = ["-m", "benchmarks.run", "--suite", "quick", "--repeats", "2", "--out", str(tmp_path), "--provider"]
    result = subprocess.run(
        [sys.executable, *command, *providers], capture_output=True, text=True, cwd=REPOSITORY, check=False
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    report = json.loads((tmp_path / "quick.json").read_text())
    assert {row["op"] for row in report["rows"]} == {*OPS, *fused_linear.OPS, "scores + backward"}
    assert all(row["ok"] for row in report["rows"]), result.stdout
    assert {*providers, "limit: copy", "limit: read", "limit: 4 GEMMs"} <= {row["provider"] for row in report["rows"]}
    assert report["environment"]["torch"] == torch.__version__
    for row in report["rows"]:
        if "bytes" in row and row["op"] == "forward + backward" and row["provider"] == "conspo_kernels":
            assert row["bytes"] == 3 * row["tokens"] * row["vocab_size"] * (4 if row["dtype"] == "float32" else 2)
            assert row["bytes_per_second"] == pytest.approx(row["bytes"] / row["seconds"]["median"])


def wrong_value(logits: Tensor, labels: Tensor) -> Tensor:
    return eager_fp32(logits, labels) + 1e-3


class WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logprobs):  # type: ignore[no-untyped-def]
        return logprobs.clone()

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        return grad * 1.001


@pytest.mark.parametrize("op", [op for op in OPS.values() if not op.loss], ids=lambda op: op.name)
def test_the_gate(op: logits_path.Op) -> None:
    """What is right passes, a wrong value or gradient does not."""
    inputs = Inputs.of(SHAPE, CPU)
    exact = Exact.of(inputs)

    def ok(function: Callable[[Tensor, Tensor], Tensor]) -> bool:
        def compute(logits: Tensor) -> Tensor | tuple[Tensor, Tensor]:
            if not op.known:
                return function(logits, inputs.labels)
            value = function(logits.requires_grad_(), inputs.labels)
            return value.detach(), torch.autograd.grad(value, logits, inputs.grad)[0]

        return logits_path.errors(op, Candidate(compute, torch.float32), inputs, exact).ok

    assert ok(eager_fp32)
    assert not ok(wrong_value)
    assert not ok(lambda logits, labels: eager_fp32(logits, labels) * torch.nan)
    assert ok(lambda logits, labels: WrongGradient.apply(eager_fp32(logits, labels))) is not op.backward


@pytest.mark.parametrize("op", [op for op in fused_linear.OPS.values() if op.mode != "loss"], ids=lambda op: op.name)
def test_the_gate_of_the_fused_linear_path(op: fused_linear.Op) -> None:
    inputs = fused_linear.Inputs.of(LinearShape(4, 3, 16, 50, torch.float32), CPU)
    exact = fused_linear.Exact.of(inputs)
    right = fused_linear.eager(inputs)

    def ok(compute: fused_linear.Compute) -> bool:
        return fused_linear.errors(op, fused_linear.Candidate(compute), inputs, exact).ok

    assert ok(right)
    assert not ok(lambda hidden, weight: right(hidden, weight) * 1.001)
    assert not ok(lambda hidden, weight: right(hidden, weight) * torch.nan)
    assert ok(lambda hidden, weight: WrongGradient.apply(right(hidden, weight))) is (op.mode == "none")


def test_eager_objective() -> None:
    """The rivals' objective is the library's."""
    from conspo_kernels import conspo_loss_from_scores

    scores = torch.randn(24, dtype=torch.float64)
    rewards = (torch.arange(24) % 3 == 0).double()
    ours = conspo_loss_from_scores(scores, rewards, 6, tau=0.5, margin=0.2)
    torch.testing.assert_close(infonce(scores, rewards, 6, 0.5, 0.2), ours)


def test_timing() -> None:
    assert Timing.of([3.0, 1.0, 2.0]) == Timing(2.0, 1.5, 2.5, 3)
    assert Timing.of([3.0]) == Timing(3.0, 3.0, 3.0, 1)


def test_calls_are_interleaved_and_warmed_up() -> None:
    order: list[str] = []
    calls = {name: Call(lambda: None, lambda _, name=name: order.append(name)) for name in "abc"}
    timings = interleaved(calls, CPU, repeats=5, warmups=1)
    rounds = [order[i : i + 3] for i in range(0, len(order), 3)]
    assert len(rounds) == 6
    assert all(sorted(names) == ["a", "b", "c"] for names in rounds)
    assert len({tuple(names) for names in rounds}) > 1
    assert {timing.repeats for timing in timings.values()} == {5}


def test_peak_memory() -> None:
    """The most that is held at once, not the sum; what is prepared does not count."""
    torch.use_deterministic_algorithms(False)  # filling new memory allocates too

    def run(x: Tensor) -> Tensor:
        y = x + 1
        del x
        z = y * 2
        del y
        return z * 2

    call = Call(lambda: torch.zeros(1 << 20), run)
    assert 2 << 22 <= peak_bytes(call, CPU) < (2 << 22) + 4096
