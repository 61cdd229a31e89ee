"""Metrics of groups against a loop over pairs and members, and their cost where nobody asks for them."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from conspo_kernels import conspo_loss_from_scores, metrics


@st.composite
def rollouts(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor]:
    """Scores with ties, rewards of 0, 1 and NaN, ids of up to five groups."""
    size = draw(st.integers(0, 24))

    def numbers(values: st.SearchStrategy[float]) -> Tensor:
        return torch.tensor(draw(st.lists(values, min_size=size, max_size=size)), dtype=torch.float64)

    scores = numbers(st.one_of(st.sampled_from([-1.0, -2.0, -2.5]), st.floats(-20, 0)))
    return scores, numbers(st.sampled_from([0.0, 1.0, math.nan])), numbers(st.integers(-2, 2)).long()


def by_loop(scores: Tensor, rewards: Tensor, ids: Tensor) -> tuple[float, float]:
    """score_std and ordered_pairs."""
    squares, shares = [], []
    for k in sorted(set(ids.tolist())):
        members = [(s, r) for s, r, i in zip(scores.tolist(), rewards.tolist(), ids.tolist(), strict=True) if i == k]
        right, wrong = [s for s, r in members if r == 1.0], [s for s, r in members if r == 0.0]
        if right and wrong:
            mean = math.fsum(right + wrong) / len(right + wrong)
            squares += [(s - mean) ** 2 for s in right + wrong]
            shares.append(sum(s > t for s in right for t in wrong) / (len(right) * len(wrong)))
    if not shares:
        return math.nan, math.nan
    return math.sqrt(math.fsum(squares) / len(squares)), math.fsum(shares) / len(shares)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(rollouts())
@pytest.mark.parametrize("implementation", ["torch", "native"])
def test_spread_and_order_within_groups(implementation: str, batch: tuple[Tensor, Tensor, Tensor]) -> None:
    output = conspo_loss_from_scores(*batch, implementation=implementation, return_metrics=True)
    actual = [output.metrics[f"conspo/{name}"].item() for name in ("score_std", "ordered_pairs")]
    assert actual == pytest.approx(by_loop(*batch), abs=1e-13, nan_ok=True)


def test_a_nan_score_that_takes_part_is_in_no_ordered_pair() -> None:
    """NaN logits: the loss is NaN, and the order of such a rollout is not known."""
    scores, true, slots = torch.tensor([math.nan, -1.0, -2.0]), torch.tensor([True, True, False]), torch.zeros(3).long()
    assert metrics.ordered_pairs(scores, true, ~true, slots).tolist() == [1.0, 0.0, 0.0]


def test_nothing_is_computed_that_nobody_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def computed(*_: object) -> Tensor:
        raise AssertionError("metrics were computed")

    for name in ("ordered_pairs", "within_group_std"):
        monkeypatch.setattr(metrics, name, computed)
    scores, rewards = torch.tensor([-1.0, -2.0], requires_grad=True), torch.tensor([1, 0])
    conspo_loss_from_scores(scores, rewards, 2).backward()
    with pytest.raises(AssertionError, match="metrics were computed"):
        conspo_loss_from_scores(scores, rewards, 2, return_metrics=True)
