"""The GPU suite without a GPU: it runs from end to end on a simulated one, in its time, and does not mislead."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.gpu_suite import suite
from benchmarks.simulation import simulated_streams
from benchmarks.simulation.simulated_gpu import simulated
from benchmarks.timing import measure, wheels
from benchmarks.timing.logits_path import OURS
from benchmarks.timing.measure import Call, interleaved
from conspo_kernels.backends import registry
from conspo_kernels.backends.triton import scale

GPU = torch.device("cuda")
TESTS = Path(__file__).resolve().parents[1]


def test_the_gpu_suite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """All of it on a simulated GPU: every part ends well, every target has a verdict.

    The suite's own code is what is tried: PyTorch's ops stand in for the kernels, which `test_gpu.py` interprets.
    """
    monkeypatch.setitem(registry.BACKENDS, "triton", ".eager")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    cache = tmp_path / "cache"
    monkeypatch.setenv("TRITON_CACHE_DIR", str(cache))
    (cache / "KEY").mkdir(parents=True)
    (cache / "KEY" / "kernel.cubin").touch()
    assert suite.run("gpu-tiny", tmp_path, None) == 0, (tmp_path / "summary.md").read_text()
    outcomes = json.loads((tmp_path / "parts.json").read_text())
    assert {outcome["part"] for outcome in outcomes} >= {"decisive gradients", "logits", "linear", "behaviour"}
    assert {outcome["compiled"] for outcome in outcomes} == {0}
    assert f"Triton's cache {cache}: 1 binaries" in capsys.readouterr().out
    result = json.loads((tmp_path / "targets.json").read_text())
    names = ["L1", "L2", "L3", "L4", "L5", "F1", "F2", "F3", "F4", "M1", "C1"]
    assert list(dict.fromkeys(v["target"] for v in result)) == names
    unmeasured = {v["what"] for v in result if v["met"] is None}  # other packages, and what compiles
    assert all(any(word in what for word in ("TRL", "Liger", "recompilations")) for what in unmeasured)
    checks = [row["what"] for row in json.loads((tmp_path / "behaviour.json").read_text())["rows"]]
    assert checks == ["synchronisation", "memory", "memory", "recompilations"]  # the dearest last
    text = (tmp_path / "summary.md").read_text()
    assert "figures mean nothing" in text
    assert "`python -m benchmarks.timing.wheels --out DIR` collects wheels" in text
    rows = [row for name in ("logits", "linear") for row in json.loads((tmp_path / f"{name}.json").read_text())["rows"]]
    timed = [row for row in rows if row["status"] == "timed"]
    assert {"softcap" in row["shape"] for row in timed} == {"entropy" in row["op"] for row in timed} == {True, False}
    for row in timed:
        assert row["host_seconds"] >= 0
        assert row["sm_mhz"] > 0
        assert 0 <= row["outlasted"] <= row["seconds"]["repeats"]


def test_time_and_order_of_the_parts(tmp_path: Path) -> None:
    """Seven minutes, the start included; what is cheap and decides most comes first; nothing is built."""
    parts = suite.parts("gpu", tmp_path, None)
    assert sum(part.seconds for part in parts) + suite.START <= suite.SECONDS == 420
    assert [part.name for part in parts[:3]] == ["ceilings", "decisive gradients", "tests of a GPU"]
    assert not any("setup.py" in part.arguments for part in parts)
    tests = next(TESTS.glob("*/test_gpu.py")).read_text()
    assert "benchmarks.run" not in tests  # that would be a suite within the suite
    tiny = suite.parts("gpu-tiny", tmp_path, None)
    assert [part.name for part in parts if part.name not in suite.LONG] == [part.name for part in tiny]


def test_few_cold_compilations_of_inductor(tmp_path: Path) -> None:
    """Each takes seconds: of torch.compile's, and of Liger's chunked loss."""
    from benchmarks.timing.shapes import LINEAR_SUITES, SUITES

    (part,) = [part for part in suite.parts("gpu", tmp_path, None) if part.name == "compiled"]
    arguments = part.arguments
    targets = {*arguments[arguments.index("--target") + 1 : arguments.index("--provider")]}
    ops = arguments[arguments.index("--op") + 1 :]
    shapes = [*SUITES["gpu"], *LINEAR_SUITES["gpu"]]
    compiled = [shape for shape in shapes if targets & {*shape.target.split()}]
    assert len(compiled) == 2
    assert len(ops) == 3


class HandClock:
    """Time that passes where somebody sleeps, and nowhere else."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def test_what_the_host_hides_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The spin grows with the time that queueing takes; where it cannot, each repeat is flagged."""
    clock = HandClock()
    monkeypatch.setattr(measure, "time", clock)
    monkeypatch.setattr(simulated_streams, "time", clock)

    def queued_in(seconds: float) -> Call:
        return Call(lambda: None, lambda _: clock.sleep(seconds))

    calls = {"quick": queued_in(1e-5), "slow": queued_in(5e-3), "too slow": queued_in(2 * measure.LONGEST_SPIN)}
    with simulated():
        result = interleaved(calls, GPU, repeats=2, warmups=1)
        cold = interleaved({"slow": calls["slow"]}, GPU, repeats=1, warmups=0)
    assert {name: timing.outlasted for name, timing in result.items()} == {"quick": 0, "slow": 0, "too slow": 2}
    assert cold["slow"].outlasted == 1
    fields = result["slow"].fields()
    assert fields["host_seconds"] == pytest.approx(5e-3)
    assert fields["sm_mhz"] == pytest.approx(simulated_streams.CLOCK / 1e6, rel=0.01)


def test_the_flush_leaves_no_dirty_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    """It reads as much as it says, and writes next to nothing."""
    monkeypatch.setattr(measure, "FLUSH_BYTES", 2**20)
    read, written = [0], [0]

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            result = func(*args, **(kwargs or {}))
            assert not func._schema.is_mutable
            read[0] += sum(x.nbytes for x in args if isinstance(x, torch.Tensor))
            written[0] += result.nbytes
            return result

    with simulated():
        measure.flush_buffer(measure.FLUSH_BYTES)
        with Count():
            measure.flush_cache()
    measure.flush_buffer.cache_clear()
    assert read[0] == 2**20
    assert written[0] < 64


def test_without_git_and_nvidia_smi(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with simulated():
        result = measure.environment(GPU)
    assert result["commit"] is None
    assert result["smi"] is None
    assert result["gpu"] == "simulated"
    assert len(result["sources"]) == 12  # what was measured, even so


BARE = """
import sys
sys.modules["hypothesis"] = sys.modules["yaml"] = None  # their import fails
import pytest
sys.exit(pytest.main(["-p", "no:cacheprovider", "-q", "--collect-only", *sys.argv[1:]]))
"""


def test_a_bare_machine_collects_the_tests() -> None:
    """Without hypothesis and PyYAML the files that import them are left out, with a word, and nothing else is."""
    few = ("test_gpu.py", "test_margin.py", "test_recipes.py", "test_skips.py")  # of all, which would take longer
    others = [f"--ignore={path}" for path in TESTS.glob("*/test_*.py") if path.name not in few]
    result = subprocess.run(
        [sys.executable, "-c", BARE, *others, "tests"],
        capture_output=True, text=True, check=False, cwd=TESTS.parent,
        env={**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "CI": ""},
    )  # fmt: skip
    assert result.returncode == 0, result.stdout
    assert "test_gpu.py::test_model_sizes" in result.stdout
    assert "test_skips.py::" in result.stdout
    assert "not collected, they need packages that are not installed: " in result.stdout
    assert "test_margin.py" in result.stdout
    assert "test_recipes.py" in result.stdout  # which imports PyYAML through a recipe
    assert "test_margin.py::" not in result.stdout


def test_collecting_wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """What there is, and what there is not; for the Python that it is for."""

    def pip(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        assert command[command.index("--python-version") + 1] == "3.12"
        if command[-1] == "rival":
            (tmp_path / "rival-1.0-py3-none-any.whl").write_bytes(b"x" * 2**20)
        return subprocess.CompletedProcess(command, 0 if command[-1] == "rival" else 1, "", "ERROR: no such thing")

    monkeypatch.setattr(subprocess, "run", pip)
    assert wheels.collect(("rival", "absent"), tmp_path, "3.12") == ["absent"]
    printed = capsys.readouterr().out
    assert "absent: none: ERROR: no such thing" in printed
    assert "1.0 MiB  rival-1.0-py3-none-any.whl" in printed


def test_rivals_in_the_summary() -> None:
    rows = [
        {"provider": OURS, "status": "timed"},
        {"provider": "eager", "status": "timed"},
        {"provider": "TRL kernel", "status": "not installed", "note": "not installed: trl"},
    ]
    expected = "Timed beside ours: eager. not installed: trl. `python -m benchmarks.timing.wheels"
    assert suite.rivals(rows).startswith(expected)
    assert suite.rivals(rows[:1]) == "Timed beside ours: nobody."


def test_the_simulated_gpu_refuses_what_a_gpu_does() -> None:
    with simulated() as memory:
        x = torch.ones(4, 8, device="cuda")
        held = memory.allocated()
        with pytest.raises(RuntimeError, match="same device"):
            x + torch.ones(8)
        assert (x + torch.ones(())).is_cuda  # a number may come from anywhere
        assert (x.cpu() + torch.ones(8)).device.type == "cpu"
        assert x.new_zeros(3).is_cuda
        assert not x.new_zeros(3, device="cpu").is_cuda
        del x
        assert memory.allocated() == held - 4 * 8 * 4


def test_the_simulated_gpu_has_a_current_device() -> None:
    """Triton launches there, PyTorch's ops where their operands are."""
    with simulated():
        x, factor = torch.ones(4, device=GPU), torch.full((), 3.0, device=GPU)
        with torch.cuda.device(1):
            assert torch.cuda.current_device() == 1
            x.add_(x)
            with pytest.raises(RuntimeError, match="a launch on cuda:1, tensors on cuda:0"):
                scale.scale_(x, factor)
            with torch.cuda.device_of(x):
                scale.scale_(x, factor)
        assert x.tolist() == [6, 6, 6, 6]
        assert torch.cuda.current_device() == 0


def test_the_simulated_gpu_adds_wide_products() -> None:
    """torch.mm(bf16, bf16, out_dtype=fp32), which CPUs do not have."""
    with simulated():
        a = torch.full((2, 3), 1.0, dtype=torch.bfloat16, device=GPU)
        total = torch.full((2, 2), 0.5, device=GPU)
        torch.addmm(total, a, a.t(), out_dtype=torch.float32, out=total)
        assert total.tolist() == [[3.5, 3.5], [3.5, 3.5]]
        assert torch.mm(a, a.t(), out_dtype=torch.float32).dtype == torch.float32


def test_the_simulated_gpu_replays_graphs() -> None:
    with simulated():
        x = torch.ones(3, device=GPU)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = (x * 2).sum() + torch.zeros(3, device=GPU)
            with pytest.raises(RuntimeError, match="synchronizing"):
                y.sum().item()
        x.fill_(5)
        assert y.tolist() == [6, 6, 6]
        graph.replay()
        assert y.tolist() == [30, 30, 30]


def test_the_simulated_graph_is_of_the_device_alone() -> None:
    """The host's copies and numbers are those of the capture; a copy from the host reads what is there then."""
    with simulated():
        mine, number = torch.tensor([1.0, 2.0]), torch.tensor(3.0)
        staging = torch.empty(2)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            staged = staging.copy_(mine).to(GPU, non_blocking=True) * 1
            direct = mine.to(GPU, non_blocking=True) * number
        mine.fill_(5)
        number.fill_(10)
        graph.replay()
        assert staged.tolist() == [1, 2]
        assert direct.tolist() == [15, 15]
