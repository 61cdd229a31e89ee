"""The benchmarks run, refuse to time what is wrong, and count what they say they count."""

from __future__ import annotations

import importlib
import json
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import Tensor

from benchmarks import host_time, report, run
from benchmarks.gpu_suite import suite
from benchmarks.gpu_suite.targets import Rows, verdicts
from benchmarks.rivals import baselines, linear_peers, peers
from benchmarks.rivals.baselines import eager_fp32, infonce
from benchmarks.timing import fused_linear, logits_path, measure
from benchmarks.timing import wheels as wheels_of_rivals
from benchmarks.timing.logits_path import OPS, OURS, Candidate, Exact, Inputs, Op
from benchmarks.timing.measure import Call, Sample, Timing, interleaved, peak_bytes
from benchmarks.timing.rows import Choice, Row, gated, measure_op
from benchmarks.timing.shapes import LINEAR_SUITES, LinearShape, Shape

CPU = torch.device("cpu")
SHAPE = Shape(4, 3, 50, torch.float32, group_size=4)


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of every op from end to end; torch.compile, which takes a minute, is left out."""
    out = tmp_path_factory.mktemp("quick")
    providers = [OURS, "eager", "eager, fp32", "F.cross_entropy", "F.linear_cross_entropy"]
    command = ["--suite", "quick", "--repeats", "2", "--warmups", "0", "--out", str(out), "--provider"]
    assert run.main([*command, *providers]) == 0
    rows = json.loads((out / "quick.json").read_text())["rows"]
    assert {*providers, "limit: copy", "limit: read", "limit: 4 GEMMs"} <= {row["provider"] for row in rows}
    assert all(row["ok"] for row in rows)
    return out / "quick.json"


def test_quick_suite(quick: Path) -> None:
    result = json.loads(quick.read_text())
    ops = {row["op"] for row in result["rows"]}
    host = {f"host time, {name}" for name in (host_time.EAGER, *host_time.LIMITS)}
    assert ops == {*OPS, *fused_linear.OPS, "scores + backward", *host}
    assert result["environment"]["torch"] == torch.__version__
    for row in result["rows"]:
        if row["op"] == "forward + backward" and row["provider"] == OURS and row["plain"]:
            assert row["bytes"] == 3 * row["tokens"] * row["vocab_size"] * (4 if row["dtype"] == "float32" else 2)
            assert row["bytes_per_second"] == pytest.approx(row["bytes"] / row["seconds"]["median"])


def test_report(quick: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A table for each op and shape; a plot for each op, and over N and V where they vary."""
    pytest.importorskip("matplotlib")
    result = json.loads(quick.read_text())
    result["rows"] = rows = [row for row in result["rows"] if row["op"] in ("forward", "linear, store")]
    (tmp_path / "some.json").write_text(json.dumps(result))
    monkeypatch.setattr(sys, "argv", ["report", str(tmp_path / "some.json"), "--out", str(tmp_path)])
    report.main()
    text = (tmp_path / "report.md").read_text()
    for op, shape in {(row["op"], row["shape"]) for row in rows}:
        assert f"## {op}, {shape}" in text
    pictures = {path.name for path in tmp_path.glob("*.png")}
    assert len(pictures) >= len({row["op"] for row in rows})
    assert all(f"({name})" in text for name in pictures)


def test_rows_are_written_as_they_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who is stopped leaves what there was by then; what fails is a row, and the next op has its turn."""

    def rows(op: Op, shape: Shape, *_: object) -> Iterator[Row]:
        yield {"op": op.name, "shape": str(shape), "provider": OURS, "ok": True, "status": "x", "note": "x"}
        if op.name == "forward":
            raise RuntimeError("no kernel\nfor this device")
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "measure_op", rows)
    with pytest.raises(KeyboardInterrupt):
        run.main(["--suite", "quick", "--out", str(tmp_path), "--op", "forward", "in-place backward"])
    result = json.loads((tmp_path / "quick.json").read_text())["rows"]
    assert [(row["op"], row["ok"]) for row in result] == [
        ("forward", True), ("forward", False), ("in-place backward", True),
    ]  # fmt: skip
    assert result[1]["note"] == "failed: RuntimeError: no kernel"


def test_bytes_of_rows_that_are_read() -> None:
    """Ignored tokens and groups without contrast cost their write only."""
    shape = Shape(8, 8, 10, torch.bfloat16, 4, skewed=True, half=True)
    assert shape.lengths == [8, 2, 4, 1] * 2
    assert (shape.response_tokens, shape.contrasted_tokens, shape.tokens) == (30, 15, 64)
    assert OPS["forward"].bytes(shape) == 30 * 20
    assert OPS["in-place backward"].bytes(shape) == (30 + 64) * 20
    assert OPS["loss + backward"].bytes(shape) == (30 + 15 + 64) * 20
    inputs = Inputs.from_shape(shape, CPU)
    assert inputs.rewards.tolist() == [1, 1, 0, 0, 1, 1, 1, 1]
    assert (inputs.labels >= 0).sum() == 30


def test_a_part_that_is_cut_short_or_breaks(tmp_path: Path) -> None:
    def outcome(code: str, seconds: float, needs: str | None = None) -> dict[str, object]:
        return suite.run_part(suite.Part("x", ["-c", code], seconds, needs), tmp_path / "log", seconds, {})

    assert outcome("print('fine')", 20) | {"seconds": 0} == {
        "part": "x",
        "status": "done",
        "note": "fine",
        "seconds": 0,
    }
    assert outcome("raise SystemExit(3)", 20)["status"] == "failed with exit code 3"
    assert outcome("import time; print('so far', flush=True); time.sleep(60)", 1)["status"] == "stopped after 1 s"
    assert outcome("", 20, "no_such_module")["status"] == "not run"


def test_verdicts() -> None:
    """Met, missed, and not measured with the reason."""
    row = {"op": "forward", "target": "L1 L2", "provider": OURS, "copy_fraction": 0.93}
    trl = {"op": "forward", "target": "L1 L2", "provider": "TRL kernel", "note": "not installed: trl"}
    scores = {"op": "scores + backward", "target": "L5", "provider": OURS}
    scores |= {"seconds": {"median": 41e-6}, "wall_seconds": {"median": 90e-6}}
    result = {(v.target, v.what): v for v in verdicts(Rows([row, trl, scores], []))}
    assert result["L1", "forward, of the copy bandwidth"].word == "met"
    assert result["L1", "TRL's kernel, time over ours"][3:5] == ("not installed: trl", None)
    assert result["L5", "scores + InfoNCE, forward and backward on the device"].word == "missed"
    assert sum(v.met is None for v in result.values()) == len(result) - 2


def test_met_of_those_that_were_timed() -> None:
    """Faster than every rival is said only where each of them was there."""
    about = {"op": "linear, known weights", "target": "F2"}
    slow, absent = {**about, "provider": "CCE", "times_ours": 1.2}, {**about, "provider": "verl", "note": "absent"}
    what = "known weights: fastest rival's time over ours"

    def word(*rows: dict[str, object]) -> str:
        return next(v.word for v in verdicts(Rows(rows, [])) if v.what == what)

    assert word(slow) == "met"
    assert word(slow, absent) == "met, of those timed"
    assert word({**slow, "times_ours": 0.9}, absent) == "missed"
    assert word(absent) == "not measured"


def test_a_shape_that_is_there_for_a_rival_needs_its_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it another implementation of the rival would be timed for 14 seconds."""
    shape = LinearShape(4, 3, 16, 50, torch.float32, 2, target="F1-Liger", needs="cutlass_that_is_absent")
    monkeypatch.setitem(LINEAR_SUITES, "quick", (shape,))
    (row,) = run.measure("quick", ["linear, recompute"], Choice(CPU, repeats=1, linear_repeats=1))
    assert (row["status"], row["provider"]) == ("not installed", "Liger fused scaled CE")
    verdict = next(v for v in verdicts(Rows([row], [])) if "Liger's fused CE" in v.what)
    assert "cutlass_that_is_absent" in verdict.found
    assert verdict.word == "not measured"


def test_a_gradient_of_the_forward_is_in_no_backward_alone() -> None:
    inputs = Inputs.from_shape(SHAPE, CPU)
    gpu = list(peers.peers(torch.device("cuda"), True))
    with mock.patch.object(logits_path, "peers", return_value=gpu):
        names = {op.name: set(logits_path.candidates(op, inputs, "torch")) for op in OPS.values() if not op.known}
    assert "Liger cross-entropy" not in names["in-place backward"]
    assert "Liger cross-entropy" in names["forward + in-place backward"]
    assert "FLA cross-entropy" in names["in-place backward"]


def test_known_coefficients_beside_three_launches() -> None:
    shape = Shape(2, 3, 500, torch.float32, 2)
    inputs = Inputs.from_shape(shape, CPU)
    op = OPS["known coefficients, in place"]
    rows = list(measure_op(op, shape, inputs, Exact.from_inputs(inputs), Choice(CPU, "torch", repeats=1)))
    timed = {row["provider"] for row in rows if row["status"] == "timed"}
    assert {OURS, logits_path.THREE_LAUNCHES} <= timed


def test_rivals_that_are_absent_or_break() -> None:
    """Each is a row that says so, whatever the others do."""

    def absent() -> dict[str, object]:
        raise ModuleNotFoundError("No module named 'ray'", name="ray")

    def broken() -> dict[str, object]:
        raise RuntimeError("no kernel\nfor this device")

    row: dict[str, object] = {}
    assert not gated(row, "verl", absent)
    assert (row["status"], row["note"]) == ("not installed", "not installed: verl (verl needs ray)")
    assert not gated(row, "trl", lambda: __import__("json", fromlist=["x"]).no_such_kernel)
    assert row["status"] == "failed"  # there, and not as it was: no reason to say that it is absent
    assert not gated(row, "verl", broken)
    assert str(row["note"]).startswith("failed: RuntimeError: no kernel (test_benchmarks.py:")
    assert gated(row, None, lambda: {"ok": True})
    assert row["status"] == "timed"


def test_absent_packages_are_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """None in sys.modules makes an import fail, installed or not."""
    for name in ("trl", "trl.kernels", "flash_attn", "fla", "quack", "liger_kernel", "cut_cross_entropy", "verl"):
        monkeypatch.setitem(sys.modules, name, None)
    gpu = torch.device("cuda")
    for_gpu, group_losses = list(peers.peers(gpu, True)), list(peers.group_losses(gpu))
    monkeypatch.setattr(logits_path, "peers", lambda device, inplace, softcap: for_gpu)
    monkeypatch.setattr(logits_path, "group_losses", lambda device: group_losses)
    inputs = Inputs.from_shape(SHAPE, CPU)
    choice = Choice(CPU, skip=("torch.compile",), repeats=1)
    rows = {
        r["provider"]: r for r in measure_op(OPS["loss + backward"], SHAPE, inputs, Exact.from_inputs(inputs), choice)
    }
    assert {name for name, r in rows.items() if r["status"] == "not installed"} == {
        "TRL kernel", "flash-attn cross-entropy", "FLA cross-entropy", "Liger cross-entropy", "quack cross_entropy",
        "Liger GRPO, sequence", "Liger GRPO, token",
    }  # fmt: skip
    assert all("seconds" in rows[name] for name in (OURS, "eager", "limit: copy"))
    for peer in linear_peers.linear_peers(gpu, 0.75, (4, 3)):
        with pytest.raises(ImportError):
            peer.compute(torch.zeros(12, 16), torch.zeros(50, 16), torch.zeros(12, dtype=torch.int64))


def test_another_loss_is_gated_by_its_own_equation() -> None:
    """GRPO on policy, written out: the gate takes it, and not if its gradient is off."""
    inputs = Inputs.from_shape(Shape(8, 4, 50, torch.float32, 4, skewed=True), CPU)
    advantages = peers.advantages_of(inputs.rewards, 4)

    def objective(logprobs: Tensor) -> Tensor:
        return peers.grpo_of_logprobs(logprobs, advantages, inputs.mask)

    def ok(factor: float) -> bool:
        def compute(logits: Tensor) -> Tensor:
            logprobs = eager_fp32(logits, inputs.labels.clamp(min=0))
            return objective(logprobs if factor == 1 else logprobs * factor)

        candidate = Candidate(compute, torch.float32, objective)
        return logits_path.errors(OPS["loss + backward"], candidate, inputs, Exact.from_inputs(inputs)).ok

    assert ok(1.0)
    assert not ok(1.01)


def test_wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What lies in a folder is imported from there, its .pth files too."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    with zipfile.ZipFile(tmp_path / "rival-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("rival_of_the_tests/__init__.py", "from deeper_rival import NAME")
        wheel.writestr("elsewhere/deeper_rival.py", "NAME = 'rival'")
        wheel.writestr("rival.pth", "elsewhere")
    assert wheels_of_rivals.use(tmp_path) == ["rival-1.0-py3-none-any.whl"]
    assert importlib.import_module("rival_of_the_tests").NAME == "rival"
    with pytest.raises(FileNotFoundError, match="no wheels"):
        wheels_of_rivals.use(tmp_path / "elsewhere")


class WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logprobs):  # type: ignore[no-untyped-def]
        return logprobs.clone()

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        return grad * 1.001


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("op", [op for op in OPS.values() if not op.loss], ids=lambda op: op.name)
def test_the_gate(op: logits_path.Op, softcap: float | None) -> None:
    """What is right passes, a wrong value or gradient does not."""
    inputs = Inputs.from_shape(replace(SHAPE, softcap=softcap), CPU)
    exact = Exact.from_inputs(inputs)
    eager_fp32 = partial(baselines.eager_entropy_fp32 if op.entropy else baselines.eager_fp32, softcap=softcap)

    def wrong_value(logits: Tensor, labels: Tensor) -> Tensor:
        return eager_fp32(logits, labels) + 1e-3

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


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("op", [op for op in fused_linear.OPS.values() if op.mode != "loss"], ids=lambda op: op.name)
def test_the_gate_of_the_fused_linear_path(op: fused_linear.Op, softcap: float | None) -> None:
    inputs = fused_linear.Inputs.from_shape(LinearShape(4, 3, 16, 50, torch.float32, softcap=softcap), CPU)
    exact = fused_linear.Exact.from_inputs(inputs)
    right = fused_linear.eager(inputs)

    def ok(compute: fused_linear.Compute) -> bool:
        return fused_linear.errors(op, fused_linear.Candidate(compute), inputs, exact).ok

    assert ok(right)
    assert not ok(lambda hidden, weight: right(hidden, weight) * 1.001)
    assert not ok(lambda hidden, weight: right(hidden, weight) * torch.nan)
    assert ok(lambda hidden, weight: WrongGradient.apply(right(hidden, weight))) is (op.mode == "none")


def test_eager_objective() -> None:
    """The rivals' objective is the library's, groups without contrast left out."""
    from conspo_kernels import conspo_loss_from_scores

    scores = torch.randn(24, dtype=torch.float64, requires_grad=True)
    rewards = (torch.arange(24) % 3 == 0).double()
    rewards[6:12] = 1
    rewards[18:] = 0
    losses = [
        infonce(scores, rewards, 6, 0.5, 0.2),
        conspo_loss_from_scores(scores, rewards, 6, tau=0.5, margin=0.2),
    ]
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*(torch.autograd.grad(loss, scores)[0] for loss in losses))


def test_timing() -> None:
    assert Timing.from_samples([Sample(3.0), Sample(1.0), Sample(2.0)]) == Timing(2.0, 1.5, 2.5, 3)
    assert Timing.from_samples([Sample(3.0)]) == Timing(3.0, 3.0, 3.0, 1)
    timing = Timing.from_samples([Sample(1.0, 2e-6, False, 1.5e9), Sample(1.0, 4e-6, True, 1.7e9)])
    assert timing.fields() | {"seconds": 0} == {"seconds": 0, "host_seconds": 3e-6, "outlasted": 1, "sm_mhz": 1600}


def test_calls_are_interleaved_and_warmed_up() -> None:
    order: list[str] = []
    calls = {name: Call(lambda: None, lambda _, name=name: order.append(name)) for name in "abc"}
    timings = interleaved(calls, CPU, repeats=5, warmups=1)
    rounds = [order[i : i + 3] for i in range(0, len(order), 3)]
    assert len(rounds) == 6
    assert all(sorted(names) == ["a", "b", "c"] for names in rounds)
    assert len({tuple(names) for names in rounds}) > 1
    assert {timing.repeats for timing in timings.values()} == {5}


def test_what_takes_long_is_timed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(measure.PATIENCE, "cpu", 0.01)
    calls = {"slow": Call(lambda: None, lambda _: time.sleep(0.02)), "fast": Call(lambda: None, lambda _: None)}
    timings = interleaved(calls, CPU, repeats=3, warmups=0)
    assert {name: timing.repeats for name, timing in timings.items()} == {"slow": 1, "fast": 3}


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


def test_training_step() -> None:
    """The losses agree on the step they share, and the shares are shares; the computed context is what bytes allow."""
    pytest.importorskip("transformers")
    from benchmarks.training_step import Bytes, Step, llama, measure

    model = llama(64, 101, 1, torch.float32, CPU)
    labels, rewards = torch.randint(101, (4, 5)), (torch.arange(4) % 2).float()
    rows = measure(Step(model, labels, rewards, 2), CPU, 1)
    assert [row["value"] for row in rows] == pytest.approx([rows[0]["value"]] * 3, rel=1e-4)
    assert all(row["share"] > 0 and row["peak_bytes"] > 0 for row in rows)
    count = Bytes(hidden_size=64, vocab_size=1000, layers=2)
    tokens = count.tokens("eager", 2**30)
    assert (
        tokens * count.per_token("eager") + count.fixed <= 2**30 < (tokens + 1) * count.per_token("eager") + count.fixed
    )
    assert count.tokens("eager", 2**30) < count.tokens("conspo_loss", 2**30)
