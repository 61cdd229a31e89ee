"""What arXiv:2605.12969 proves of GRPO and of ConSPO, by its own names, and what its constants mean: docs/theory.md.

The names of the tests are the paper's, each with its section. All comparisons are in fp64, to 1e-12.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from logprob_batch import Batch
from objectives import (
    clipped,
    clipped_ratio_scores,
    coefficients,
    grpo,
    informative,
    linear_score_gap,
    ratios,
    rollout_means,
)
from torch import Tensor

from conspo_kernels import conspo_loss_from_scores

SIZES = (2, 5, 8, 16)
GROUPS = 250  # of each size: 1,000 in all
PAPER = {"tau": 10.0, "margin": 0.01}  # section 5.1
CONSTANTS = {"tau 10": (10.0, 0.01), "tau 1": (1.0, 0.5), "tau 0.1": (0.1, 0.0)}  # tau, margin


def assert_close(actual: Tensor, expected: Tensor) -> None:
    """To 1e-12 of the largest number that is expected."""
    assert expected.abs().max() > 0
    assert (actual - expected).abs().max() <= 1e-12 * expected.abs().max()


def shares(weights: Tensor) -> Tensor:
    """Weights [g, size] that sum to 1 in each group, 0 where a group has none."""
    total = weights.sum(1, keepdim=True)
    return weights / total.where(total > 0, 1.0)


# GRPO


def fraction_clipped(batch: Batch) -> float:
    """Of response tokens."""
    ratio = ratios(batch.logprobs, batch.old, batch.mask)
    return (((ratio - 1).abs() > 0.2).sum() / batch.mask.sum()).item()


def reweighted_score_gap(
    logprobs: Tensor, old: Tensor, mask: Tensor, rewards: Tensor, size: int, *, clip: float = 0.2
) -> Tensor:
    """-mean_g 1/2 E|A| (E[s+] - E[s-]), right rollouts drawn by the positive part of A and wrong ones by the negative.

    s+ = (1/n) sum_t min(rho, 1 + clip),  s- = (1/n) sum_t max(rho, 1 - clip).
    """
    groups, ratio = rewards.view(-1, size), ratios(logprobs, old, mask)
    advantage = (groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)
    up = rollout_means(ratio.clamp(max=1 + clip), mask).view(-1, size)
    down = rollout_means(ratio.clamp(min=1 - clip), mask).view(-1, size)
    gap = (shares(advantage.clamp(min=0)) * up - shares((-advantage).clamp(min=0)) * down).sum(1)
    return -(advantage.abs().mean(1) / 2 * gap).mean()


def rewards_of(kind: str, seed: int, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if kind == "real":
        return 3 * torch.randn(count, generator=generator, dtype=torch.float64) - 1
    return torch.randint(5, (count,), generator=generator).double() / 4  # marks: ties, groups of one mark


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", ["real", "marks"])
def test_proposition_1(kind: str, size: int) -> None:
    """Section 4.1, appendix A.1. Whatever the rewards: GRPO is a gap between reweighted clipped-ratio scores."""
    batch = Batch(size, GROUPS, size)
    batch.rewards = rewards_of(kind, size, GROUPS * size)
    assert 0.2 < fraction_clipped(batch) < 0.6  # the clip acts
    inputs = (batch.logprobs, batch.old, batch.mask, batch.rewards, size)
    value, gradient = coefficients(grpo, *inputs)
    expected_value, expected = coefficients(reweighted_score_gap, *inputs)
    assert_close(gradient, expected)
    assert_close(value, expected_value)
    other = batch.gradient(reweighted_score_gap, clip=0.25)
    assert (gradient - other).abs().max() > 1e-3 * gradient.abs().max()  # the comparison can fail


def weighted_score_gap(
    logprobs: Tensor, old: Tensor, mask: Tensor, rewards: Tensor, size: int, clip: float = 0.2
) -> Tensor:
    """-mean_g c_g (mean score of the right - mean score of the wrong), c_g = p (1 - p) / (std_g r + 1e-4).

    p: the fraction of right rollouts of the group. The scores are means of clipped ratios. With std_g the deviation of
    the group itself, and nothing added to it, c_g is sqrt(p (1 - p)).
    """
    scores = clipped_ratio_scores(logprobs, old, mask, rewards, clip, clip).view(-1, size)
    rewards = rewards.view(-1, size)
    p = rewards.mean(1)
    weight = p * (1 - p) / (rewards.std(1) + 1e-4)
    gap = (shares(rewards) * scores).sum(1) - (shares(1 - rewards) * scores).sum(1)
    return -(weight * gap).mean()


@pytest.mark.parametrize("size", SIZES)
def test_proposition_1_with_rewards_of_0_and_1(size: int) -> None:
    """Section 4.1. The weights within a group are uniform."""
    batch = Batch(size, GROUPS, size)
    assert 0.2 < fraction_clipped(batch) < 0.6  # the clip acts
    assert 0.3 < informative(batch.rewards, size).double().mean() < 1
    gradient = batch.gradient(grpo)
    assert_close(gradient, batch.gradient(weighted_score_gap))
    other = batch.gradient(weighted_score_gap, clip=0.25)
    assert (gradient - other).abs().max() > 1e-3 * gradient.abs().max()  # the comparison can fail


def clipped_surrogate(logprobs: Tensor, old: Tensor, mask: Tensor, rewards: Tensor, size: int) -> Tensor:
    """sum_g of GRPO's surrogate as the paper writes it, to be maximised: A = (r - mean) / deviation of the group."""
    groups = rewards.view(-1, size)
    deviation = groups.std(1, correction=0, keepdim=True)
    advantage = (groups - groups.mean(1, keepdim=True)) / deviation.where(deviation > 0, 1.0)
    per_token = clipped(ratios(logprobs, old, mask), advantage.view(-1, 1), 0.2, 0.2)
    return rollout_means(per_token, mask).view(-1, size).mean(1).sum()


def credit_by_counts(rewards: Tensor, size: int) -> Tensor:
    """[s]: sqrt(p (1 - p)) / N+ for a right rollout, -sqrt(p (1 - p)) / N- for a wrong one."""
    right = rewards.view(-1, size)
    p = right.mean(1, keepdim=True)
    return ((p * (1 - p)).sqrt() * (shares(right) - shares(1 - right))).flatten()


@pytest.mark.parametrize("size", SIZES)
def test_lemma_1(size: int) -> None:
    """Section 4.1. GRPO's derivatives by the scores, of ragged rollouts on which the clip acts.

    By the chain rule: the gradient by a log-probability is the derivative by its rollout's score times the score's own.
    """
    batch = Batch(size, GROUPS, size)
    leaf = batch.logprobs.clone().requires_grad_()
    scores = clipped_ratio_scores(leaf, batch.old, batch.mask, batch.rewards, 0.2, 0.2)
    (by_logprobs,) = torch.autograd.grad(scores.sum(), leaf)
    derivatives = credit_by_counts(batch.rewards, size)
    assert_close(batch.gradient(clipped_surrogate), derivatives[:, None] * by_logprobs)


@pytest.mark.parametrize("size", SIZES)
def test_lemma_1_is_blind_to_scores(size: int) -> None:
    """Where no clip acts other scores have the same derivatives. One token a rollout: its ratio is its score."""
    batch = Batch(size, GROUPS, size, length=1)
    expected = credit_by_counts(batch.rewards, size)
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        ratio = 0.85 + 0.3 * torch.rand(batch.logprobs.shape, generator=generator, dtype=torch.float64)
        batch.logprobs = batch.old + ratio.log()
        assert_close((batch.gradient(clipped_surrogate) / ratio).flatten(), expected)


# ConSPO


class Scores:
    """Scores of 250 groups with right and wrong rollouts: a deviation of `spread`, and right ones `gap` above."""

    def __init__(self, seed: int, size: int, spread: float, gap: float = 0.0) -> None:
        generator = torch.Generator().manual_seed(seed)
        count = torch.randint(1, size, (GROUPS, 1), generator=generator)
        self.right = torch.rand(GROUPS, size, generator=generator).argsort(1) < count
        self.scores = spread * torch.randn(GROUPS, size, generator=generator, dtype=torch.float64) + gap * self.right
        self.n_right, self.n_wrong = self.right.sum(1, keepdim=True), (~self.right).sum(1, keepdim=True)

    def weights(self, tau: float, margin: float, moved: Tensor | float = 0.0) -> Tensor:
        """dloss/dscores [g, size] by the library, of the scores plus `moved`; groups are summed."""
        leaf = (self.scores + moved).flatten().requires_grad_()
        loss = conspo_loss_from_scores(
            leaf, self.right.flatten(), self.right.shape[1], tau=tau, margin=margin, reduction="sum"
        )
        return torch.autograd.grad(loss, leaf)[0].view_as(self.scores)

    def flat_weights(self) -> Tensor:
        """dloss/dscores [g, size] of a linear score gap with the group weight N- / (N- + 1)."""
        logprobs = self.scores.view(-1, 1)
        batch = (logprobs, torch.ones_like(logprobs), self.right.double().flatten(), self.right.shape[1])
        gap = coefficients(linear_score_gap, logprobs, *batch)[1].view_as(self.scores) * GROUPS
        return gap * self.n_wrong / (self.n_wrong + 1)


def objective(scores: Tensor, right: Tensor, tau: float, margin: float) -> Tensor:
    """sum_g (1/N+) sum_i tau log( exp((s_i - m)/tau) / (exp((s_i - m)/tau) + sum_j exp(s_j/tau)) ): equation 13."""
    positive = ((scores - margin) / tau).exp()
    negatives = ((scores / tau).exp() * ~right).sum(1, keepdim=True)
    return (shares(right.double()) * tau * (positive / (positive + negatives)).log()).sum()


def probabilities(of: Scores, tau: float, margin: float) -> tuple[Tensor, Tensor]:
    """P_i [g, i] and P_ij [g, i, j]: a right rollout against wrong ones; 0 where i is wrong or j is right."""
    positive, each = ((of.scores - margin) / tau).exp(), (of.scores / tau).exp()
    whole = positive + (each * ~of.right).sum(1, keepdim=True)
    p_ij = each[:, None, :] / whole[:, :, None] * of.right[:, :, None] * ~of.right[:, None, :]
    return positive / whole * of.right, p_ij


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("tau", "margin"), CONSTANTS.values(), ids=CONSTANTS)
def test_lemma_2(tau: float, margin: float, size: int) -> None:
    """Section 4.2, appendix A.2. ConSPO's derivatives by the scores: (1 - P_i) / N+ and -(1/N+) sum_i P_ij."""
    of = Scores(size, size, spread=1.0)
    p_i, p_ij = probabilities(of, tau, margin)
    expected = torch.where(of.right, 1 - p_i, -p_ij.sum(1)) / of.n_right
    leaf = of.scores.clone().requires_grad_()
    (by_autograd,) = torch.autograd.grad(objective(leaf, of.right, tau, margin), leaf)
    assert_close(by_autograd, expected)
    assert_close(-of.weights(tau, margin), expected)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("tau", "margin"), CONSTANTS.values(), ids=CONSTANTS)
def test_lemma_2_balance(tau: float, margin: float, size: int) -> None:
    """What right rollouts gain in a group is what its wrong ones lose."""
    of = Scores(size, size, spread=1.0)
    weights = of.weights(tau, margin)
    assert_close((weights * of.right).sum(1), -(weights * ~of.right).sum(1))


@pytest.mark.parametrize("size", SIZES[1:])
@pytest.mark.parametrize(("tau", "margin"), CONSTANTS.values(), ids=CONSTANTS)
def test_lemma_2_ratio_of_two_negatives(tau: float, margin: float, size: int) -> None:
    """Two wrong rollouts of a group are blamed in the ratio exp((s_j - s_k) / tau), whatever the right ones are."""
    of = Scores(size, size, spread=1.0)
    weights = of.weights(tau, margin)
    compared = 0
    for j, k in itertools.permutations(range(size), 2):
        both = ~of.right[:, j] & ~of.right[:, k]
        expected = ((of.scores[both, j] - of.scores[both, k]) / tau).exp()
        torch.testing.assert_close(weights[both, j] / weights[both, k], expected, rtol=1e-12, atol=0)
        compared += int(both.sum())
    assert compared >= GROUPS


# What the paper's constants mean: a remark of ours.

SPREAD, GAP = 0.5, 0.84  # nats per token: the deviation and the gap of the demo's scores


@pytest.mark.parametrize("size", SIZES)
def test_at_the_papers_constants_conspo_is_a_weighted_linear_gap(size: int) -> None:
    """Every weight within exp(range / tau) of the flat one, range that of a group's scores; on average 3 to 5 %."""
    of = Scores(size, size, SPREAD, GAP)
    flat = of.flat_weights()

    def distance(weights: Tensor) -> float:
        return ((weights - flat).norm(dim=1) / flat.norm(dim=1)).mean().item()

    for tau in (PAPER["tau"], 1.0, 0.3):
        weights = of.weights(tau, PAPER["margin"])
        shifted = of.scores - PAPER["margin"] * of.right
        spread = shifted.amax(1, keepdim=True) - shifted.amin(1, keepdim=True)
        assert ((weights / flat).log().abs() <= spread / tau + 1e-12).all()
    assert 0.03 < distance(of.weights(**PAPER)) < 0.055
    assert distance(of.weights(1.0, PAPER["margin"])) > 5 * distance(of.weights(**PAPER))  # sharper ones are not flat


def test_at_the_papers_temperature_the_margin_hardly_acts() -> None:
    """A tenfold M, from end to end of the paper's figure 3, moves every weight by less than half a per cent."""
    of = Scores(0, 8, SPREAD, GAP)
    moved = of.weights(PAPER["tau"], 0.05) / of.weights(PAPER["tau"], 0.005) - 1
    assert 1e-4 < moved.abs().max() < 0.005
    taken_away = of.weights(PAPER["tau"], 0.0) / of.weights(**PAPER) - 1
    assert 1e-5 < taken_away.abs().max() < 0.001


@pytest.mark.parametrize("size", SIZES)
def test_weights_move_by_the_drift_over_tau(size: int) -> None:
    """When one score moves by ds no weight of its group moves by more than ds / tau; all at once, by 2 ds / tau."""
    of, drift = Scores(size, size, SPREAD, GAP), 0.1
    generator = torch.Generator().manual_seed(size)
    signs = torch.randint(2, of.scores.shape, generator=generator).double() * 2 - 1

    def change(tau: float, moved: Tensor) -> Tensor:
        return (of.weights(tau, PAPER["margin"], moved) / of.weights(tau, PAPER["margin"])).log().abs()

    for tau in (PAPER["tau"], 1.0, 0.1):
        assert change(tau, drift * signs).max() <= 2 * drift / tau * (1 + 1e-9)
        one = torch.zeros_like(of.scores)
        one[:, 0] = drift
        assert change(tau, one).max() <= drift / tau * (1 + 1e-9)
        assert change(tau, torch.full_like(of.scores, drift)).max() < 1e-12  # all alike
    moved = of.weights(**PAPER, moved=drift * signs) / of.weights(**PAPER) - 1
    assert 0.005 < moved.abs().max() < 0.02
    assert change(0.1, drift * signs).max() > 1.9  # sharper ones: some more than sixfold


# The figure


def test_credit_follows_the_gap_in_conspo_and_not_in_grpo() -> None:
    """The curves of examples/credit.py, against the closed form of ConSPO's weights."""
    pytest.importorskip("matplotlib")
    from credit import CURVES, GAPS, GROUP, OTHERS, RIGHT, credit

    flat = credit(*CURVES["GRPO"], 0)
    torch.testing.assert_close(flat, flat[:1].expand_as(flat), rtol=1e-12, atol=0)
    assert flat[0] > 0
    assert CURVES["ConSPO, tau 10 (the paper's)"][1] == PAPER
    curves = [CURVES[name] for name in CURVES if name != "GRPO"]
    assert [constants["tau"] for _, constants in curves] == [10, 1, 0.3, 0.1]
    for of, constants in curves:
        tau = constants["tau"]
        others = OTHERS + tau * torch.tensor(GROUP - RIGHT, dtype=torch.float64).log()  # tau logsumexp_j s_j / tau
        q = torch.sigmoid((others - (OTHERS + GAPS - constants["margin"])) / tau)
        torch.testing.assert_close(credit(of, constants, 0), q / RIGHT, rtol=1e-9, atol=1e-15)
        assert (credit(of, constants, RIGHT).diff() < 0).all()  # a likelier wrong one is pushed harder
