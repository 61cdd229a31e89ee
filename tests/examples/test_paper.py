"""The study of examples/paper: what the protocol enumerates, how one run goes, and that the page shows the records."""

from __future__ import annotations

import functools
import json
import math
import random
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from objectives import OBJECTIVES, coefficients

pytest.importorskip("transformers")

from demo.rollout import sample
from paper import __main__ as command
from paper import compare, direction, protocol, report, start, training
from paper.protocol import DIRECTIONS, MAIN, METHODS, SEEDS, Run, Size, Start, Unit

from conspo_kernels import conspo_weights, trust_region

WORDS = [{"metadata": {"word": word}, "answer": word[::-1]} for word in ("abc", "below", "zebra")]
SMALL_TASK_OF = functools.cache(start.task_of.__wrapped__)  # with fewer held-out problems than the study's own
Rows = dict[str, dict[str, Any]]


def row_of(unit: Unit, result: float) -> dict[str, Any]:
    """A record, as short as the page takes it."""
    about = {"cpu_seconds": 36.0, "commit": "0", "versions": "", "processor": "", "result": result}
    if isinstance(unit, Start):
        changes = [result + 0.001 * index for index in range(len(DIRECTIONS))]
        return {**protocol.parameters(unit), **about, "change": changes}
    names = ("kl", "norm_last", "wrong_change", "right_change")
    curve = {"accuracy": [0.3, 0.4, result], "seen": {name: [0.1, None, 0.2] for name in names}}
    return {**protocol.parameters(unit), **about, **curve}


def results_of(result_of: Callable[[Unit], float], *parts: str) -> Rows:
    """Every unit of these parts (of all), with a result of the test's choice."""
    results: Rows = {}
    for _ in range(12):  # tuning extends its grids, then decides
        for part, units in protocol.planned(results).items():
            if not parts or part in parts:
                for unit in units:
                    results.setdefault(unit.name, row_of(unit, result_of(unit)))
    return results


def at_rate(best: float) -> Callable[[Unit], float]:
    return lambda unit: 0.5 - 0.1 * abs(math.log2(unit.lr / best)) if isinstance(unit, Run) else 0.02


def in_the_middle(unit: Unit) -> float:
    """The best rate is that of the grid's middle: no grid is extended."""
    low, high = protocol.START_GRID.get(unit.task, (0, 0)) if isinstance(unit, Run) else (0, 0)
    return at_rate(protocol.rate((low + high) // 2))(unit)


def test_a_grid_is_extended_until_its_best_is_inside() -> None:
    results = results_of(at_rate(protocol.rate(2)), "tuning")
    runs, best = protocol.tuning("spell_backward", "grpo", results)
    assert best == 2
    assert sorted({run.lr for run in runs}) == [protocol.rate(k) for k in range(-2, 4)]
    assert {run.seed for run in runs} == set(protocol.TUNING_SEEDS)
    del results[runs[-1].name]
    assert protocol.tuning("spell_backward", "grpo", results)[1] is None
    assert protocol.planned(results)["main"] == [
        run for run in protocol.planned(results)["main"] if run.method != "grpo"
    ]


def test_every_method_has_the_same_seeds_and_no_tuning_seed_is_among_them() -> None:
    results = results_of(in_the_middle)
    plan = protocol.planned(results)
    first = plan["main"][: len(MAIN)]
    assert [(run.method, run.seed) for run in first if isinstance(run, Run)] == [(method, 0) for method in MAIN]
    for part in ("main", "neighbours", "cause", "sensitivity", "sums"):
        seeds = {run.seed for run in plan[part] if isinstance(run, Run)}
        assert len(seeds) >= 10
        assert seeds <= set(SEEDS) - set(protocol.TUNING_SEEDS)
    for method in MAIN:  # fewer in the second task for all but the primary comparison
        here = [run.seed for run in plan["sums"] if isinstance(run, Run) and run.method == method]
        assert here == list(SEEDS if method in protocol.PRIMARY else SEEDS[:8])
    names = [unit.name for units in plan.values() for unit in units]
    assert set(names) == set(results)


def test_a_trust_region_on_clipped_ratios_changes_nothing() -> None:
    """Why part 2 has no such cell."""
    torch.manual_seed(0)
    old = -torch.rand(16, 5, dtype=torch.float64)
    now, rewards = old + 0.4 * torch.randn_like(old), torch.tensor([1.0, 0, 0, 1, 0, 0, 0, 1] * 2)
    objective, constants = METHODS["conspo of clipped ratios"].objective, {"tau": 10.0, "margin": 0.01, "clip": 0.2}
    c = coefficients(OBJECTIVES[objective], now, old, torch.ones_like(now), rewards, 8, **constants)[1]
    assert (c == 0).any()
    assert trust_region(c, now, old, 0.2).equal(c)


def test_a_direction_with_conspos_own_group_weight_is_conspos() -> None:
    torch.manual_seed(0)
    scores, rewards = torch.randn(6, 8, dtype=torch.float64), torch.rand(6, 8) > 0.5
    for tau, margin in ((10.0, 0.01), (0.3, 0.5)):
        ours = direction.rollout_weights(scores, rewards, "mean q", tau, margin)
        theirs = conspo_weights(scores.flatten(), rewards.flatten(), 8, tau=tau, margin=margin, reduction="sum").weights
        torch.testing.assert_close(ours.flatten(), theirs, rtol=1e-10, atol=1e-12)
    for weight, u in (("1", 1.0), ("sqrt(p(1-p))", (3 / 8 * 5 / 8) ** 0.5), ("N/(N+1)", 5 / 6)):
        right = torch.arange(8)[None] < 3
        for tau in (None, 0.3):
            w = direction.rollout_weights(scores[:1], right, weight, tau, 0.0)
            assert [w[right].sum().item(), w[~right].sum().item()] == pytest.approx([-u, u])
    assert [direction.nats(text, 0.6) for text in ("flat", "10 nats", "3 spreads", "0.01")] == [
        None, 10.0, pytest.approx(1.8), 0.01
    ]  # fmt: skip


def test_exact_accuracy_is_what_sampling_estimates() -> None:
    torch.manual_seed(0)
    task = start.task_of("spell_backward")
    policy = fresh("spell_backward", 0)
    teach(policy, task, WORDS[0])
    exact = start.exact_accuracy(policy, task, WORDS[:1])
    drawn = sample(policy, task, WORDS[:1], copies=4000, generator=torch.Generator().manual_seed(0)).rewards
    assert 0.1 < exact < 0.9
    assert drawn.mean().item() == pytest.approx(exact, abs=4 * (exact * (1 - exact) / 4000) ** 0.5)


def fresh(name: str, seed: int, *_arguments: Any, **_keywords: Any) -> Any:
    """A policy that nobody has taught."""
    torch.manual_seed(seed)
    return start.build_char_policy(start.CPU, getattr(start.task_of(name), "signs", ""))


def teach(policy: Any, task: Any, entry: Any) -> None:
    """Until the policy spells the word now and then."""
    optimizer = torch.optim.Adam(policy.model.parameters(), lr=2e-3)
    while start.exact_accuracy(policy, task, [entry]) < 0.2:
        batch = start.supervised_batch(policy, task, [entry])
        logits = policy.logits(batch)
        ids, mask = batch.last_columns(logits)
        loss = -start.token_logprobs(logits, ids, response_mask=mask, shift=True).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def test_what_the_spoilt_policy_is_taught() -> None:
    task = start.SpoiltSpelling(held_out=2)
    assert [task.answer(entry) for entry in WORDS] == ["cab", "wolbe", "arbez"]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few problems, two batches, and policies that nobody has taught."""
    monkeypatch.setattr(protocol, "SIZES", {"long_sums": Size(4, 8, 2, 1), "spell_backward": Size(4, 8, 2, 1)})
    for name, value in (("HELD_OUT", 6), ("VALIDATION", 4), ("DIRECTION_PROMPTS", 8), ("DIRECTION_SEEN", 4)):
        monkeypatch.setattr(protocol, name, value)
    for module in (start, training, direction):
        monkeypatch.setattr(module, "task_of", SMALL_TASK_OF)
        monkeypatch.setattr(module, "start_of", fresh)
    for task in (start.SpellBackward, start.RunningSums):  # an untaught policy would solve nothing
        monkeypatch.setattr(task, "reward", lambda _self, _entry, text: float(len(text) % 2))
    monkeypatch.setattr(command, "conditions", lambda: {"commit": "0", "versions": "", "processor": ""})


@pytest.mark.parametrize(
    "run",
    [
        Run("spell_backward", "conspo", "mini-batches", 1e-4, 1),
        Run("spell_backward", "conspo, trust region", "repetition", 1e-4, 1),
        Run("spell_backward", "conspo of ratios", "repetition", 1e-4, 100),
        Run("long_sums", "dr_grpo", "one update", 1e-4, 1),
    ],
    ids=lambda run: run.name,
)
def test_a_run_is_repeated_by_name(run: Run, small: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = {**protocol.parameters(run), **command.perform(run, tmp_path), **command.conditions()}
    assert json.loads(json.dumps(row)) == row  # a line of JSON, nothing lost
    assert len(row["accuracy"]) == (1 if run.seed in protocol.TUNING_SEEDS else 3)
    assert row["result"] == pytest.approx(row["accuracy"][-1], abs=1e-5)
    assert [len(values) for values in row["seen"].values()] == [2] * len(row["seen"])
    assert all(value > 0 for value in row["seen"]["kl"])
    assert protocol.unit_of(row) == run
    for result, code in ((row["result"], 0), (row["result"] + 1e-9, 1)):
        (tmp_path / "main.jsonl").write_text(json.dumps({**row, "result": result}) + "\n")
        assert command.main(["--out", str(tmp_path), "--repeat", run.name]) == code
    with pytest.raises(SystemExit):
        command.main(["--out", str(tmp_path), "--repeat", "no-such-run"])
    assert "no recorded run" in capsys.readouterr().err


def test_steps_of_part_0_are_of_one_length_and_leave_the_policy_as_it_was(small: None, tmp_path: Path) -> None:
    row = direction.probe(Start("20 %", 0), tmp_path)
    assert len(row["change"]) == len(DIRECTIONS) == 27
    low, high = row["divergence"]
    assert 0.99 * protocol.DIVERGENCE <= low <= high <= 1.01 * protocol.DIVERGENCE
    assert row["result"] == pytest.approx(row["change"][DIRECTIONS.index(protocol.CONSPO)], abs=1e-6)


def test_mini_batches_use_each_group_once_and_repetition_all_of_them() -> None:
    parts = training.parts_of(10, "mini-batches")
    assert torch.cat(parts).tolist() == list(range(10))
    assert len(parts) == 4
    assert len(training.parts_of(3, "mini-batches")) == 3
    assert [part.tolist() for part in training.parts_of(2, "repetition")] == [[0, 1]] * 4


def test_what_is_missing_is_run_in_order_and_recorded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The runner stops in the middle and goes on where it was."""
    done: list[str] = []

    def perform(unit: Unit, _folder: Path) -> dict[str, Any]:
        if len(done) in (3, 7):
            done.append("stopped")
            raise KeyboardInterrupt
        done.append(unit.name)
        return {"result": 0.1, "cpu_seconds": 1.0}

    monkeypatch.setattr(command, "perform", perform)
    monkeypatch.setattr(command, "conditions", dict)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            command.execute(tmp_path, tmp_path, "directions", math.inf)
    expected = [unit.name for unit in protocol.planned({})["directions"]][:6]
    assert [name for name in done if name != "stopped"] == expected == list(command.read(tmp_path))


def test_p_values_and_intervals() -> None:
    assert compare.sign_flip([1.0] * 5) == 2 / 32
    assert compare.sign_flip([1.0, -1.0, 1.0, -1.0]) == 1.0
    assert (
        compare.sign_flip([0.1, 0.2, 0.3, -0.05]) == 4 / 16
    )  # as large: all signs but those of 0.05, and their mirror
    assert compare.holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx({"a": 0.03, "c": 0.06, "b": 0.06})
    values = [0.3, 0.1, 0.5, 0.2]
    assert compare.half_width(values) == pytest.approx(3.182 * statistics.stdev(values) / 2)


def test_the_tables_compare_in_pairs_and_say_what_is_missing() -> None:
    def result(unit: Unit) -> float:
        """GRPO 4 points above ConSPO on each seed; seeds differ by more."""
        if not isinstance(unit, Run):
            return 0.02
        noise = random.Random(unit.seed).uniform(-0.1, 0.1)
        return at_rate(protocol.rate(-1))(unit) + noise + 0.04 * (unit.method == "grpo")

    results = results_of(result)
    lines = list(report.main_table(results, "spell_backward"))
    assert lines[0] == "12 seeds."
    assert lines[4].startswith("| grpo | 1.5e-05 |")
    assert "+4.0 ± 0.0 | **0.000** |" in lines[4]
    assert "+0.0 ± 0.0 | 1.000 |" in next(line for line in lines if line.startswith("| dapo"))
    partial = {name: row for name, row in results.items() if not name.endswith(("/sapo/mini-batches/1.5e-05/7", "/11"))}
    lines = list(report.main_table(partial, "spell_backward"))
    assert lines[0] == "10 seeds."
    assert "(10 seeds)" in lines[4]
    assert "| group weight N/(N+1) - weight 1 | +1.00 ± 0.00 |" in "\n".join(report.directions(results))
    for name, table in report.TABLES.items():
        assert len([line for line in table(results) if line]) > 2, name


def test_figures_are_drawn_from_any_part_of_the_records(tmp_path: Path) -> None:
    from paper import figures

    figures.draw({}, tmp_path)
    assert not list(tmp_path.glob("*.png"))
    for parts in (("directions", "tuning"), ()):
        figures.draw(results_of(at_rate(protocol.rate(-1)), *parts), tmp_path)
    assert {path.stem for path in tmp_path.glob("*.png")} == set(figures.DRAW) == set(report.FIGURES)


def test_the_page_shows_the_records() -> None:
    page = (report.PAGE / "index.md").read_text(encoding="utf-8")
    results = command.read(command.RESULTS)
    assert report.filled(page, results) == page
    marks = [line for line in page.splitlines() if line.startswith("<!-- records: ")]
    assert len(marks) == len(set(marks)) == len(report.TABLES.keys() | report.FIGURES.keys())
    planned = {unit.name for units in protocol.planned(results).values() for unit in units}
    assert set(results) == planned
    hours = sum(row["cpu_seconds"] for row in results.values()) / 3600
    assert f"All {len(planned)} runs that the protocol plans are there, {hours:.1f} core-hours without" in page
    for row in results.values():
        assert {"commit", "versions", "processor", "cpu_seconds"} <= set(row)
    for line in page.splitlines():
        if line.startswith("!["):
            assert (report.PAGE / line.partition("](")[2].rstrip(")")).exists()
