"""The experiments of examples/paper: what the protocol enumerates and chooses, one run in the small, the report."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from objectives import OBJECTIVES, coefficients

pytest.importorskip("transformers")

from paper import protocol, report, training
from paper.__main__ import REPORT, RESULTS, main, read, wanted
from paper.protocol import METHODS, SEEDS, Run


def row_of(run: Run, accuracy: float) -> dict[str, Any]:
    """A line of runs.jsonl, as short as the report takes it."""
    names = ("reward", "entropy", "response_length", "score_gap", "valid_groups", "gradient_norm")
    return {
        "run": vars(run), "constants": run.constants, protocol.DECIDES: accuracy, "validation_accuracy": accuracy,
        "held_out_curve": {"0": 0.3, "120": accuracy}, "curve": {name: [0.1, None, 0.2] for name in names},
        "seconds": 1.0,
    }  # fmt: skip


def results_of(accuracy_of: Any) -> dict[str, dict[str, Any]]:
    """Every run of the protocol, with an accuracy of the test's choice."""
    results: dict[str, dict[str, Any]] = {}
    for _ in range(2):  # tuning, then what it decides
        for run in wanted(results):
            results.setdefault(run.name, row_of(run, accuracy_of(run)))
    return results


def test_the_protocol_enumerates_each_run_once() -> None:
    results = results_of(lambda run: 0.5)
    tuning = [run for cell in protocol.cells() for run in protocol.tuning_runs(*cell)]
    assert len({run.name for run in tuning}) == len(tuning)
    assert len(results) == protocol.number_of_runs() == len(tuning) + len(SEEDS) * len(list(protocol.cells()))
    assert {row["run"]["seed"] for row in results.values()} == {protocol.TUNING_SEED, *SEEDS}


def test_tuning_takes_the_best_and_breaks_ties_as_written() -> None:
    cell = ("running_sums", "four updates", "grpo")
    runs = protocol.tuning_runs(*cell)
    accuracies = {run.name: 0.5 for run in runs}
    assert protocol.chosen(*cell, accuracies) == (0, min(protocol.LEARNING_RATES))
    accuracies[runs[3].name] = 0.6
    assert protocol.chosen(*cell, accuracies) == (runs[3].candidate, runs[3].lr)
    del accuracies[runs[0].name]
    assert protocol.chosen(*cell, accuracies) is None


def test_constants_that_only_clip_are_one_candidate_on_policy() -> None:
    assert protocol.candidates("on policy", "grpo") == [0]
    assert protocol.candidates("four updates", "grpo") == [0, 1]
    assert protocol.candidates("on policy", "disco") == [0, 1]


@pytest.mark.parametrize("method", [name for name, about in METHODS.items() if about.same_as])
def test_what_is_said_to_be_another_method_on_policy_is(method: str) -> None:
    torch.manual_seed(0)
    logprobs = -torch.rand(16, 5, dtype=torch.float64)
    batch = (logprobs, torch.ones(16, 5), torch.tensor([1.0, 0, 0, 1, 0, 0, 0, 1] * 2, dtype=torch.float64), 8)
    other = METHODS[METHODS[method].same_as["on policy"]].objective
    gradients = [coefficients(OBJECTIVES[name], logprobs, *batch)[1] for name in (METHODS[method].objective, other)]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-16)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few problems, two steps, and a policy that was not warmed up."""
    for name, value in (("HELD_OUT", 6), ("VALIDATION", 4), ("PROMPTS", 2), ("GROUP", 4)):
        monkeypatch.setattr(protocol, name, value)
    monkeypatch.setattr(protocol, "STEPS", dict.fromkeys(protocol.UPDATES, 2))
    monkeypatch.setattr(training, "task_of", training.task_of.__wrapped__)

    def fresh(name: str, seed: int, folder: Path) -> Any:
        del folder
        torch.manual_seed(seed)
        return training.build_char_policy(training.CPU, getattr(training.task_of(name), "signs", ""))

    monkeypatch.setattr(training, "warmed_up", fresh)


@pytest.mark.parametrize("method", ["conspo", "dapo", "dr_grpo", "conspo, clipped ratios"])
def test_a_run_repeats(method: str, small: None, tmp_path: Path) -> None:
    run = Run("running_sums", "four updates", method, 0, 1e-3, seed=1)
    first, second = (training.train(run, tmp_path) for _ in range(2))
    assert {**first, "seconds": 0} == {**second, "seconds": 0}
    assert json.loads(json.dumps(first)) == first  # a line of JSON, nothing lost
    assert set(first["held_out_curve"]) == {"0", "2"}
    assert len(first["curve"]["reward"]) == 2
    assert all(math.isfinite(value) for value in first["curve"]["gradient_norm"])


def test_a_recorded_run_is_repeated_by_name(small: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Run("spell_backward", "on policy", "grpo", 0, 1e-4, seed=2)
    row = training.train(run, tmp_path)
    (tmp_path / "runs.jsonl").write_text(json.dumps(row) + "\n")
    command = ["--out", str(tmp_path), "--warm-ups", str(tmp_path), "--repeat"]
    assert read(tmp_path / "runs.jsonl") == {run.name: row}
    assert main([*command, run.name]) == 0
    row[protocol.DECIDES] += 0.1
    (tmp_path / "runs.jsonl").write_text(json.dumps(row) + "\n")
    assert main([*command, run.name]) == 1
    with pytest.raises(SystemExit):
        main([*command, "no-such-run"])
    assert "no recorded run" in capsys.readouterr().err


def test_the_report_compares_in_pairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    noise = {seed: random.Random(seed).uniform(-0.1, 0.1) for seed in (*SEEDS, protocol.TUNING_SEED)}

    def accuracy(run: Run) -> float:
        """GRPO 4 points below ConSPO on each seed, DAPO level with it on average; seeds differ by more."""
        shift = {"grpo": -0.04 - 0.001 * run.seed, "dapo": 0.05 * (run.seed % 2) - 0.02}.get(run.method, 0.0)
        return 0.6 + noise[run.seed] + shift

    results = results_of(accuracy)
    monkeypatch.setattr(report, "TASKS", {"running_sums": "sums"})
    monkeypatch.setattr(report, "UPDATES", {"four updates": 4})
    report.write(results, tmp_path)
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    line_of = {line.split("|")[1].strip(): line for line in text.splitlines() if line.startswith("| ") and "±" in line}
    assert "-4.2% ± 0.1% | 0.06 | > 2 SE" in line_of["grpo"]
    assert "> 2 SE" not in line_of["dapo"]
    assert "| dynamic_sampling; 1e-05 |" in line_of["dapo"]
    assert "Before training: 30.0% ± 0.0%." in text
    tuned = 0.6 + noise[protocol.TUNING_SEED]
    assert f"| conspo | {tuned:.1%} / {tuned:.1%} | {tuned:.1%}" in text
    assert len(list(tmp_path.glob("*.png"))) == len(report.PLOTS) + 1  # and the overview


def test_a_sign_flip_test() -> None:
    assert report.sign_flip([1.0, 1.0, 1.0, 1.0, 1.0]) == 2 / 32
    assert report.sign_flip([1.0, -1.0, 1.0, -1.0]) == 1.0


def test_the_committed_report_is_of_the_committed_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for draw in ("plot", "overview"):
        monkeypatch.setattr(report, draw, lambda *arguments: None)
    results = read(RESULTS / "runs.jsonl")
    report.write(results, tmp_path)
    assert (REPORT / "report.md").read_text(encoding="utf-8") == (tmp_path / "report.md").read_text(encoding="utf-8")
    assert set(results) <= {run.name for run in wanted(results)}
