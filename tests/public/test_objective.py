"""The objective: its invariants as properties, and its closed-form gradient."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerance import assert_accurate, grad_floor, max_error, value_floor
from torch import Tensor

from conspo_kernels import conspo_loss_from_scores
from conspo_kernels.reference import group_loss

Batch = tuple[Tensor, Tensor, Tensor, float, float]


@st.composite
def batches(draw: st.DrawFn) -> Batch:
    """Scores, rewards and ids of up to 12 rollouts in up to 4 groups, tau and margin."""
    size = draw(st.integers(1, 12))
    scores = draw(st.lists(st.floats(-20, 0), min_size=size, max_size=size))
    rewards = draw(st.lists(st.sampled_from([0.0, 1.0, math.nan]), min_size=size, max_size=size))
    ids = draw(st.lists(st.integers(-1, 2), min_size=size, max_size=size))
    tau, margin = draw(st.floats(0.05, 5)), draw(st.floats(-2, 2))
    return torch.tensor(scores, dtype=torch.float64), torch.tensor(rewards), torch.tensor(ids), tau, margin


def loss_and_weights(batch: Batch, implementation: str, reduction: str = "mean") -> tuple[Tensor, Tensor]:
    scores, rewards, ids, tau, margin = batch
    leaf = scores.clone().requires_grad_(True)
    loss = conspo_loss_from_scores(
        leaf, rewards, ids, tau=tau, margin=margin, reduction=reduction, implementation=implementation
    )
    return loss.detach(), torch.autograd.grad(loss.sum(), leaf)[0]


properties = settings(max_examples=40, deadline=None, derandomize=True)


@properties
@given(batches())
@pytest.mark.parametrize("implementation", ["torch", "triton"])
def test_weights_sum_to_zero_in_every_group(implementation: str, batch: Batch) -> None:
    _, weights = loss_and_weights(batch, implementation)
    for k in batch[2].unique():
        assert abs(weights[batch[2] == k].sum().item()) <= 1e-14


@properties
@given(batches(), st.floats(-50, 50))
@pytest.mark.parametrize("implementation", ["torch", "triton"])
def test_a_constant_added_to_a_group_changes_nothing(implementation: str, batch: Batch, constant: float) -> None:
    scores, rewards, ids, tau, margin = batch
    moved = torch.where(ids == ids[0], scores + constant, scores)
    a = loss_and_weights(batch, implementation)
    b = loss_and_weights((moved, rewards, ids, tau, margin), implementation)
    assert max_error(a[0], b[0]) <= 1e-11 / tau
    assert max_error(a[1], b[1]) <= 1e-11 / tau


@properties
@given(batches(), st.randoms(use_true_random=False))
@pytest.mark.parametrize("implementation", ["torch", "triton"])
def test_order_does_not_matter(implementation: str, batch: Batch, random) -> None:  # type: ignore[no-untyped-def]
    scores, rewards, ids, tau, margin = batch
    order = list(range(len(scores)))
    random.shuffle(order)
    renamed = 5 - 3 * ids  # another order of the groups, too
    a = loss_and_weights(batch, implementation)
    b = loss_and_weights((scores[order], rewards[order], renamed[order], tau, margin), implementation)
    assert max_error(a[0], b[0]) <= 1e-12
    assert max_error(a[1][order], b[1]) <= 1e-12


@properties
@given(batches())
def test_the_twins_agree_with_the_definition(batch: Batch) -> None:
    scores, rewards, ids, tau, margin = batch
    leaf = scores.clone().requires_grad_(True)
    losses = []
    for k in ids.unique():
        positives, negatives = leaf[(ids == k) & (rewards > 0.5)], leaf[(ids == k) & (rewards <= 0.5)]
        if len(positives) and len(negatives):
            losses.append(group_loss(positives, negatives, tau, margin))
    exact = torch.stack(losses).sum() if losses else leaf.sum() * 0
    (exact_weights,) = torch.autograd.grad(exact, leaf)
    for implementation in ("torch", "triton"):
        loss, weights = loss_and_weights(batch, implementation, "sum")
        assert max_error(loss, exact.detach()) <= 1e-12 * max(1.0, exact.item())
        assert max_error(weights, exact_weights) <= 1e-12


def test_well_separated_positives_keep_their_loss(implementation: str) -> None:
    """softplus(-30) is 9.4e-14, not 0: in fp32 too, where log(1 + e) would be."""
    scores, rewards = torch.tensor([0.0, -30.0]), torch.tensor([1, 0])
    loss = conspo_loss_from_scores(scores, rewards, 2, tau=1.0, implementation=implementation)
    assert loss.item() == pytest.approx(math.exp(-30), rel=1e-5)


@pytest.mark.parametrize("bad", [0, 1])
def test_infinite_scores_do_not_spread(bad: int, implementation: str) -> None:
    """A score of -inf (an impossible label) concerns its own group."""
    scores = torch.tensor([-1.0, -2.0, -1.5, -1.0])
    scores[bad] = -math.inf
    leaf = scores.requires_grad_(True)
    losses = conspo_loss_from_scores(
        leaf, torch.tensor([1, 0, 1, 0]), 2, reduction="none", implementation=implementation
    )
    assert losses[0].item() == (math.inf if bad == 0 else 0.0)
    (grad,) = torch.autograd.grad(losses[1], leaf)
    assert grad[:2].tolist() == [0.0, 0.0]
    assert grad[2:].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64, torch.bfloat16, torch.float32], ids=str)
def test_scalars_of_any_dtype_leave_the_loss_its_own(dtype: torch.dtype, implementation: str) -> None:
    scores, rewards = torch.tensor([-1.0, -2.0]), torch.tensor([1, 0])
    scalar = torch.tensor(2.0).to(dtype)
    loss = conspo_loss_from_scores(scores, rewards, 2, margin=scalar, num_groups=scalar, implementation=implementation)
    assert loss.dtype == torch.float32
    expected = conspo_loss_from_scores(scores, rewards, 2, margin=2.0, num_groups=2, implementation=implementation)
    assert torch.equal(loss, expected)


def test_a_score_of_nan_takes_no_part(implementation: str) -> None:
    """NaN is how `conspo_scores` marks a rollout without response tokens."""
    scores = torch.tensor([-1.0, math.nan, -2.0])
    loss = conspo_loss_from_scores(scores, torch.tensor([1, 1, 0]), 3, implementation=implementation)
    assert torch.equal(
        loss, conspo_loss_from_scores(scores[::2], torch.tensor([1, 0]), 2, implementation=implementation)
    )


def eager_group(scores: Tensor, positive: Tensor, tau: float, margin: float) -> Tensor:
    """One group's loss as PyTorch's own functions have it."""
    odds = torch.logsumexp(scores[~positive] / tau, 0)
    return tau * torch.nn.functional.softplus(odds - (scores[positive] - margin) / tau).mean()


@pytest.mark.leave_out(
    where=lambda p: p["implementation"] == "triton" and p["size"] == 4000 and not torch.cuda.is_available()
)
@pytest.mark.parametrize("ids", [False, True], ids=["equal groups", "ids"])
@pytest.mark.parametrize("tau", [10.0, 0.1])
@pytest.mark.parametrize("size", [512, 4000])
def test_large_groups(size: int, tau: float, ids: bool, implementation: str) -> None:
    """In fp32 sums over thousands of rollouts round no more than eager PyTorch's."""
    generator = torch.Generator().manual_seed(0)
    scores = -2 * torch.rand(size, generator=generator)
    positive = torch.rand(size, generator=generator) < 0.5
    groups = torch.full((size,), 7) if ids else size
    results = []
    for name, dtype in ((implementation, torch.float32), ("eager", torch.float32), ("eager", torch.float64)):
        leaf = scores.to(dtype).requires_grad_()
        if name == "eager":
            loss = eager_group(leaf, positive, tau, 0.01)
        else:
            loss = conspo_loss_from_scores(leaf, positive, groups, tau=tau, margin=0.01, implementation=name)
        results.append((loss, torch.autograd.grad(loss, leaf)[0]))
    (loss, grad), (eager, eager_grad), (exact, exact_grad) = results
    assert_accurate(loss, eager, exact, value_floor(exact, torch.float32), "loss")
    assert_accurate(grad, eager_grad, exact_grad, grad_floor(exact_grad, torch.float32, scores, tau), "gradient")
