"""The oracle against constants worked by hand, gradcheck, and the closed forms of its gradient.

Most cases use rows of two logits, [0, x]: token 1 then has odds exp(x), so [0, ln 3] means p = 1/4 and 3/4. Where a
case needs a rollout of a given score, the row is [ln(1-p), ln p] with label 1, whose log-probability is ln p.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from conspo_kernels import reference
from conspo_kernels.reference import ReferenceOutput, positive_log_share, sequence_score, token_entropy, token_logprob

# The constants are worked out at tau = 1, where a positive's share is its odds.
group_loss = functools.partial(reference.group_loss, tau=1.0)
reference_loss = functools.partial(reference.reference_loss, tau=1.0)
INF, NAN = math.inf, math.nan
LN2, LN3 = math.log(2), math.log(3)
IGNORE = -100


def fp64(*values: object) -> Tensor:
    return torch.tensor(values[0] if len(values) == 1 else values, dtype=torch.float64)


def padded(rollouts: Sequence[Sequence[float]], length: int) -> tuple[Tensor, Tensor]:
    """Logits [B, T, 2] and labels [B, T] of rollouts given as the probabilities of their tokens, ignored tail."""
    logits = torch.zeros(len(rollouts), length, 2, dtype=torch.float64)
    labels = torch.full((len(rollouts), length), IGNORE)
    for i, probabilities in enumerate(rollouts):
        for t, p in enumerate(probabilities):
            logits[i, t] = fp64(math.log(1 - p), math.log(p))
            labels[i, t] = 1
    return logits.requires_grad_(), labels


def one_token(probabilities: Sequence[float]) -> tuple[Tensor, Tensor]:
    return padded([[p] for p in probabilities], length=1)


def gradient(output: ReferenceOutput, logits: Tensor) -> Tensor:
    (grad,) = torch.autograd.grad(output.loss.sum(), logits, retain_graph=True)
    return grad


def close(actual: Tensor | float, expected: object, atol: float = 1e-12) -> None:
    actual = torch.as_tensor(actual, dtype=torch.float64).detach()
    torch.testing.assert_close(actual, fp64(expected), rtol=0, atol=atol, equal_nan=True)


# ---- one token -------------------------------------------------------------------------------------------------------


def test_token_logprob_by_hand() -> None:
    # exp(0) : exp(ln 3) = 1 : 3, so p = 1/4 and 3/4.  ln(1/4) = -1.386294...,  ln(3/4) = -0.287682...
    row = fp64(0.0, LN3)
    close(token_logprob(row, 0), -1.3862943611198906)
    close(token_logprob(row, 1), -0.2876820724517809)


def test_token_entropy_by_hand() -> None:
    # 1/4 * ln 4 + 3/4 * ln(4/3) = 0.25 * 1.386294 + 0.75 * 0.287682 = 0.346574 + 0.215762
    close(token_entropy(fp64(0.0, LN3)), 0.5623351446188084)
    # Four equal tokens: ln 4. One token: 0.
    close(token_entropy(fp64(7.0, 7.0, 7.0, 7.0)), math.log(4))
    close(token_entropy(fp64([-3.0])), 0.0)


@pytest.mark.parametrize(
    ("x", "transform"),
    [
        (2 * LN3, {"temperature": 2.0}),  # 2 ln 3 / 2
        (LN3 / 2, {"logit_scale": 2.0}),
        (LN3, {"temperature": 3.0, "logit_scale": 3.0}),
        # tanh(ln(3)/2) = (3-1)/(3+1) = 1/2, so a cap of 2 ln 3 makes ln 3 out of (2 ln 3) * (ln(3)/2) = (ln 3)^2.
        (LN3**2, {"softcap": 2 * LN3}),
        (LN3**2 / 2, {"softcap": 2 * LN3, "logit_scale": 2.0}),  # the scale comes before the cap,
        (4 * LN3**2, {"softcap": 4 * LN3, "logit_scale": 0.5, "temperature": 2.0}),  # the temperature after it
    ],
)
def test_every_transform_that_makes_ln_3(x: float, transform: dict[str, Any]) -> None:
    row = fp64(0.0, x)
    close(token_logprob(row, 1, **transform), -0.2876820724517809)
    close(token_entropy(row, **transform), 0.5623351446188084)


def test_softcap_gradient_by_hand() -> None:
    # f' = 1 - tanh^2: 1 at z = 0, 3/4 at z = (ln 3)^2 (above).  d logp(1) / dz = f' * (1[v=1] - p_v):
    # z_0: 1 * (0 - 1/4),  z_1: 3/4 * (1 - 3/4) = 3/16.
    row = fp64(0.0, LN3**2).requires_grad_()
    token_logprob(row, 1, softcap=2 * LN3).backward()
    assert row.grad is not None
    close(row.grad, [-1 / 4, 3 / 16])


@pytest.mark.parametrize(("softcap", "x"), [(None, LN3), (2 * LN3, LN3**2)])
def test_impossible_entries_change_nothing_and_get_no_gradient(softcap: float | None, x: float) -> None:
    row = fp64(-INF, 0.0, -INF, x).requires_grad_()
    logprob, entropy = token_logprob(row, 3, softcap=softcap), token_entropy(row, softcap=softcap)
    close(logprob, -0.2876820724517809)
    close(entropy, 0.5623351446188084)
    (logprob + entropy).backward()
    assert row.grad is not None
    assert row.grad.isfinite().all()
    assert row.grad[[0, 2]].tolist() == [0.0, 0.0]
    # Without them: the same gradient.
    short = fp64(0.0, x).requires_grad_()
    (token_logprob(short, 1, softcap=softcap) + token_entropy(short, softcap=softcap)).backward()
    assert short.grad is not None
    assert torch.equal(row.grad[[1, 3]], short.grad)


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_impossible_label_has_log_probability_minus_infinity(softcap: float | None) -> None:
    assert token_logprob(fp64(0.0, -INF), 1, softcap=softcap).item() == -INF


@pytest.mark.parametrize("label", [-1, 2, 10**12])
def test_label_outside_the_vocabulary_is_nan(label: int) -> None:
    assert token_logprob(fp64(0.0, LN3), label).isnan()


def test_huge_logits_keep_their_digits() -> None:
    close(token_logprob(fp64(1e4, 1e4 + LN3), 1), -0.2876820724517809, atol=4e-12)  # ulp(1e4) = 1.8e-12
    close(token_logprob(fp64(-1e4, 1e4), 0), -2e4)
    close(token_entropy(fp64(-1e4, 1e4)), 0.0)


def test_vocabulary_of_one() -> None:
    row = fp64([3.0]).requires_grad_()
    logprob = token_logprob(row, 0)
    logprob.backward()
    assert row.grad is not None
    assert (logprob.item(), row.grad.tolist()) == (0.0, [0.0])


# ---- one group -------------------------------------------------------------------------------------------------------


def test_score_is_the_mean_over_tokens() -> None:
    close(sequence_score([fp64([-1.0])[0], fp64([-2.0])[0], fp64([-6.0])[0]]), -3.0)


def test_one_positive_one_negative() -> None:
    # Positive: tokens of p = 3/4 and 1/3, product 1/4, score ln(1/4)/2 = -ln 2.  Negative: 1/4 twice, score -2 ln 2.
    # loss = softplus(s_neg - s_pos) = ln(1 + exp(-ln 2)) = ln 1.5 = 0.405465...
    logits, labels = padded([[3 / 4, 1 / 3], [1 / 4, 1 / 4]], length=2)
    output = reference_loss(logits, labels, fp64(1.0, 0.0), 2)
    close(output.logprobs, [[math.log(3 / 4), -LN3], [-2 * LN2, -2 * LN2]])
    close(output.scores, [-LN2, -2 * LN2])
    close(output.loss, 0.4054651081081644)
    # q = (1/2) / (1 + 1/2) = 1/3.
    close(output.weights, [-1 / 3, 1 / 3])
    # Each token has c = w/2 = -1/6 or 1/6 and gradient c * (1 - p) at its label, the opposite at the other:
    # -1/6 * 1/4 = -1/24,  -1/6 * 2/3 = -1/9,  1/6 * 3/4 = 1/8.
    expected = [[[1 / 24, -1 / 24], [1 / 9, -1 / 9]], [[-1 / 8, 1 / 8], [-1 / 8, 1 / 8]]]
    close(gradient(output, logits), expected)
    # 1 - q = 2/3.
    close(output.metrics["conspo/pos_prob_mean"], 2 / 3)


def test_temperature_and_margin_of_the_objective() -> None:
    # tau = 0.5, m = 0.25, positives of p = 1/2 and 3/4, negatives of 1/4 and 1/2, one token each.
    # exp((s-m)/tau) = p^2 * exp(-0.5) with exp(-0.5) = 0.606530660:  1/4 -> 0.151632665,  9/16 -> 0.341173496.
    # sum over negatives of exp(s/tau) = p^2:  1/16 + 1/4 = 0.3125.
    # Shares 1-q:  0.151632665 / 0.464132665 = 0.326701127,  0.341173496 / 0.653673496 = 0.521932583.
    # loss = -(1/2) * 0.5 * (ln 0.326701127 + ln 0.521932583) = -0.25 * (-1.118709509 - 0.650216851) = 0.442231590
    logits, labels = one_token([1 / 2, 1 / 4, 3 / 4, 1 / 2])
    output = reference_loss(logits, labels, fp64(1.0, 0.0, 1.0, 0.0), 4, tau=0.5, margin=0.25)
    close(output.loss, 0.442231590138081282)
    # Positives: -q/2 = -0.673298873/2 and -0.478067417/2.  Negatives: their sum, 0.575683145, in parts 1/16 : 1/4.
    close(output.weights, [-0.336649436264490130, 0.115136628977938035, -0.239033708625200043, 0.460546515911752138])
    close(output.metrics["conspo/pos_prob_mean"], (0.326701127471019740 + 0.521932582749599914) / 2)


def test_far_tails_of_the_group_loss() -> None:
    # A gap of 60: ln(1 + e^-60) = e^-60 = 8.756510762696521e-27, which 1 + e^-60 = 1 in fp64 would lose.
    assert group_loss(fp64([0.0]), fp64([-60.0])).item() == pytest.approx(8.756510762696521e-27, rel=1e-12)
    # The other way round the loss is the gap, however large.
    assert group_loss(fp64([-1e6]), fp64([0.0])).item() == 1e6
    assert group_loss(fp64([-1.0]), fp64([-3.0]), tau=1e-3).item() == 0.0


def naive_group_loss(positives: Sequence[float], negatives: Sequence[float], tau: float, margin: float) -> float:
    """The definition, letter for letter."""
    rivals = sum(math.exp(s / tau) for s in negatives)
    shares = [math.exp((s - margin) / tau) / (math.exp((s - margin) / tau) + rivals) for s in positives]
    return -sum(tau * math.log(share) for share in shares) / len(shares)


def closed_form_weights(
    positives: Sequence[float], negatives: Sequence[float], tau: float, margin: float
) -> tuple[list[float], list[float]]:
    """d loss / d s of one group: -q_i/|P| for positives, (sum_i q_i/|P|) * softmax(s/tau)_j for negatives."""
    highest = max(negatives) / tau
    exps = [math.exp(s / tau - highest) for s in negatives]
    log_rivals = highest + math.log(sum(exps))
    q = [1 / (1 + math.exp(-(log_rivals - (s - margin) / tau))) for s in positives]
    mean_q = sum(q) / len(positives)
    return [-q_i / len(positives) for q_i in q], [mean_q * e / sum(exps) for e in exps]


SCORES = st.lists(st.floats(min_value=-8.0, max_value=-0.001), min_size=1, max_size=6)
TAUS = st.floats(min_value=0.05, max_value=3.0)
MARGINS = st.floats(min_value=-1.0, max_value=1.0)


@given(positives=SCORES, negatives=SCORES, tau=TAUS, margin=MARGINS)
def test_group_loss_is_its_definition(
    positives: list[float], negatives: list[float], tau: float, margin: float
) -> None:
    expected = naive_group_loss(positives, negatives, tau, margin)
    loss = group_loss(fp64(positives), fp64(negatives), tau=tau, margin=margin)
    assert loss.item() == pytest.approx(expected, abs=1e-12)


@settings(deadline=None)
@given(positives=SCORES, negatives=SCORES, tau=TAUS, margin=MARGINS, num_groups=st.sampled_from([None, 3]))
def test_weights_are_the_closed_form(
    positives: list[float], negatives: list[float], tau: float, margin: float, num_groups: int | None
) -> None:
    logits, labels = one_token([math.exp(s) for s in [*positives, *negatives]])
    rewards = fp64([1.0] * len(positives) + [0.0] * len(negatives))
    output = reference_loss(logits, labels, rewards, len(rewards), tau=tau, margin=margin, num_groups=num_groups)
    expected_p, expected_q = closed_form_weights(positives, negatives, tau, margin)
    close(output.weights * (num_groups or 1), [*expected_p, *expected_q])
    assert abs(output.weights.sum().item()) < 1e-14
    # And the gradient at the label of a one-token rollout is w * (1 - p).
    expected = output.weights * (1 - output.scores.exp())
    close(gradient(output, logits)[:, 0, 1], expected.tolist())


@given(positives=SCORES, negatives=SCORES, tau=TAUS, margin=MARGINS, constant=st.floats(-50.0, 50.0))
def test_a_constant_added_to_all_scores_changes_nothing(
    positives: list[float], negatives: list[float], tau: float, margin: float, constant: float
) -> None:
    loss = group_loss(fp64(positives), fp64(negatives), tau=tau, margin=margin)
    moved = group_loss(fp64(positives) + constant, fp64(negatives) + constant, tau=tau, margin=margin)
    close(moved, loss.item())


@given(positives=SCORES, negatives=SCORES, tau=TAUS, margin=MARGINS)
def test_log_share_is_the_softplus_of_the_stable_form(
    positives: list[float], negatives: list[float], tau: float, margin: float
) -> None:
    for s in positives:
        x = math.log(sum(math.exp(n / tau) for n in negatives)) - (s - margin) / tau
        assume(abs(x) < 700)
        expected = -math.log1p(math.exp(x)) if x < 0 else -x - math.log1p(math.exp(-x))
        close(positive_log_share(fp64([s])[0], fp64(negatives), tau, margin), expected)


# ---- which groups and rollouts take part -----------------------------------------------------------------------------

# Two groups of two, one token each. First: p = 1/2 right, 1/4 wrong, ratio 1/2, loss ln 1.5, weights -1/3 and 1/3.
# Second: p = 1/4 right, 1/2 wrong, ratio 2, loss ln 3, weights -2/3 and 2/3.
FIRST, SECOND = math.log(1.5), LN3
TWO_GROUPS = [1 / 2, 1 / 4, 1 / 4, 1 / 2]


def test_reductions() -> None:
    logits, labels = one_token(TWO_GROUPS)
    rewards = fp64(1.0, 0.0, 1.0, 0.0)
    mean = reference_loss(logits, labels, rewards, 2)
    close(mean.loss, (FIRST + SECOND) / 2)
    close(mean.weights, [-1 / 6, 1 / 6, -1 / 3, 1 / 3])
    total = reference_loss(logits, labels, rewards, 2, reduction="sum")
    close(total.loss, FIRST + SECOND)
    close(total.weights, [-1 / 3, 1 / 3, -2 / 3, 2 / 3])
    each = reference_loss(logits, labels, rewards, 2, reduction="none")
    close(each.loss, [FIRST, SECOND])
    close(each.weights, total.weights.tolist())
    close(each.metrics["conspo/loss"], (FIRST + SECOND) / 2)
    # With w = dL/ds of one-token rollouts the gradient at the label is w * (1 - p).
    close(gradient(mean, logits)[:, 0, 1], [-1 / 12, 1 / 8, -1 / 4, 1 / 6])


@pytest.mark.parametrize("num_groups", [8, 8.0, torch.tensor(8)])
def test_num_groups_is_the_denominator_of_mean_only(num_groups: float | Tensor) -> None:
    logits, labels = one_token(TWO_GROUPS)
    rewards = fp64(1.0, 0.0, 1.0, 0.0)
    output = reference_loss(logits, labels, rewards, 2, num_groups=num_groups)
    close(output.loss, (FIRST + SECOND) / 8)
    close(output.metrics["conspo/loss"], (FIRST + SECOND) / 8)
    close(output.weights, [-1 / 24, 1 / 24, -1 / 12, 1 / 12])
    close(reference_loss(logits, labels, rewards, 2, reduction="sum", num_groups=8).loss, FIRST + SECOND)
    close(reference_loss(logits, labels, rewards, 2, reduction="none", num_groups=8).loss, [FIRST, SECOND])


def test_ids_in_any_order_and_of_any_size() -> None:
    # Group 7: rollouts 1 (right, 1/2), 3 (wrong, 1/4), 5 (wrong, 1/8): rivals over share 3/4, loss ln(7/4).
    # Group -2: rollouts 0 (wrong, 1/2) and 4 (right, 1/4): loss ln 3.  Group 40: rollout 2 alone, not valid.
    logits, labels = one_token([1 / 2, 1 / 2, 1 / 2, 1 / 4, 1 / 4, 1 / 8])
    rewards, ids = fp64(0.0, 1.0, 1.0, 0.0, 1.0, 0.0), torch.tensor([-2, 7, 40, 7, -2, 7])
    output = reference_loss(logits, labels, rewards, ids)
    close(output.loss, (math.log(7 / 4) + LN3) / 2)
    # q = (3/4)/(7/4) = 3/7, shared by the negatives 2 : 1; the other q = 2/3; all halved by the mean.
    close(output.weights, [1 / 3, -3 / 14, 0.0, 2 / 14, -1 / 3, 1 / 14])
    close(output.metrics["conspo/valid_group_fraction"], 2 / 3)
    each = reference_loss(logits, labels, rewards, ids, reduction="none")
    close(each.loss, [LN3, math.log(7 / 4), 0.0, 0.0, 0.0, 0.0])
    assert gradient(each, logits)[2].abs().max() == 0


def test_none_stands_at_the_first_rollout_even_if_that_takes_no_part() -> None:
    logits, labels = one_token([1 / 2, *TWO_GROUPS[:2]])
    output = reference_loss(logits, labels, fp64(NAN, 1.0, 0.0), torch.tensor([3, 3, 3]), reduction="none")
    close(output.loss, [FIRST, 0.0, 0.0])


def test_invalid_groups_leave_the_denominator() -> None:
    # The first group as above, then one all right and one all wrong.
    logits, labels = one_token([*TWO_GROUPS[:2], 1 / 3, 1 / 5, 1 / 3, 1 / 5])
    rewards = fp64(1.0, 0.0, 1.0, 1.0, 0.0, 0.0)
    output = reference_loss(logits, labels, rewards, 2)
    close(output.loss, FIRST)
    close(output.weights, [-1 / 3, 1 / 3, 0.0, 0.0, 0.0, 0.0])
    close(output.metrics["conspo/valid_group_fraction"], 1 / 3)
    close(reference_loss(logits, labels, rewards, 2, reduction="none").loss, [FIRST, 0.0, 0.0])


@pytest.mark.parametrize("logit", [0.0, NAN, INF])
@pytest.mark.parametrize("groups", [2, torch.tensor([4, 4])])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_valid_group_is_a_zero_on_the_graph(logit: float, groups: int | Tensor, reduction: str) -> None:
    logits = torch.full((2, 3, 5), logit, dtype=torch.float64, requires_grad=True)
    labels = torch.zeros(2, 3, dtype=torch.int64)
    output = reference_loss(logits, labels, fp64(1.0, 1.0), groups, reduction=reduction)
    assert output.loss.requires_grad
    assert not output.loss.any()
    assert not gradient(output, logits).any()
    assert not output.weights.any()
    for name in ("score_pos_mean", "score_neg_mean", "score_gap", "score_std", "ordered_pairs", "pos_prob_mean"):
        assert math.isnan(output.metrics[f"conspo/{name}"])
    assert output.metrics["conspo/weight_abs_max"] == output.metrics["conspo/valid_group_fraction"] == 0.0
    assert output.metrics["conspo/skipped_rollouts"] == 0.0
    assert output.metrics["conspo/loss"] == 0.0


def test_no_rollout_at_all() -> None:
    logits = torch.zeros(0, 3, 5, requires_grad=True)
    output = reference_loss(logits, torch.zeros(0, 3, dtype=torch.int64), torch.zeros(0), 4)
    output.loss.backward()
    assert output.loss.item() == 0.0
    assert output.scores.shape == output.weights.shape == (0,)


def test_unscorable_and_empty_rollouts_take_no_part() -> None:
    # Rollout 1 has no reward and NaN logits, rollout 3 no token: what is left is the first group of above.
    logits, labels = padded([[1 / 2], [1 / 9], [1 / 4], []], length=2)
    with torch.no_grad():
        logits[1] = NAN
        logits[:, 1] = NAN  # ignored positions
    output = reference_loss(logits, labels, fp64(1.0, NAN, 0.0, 1.0), 4)
    close(output.loss, FIRST)
    close(output.scores, [-LN2, NAN, -2 * LN2, NAN])
    close(output.weights, [-1 / 3, 0.0, 1 / 3, 0.0])
    close(gradient(output, logits)[:, :, 1], [[-1 / 6, 0.0], [0.0, 0.0], [1 / 4, 0.0], [0.0, 0.0]])
    assert output.metrics["conspo/skipped_rollouts"] == 2.0
    assert output.metrics["conspo/response_tokens"] == 3.0  # the one without a reward counts


def test_a_group_can_lose_its_only_positive() -> None:
    logits, labels = one_token(TWO_GROUPS)
    output = reference_loss(logits, labels, fp64(1.0, 0.0, NAN, 0.0), 2)
    close(output.loss, FIRST)
    close(output.weights, [-1 / 3, 1 / 3, 0.0, 0.0])


def test_nan_logits_in_an_invalid_group_do_not_poison() -> None:
    logits, labels = one_token([*TWO_GROUPS[:2], 1 / 2, 1 / 2])
    with torch.no_grad():
        logits[2, 0, 0] = NAN
    output = reference_loss(logits, labels, fp64(1.0, 0.0, 1.0, 1.0), 2)
    close(output.loss, FIRST)
    grad = gradient(output, logits)
    assert not grad[2:].any()
    assert grad[:2].isfinite().all()
    assert output.scores[2].isnan()


@pytest.mark.parametrize("rollout", [0, 1])
def test_nan_logits_of_a_rollout_that_takes_part_give_nan(rollout: int) -> None:
    logits, labels = one_token(TWO_GROUPS)
    with torch.no_grad():
        logits[rollout, 0, 0] = NAN
    rewards = fp64(1.0, 0.0, 1.0, 0.0)
    output = reference_loss(logits, labels, rewards, 2)
    assert output.loss.isnan()
    assert gradient(output, logits)[rollout].isnan().any()
    assert math.isnan(output.metrics["conspo/weight_abs_max"])
    each = reference_loss(logits, labels, rewards, 2, reduction="none")
    close(each.loss, [NAN, SECOND])


@pytest.mark.parametrize(
    ("rewards", "threshold"),
    [
        (torch.tensor([True, False, True, False]), 0.5),
        (torch.tensor([1, 0, 1, 0]), 0.5),
        (torch.tensor([3, -1, 3, -1], dtype=torch.int8), 0.5),
        (torch.tensor([0.6, 0.5, 0.51, 0.0]), 0.5),  # exactly at the threshold is negative
        (torch.tensor([INF, -INF, 0.0, -0.5]), -0.25),
        (torch.tensor([0.2, 0.1, 0.2, 0.1]), 0.1),  # fp32(0.1) is 0.1 for torch, though 1.5e-9 above fp64(0.1)
    ],
)
def test_rewards_of_every_kind(rewards: Tensor, threshold: float) -> None:
    logits, labels = one_token(TWO_GROUPS)
    close(reference_loss(logits, labels, rewards, 2, reward_threshold=threshold).loss, (FIRST + SECOND) / 2)


def test_permuting_rollouts_permutes_weights() -> None:
    torch.manual_seed(0)
    logits = torch.randn(8, 3, 5, dtype=torch.float64)
    labels, ids = torch.randint(5, (8, 3)), torch.tensor([0, 0, 0, 1, 1, 1, 1, 2])
    rewards = fp64(1.0, 0.0, 0.0, 1.0, 1.0, 0.0, NAN, 1.0)
    order = torch.randperm(8)
    output = reference_loss(logits, labels, rewards, ids, margin=0.1)
    permuted = reference_loss(logits[order], labels[order], rewards[order], ids[order], margin=0.1)
    close(permuted.loss, output.loss.item())
    close(permuted.weights, output.weights[order].tolist())


# ---- layout ----------------------------------------------------------------------------------------------------------


def test_entropy_and_logprobs_are_zero_where_ignored() -> None:
    logits = fp64([[[0.0, LN3], [0.0, 0.0]], [[0.0, 0.0], [LN3, 0.0]]])
    output = reference_loss(logits, torch.tensor([[1, IGNORE], [IGNORE, 1]]), fp64(1.0, 0.0), 2)
    close(output.logprobs, [[math.log(3 / 4), 0.0], [0.0, -2 * LN2]])
    close(output.entropy, [[0.5623351446188084, 0.0], [0.0, 0.5623351446188084]])
    close(output.scores, [math.log(3 / 4), -2 * LN2])


def test_logprobs_and_entropy_are_differentiable() -> None:
    # d/dx of ln(3/4) at [0, ln 3] is [-1/4, 1/4].  dH/dz_v = -p_v * (ln p_v + H):
    # -1/4 * (-1.386294361 + 0.562335145) = 0.205989804, and the opposite at the other entry.
    logits = fp64([[[0.0, LN3]]]).requires_grad_()
    output = reference_loss(logits, torch.tensor([[1]]), fp64([1.0]), 1)
    (grad,) = torch.autograd.grad(output.logprobs.sum(), logits)
    close(grad, [[[-1 / 4, 1 / 4]]])
    (grad,) = torch.autograd.grad(output.entropy.sum(), logits)
    close(grad, [[[0.2059898041252706, -0.2059898041252706]]])


def test_shift_takes_the_next_input_id_of_the_same_rollout() -> None:
    # Every row is [0, ln 3]. Row 0 predicts id 1 and so on; nothing predicts id 0, and the last row predicts nothing.
    logits = fp64([0.0, LN3]).expand(2, 3, 2)
    input_ids = torch.tensor([[1, 0, 1], [0, 0, IGNORE]])
    output = reference_loss(logits, input_ids, fp64(1.0, 0.0), 2, shift=True)
    quarter, three_quarters = -2 * LN2, math.log(3 / 4)
    close(output.logprobs, [[quarter, three_quarters, 0.0], [quarter, 0.0, 0.0]])
    close(output.scores, [(quarter + three_quarters) / 2, quarter])


def test_mask_moves_with_the_input_ids() -> None:
    logits = fp64([0.0, LN3]).expand(1, 4, 2)
    input_ids, mask = torch.tensor([[9**9, 1, 9**9, 0]]), torch.tensor([[1, 1, 0, 1]])
    shifted = reference_loss(logits, input_ids, fp64([1.0]), 1, response_mask=mask, shift=True)
    # The label under the mask is never looked at, and neither is id 0, which nothing predicts.
    close(shifted.logprobs, [[math.log(3 / 4), 0.0, -2 * LN2, 0.0]])
    aligned = reference_loss(
        logits, torch.tensor([[1, 9**9, 0, IGNORE]]), fp64([1.0]), 1, response_mask=mask[:, [1, 2, 3, 0]]
    )
    assert torch.equal(aligned.logprobs, shifted.logprobs)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.uint8, torch.float32])
def test_mask_of_any_dtype(dtype: torch.dtype) -> None:
    logits, labels = padded([[1 / 2, 1 / 7], [1 / 4, 1 / 7]], length=2)
    mask = torch.tensor([[1, 0], [1, 0]]).to(dtype)
    output = reference_loss(logits, labels, fp64(1.0, 0.0), 2, response_mask=mask)
    close(output.loss, FIRST)
    close(output.metrics["conspo/response_tokens"], 2.0)


def test_another_ignore_index() -> None:
    logits = fp64([0.0, LN3]).expand(2, 2, 2)
    output = reference_loss(logits, torch.tensor([[1, 0], [0, 1]]), fp64(1.0, 0.0), 2, ignore_index=0)
    close(output.logprobs, [[math.log(3 / 4), 0.0], [0.0, math.log(3 / 4)]])


@pytest.mark.parametrize("leading", [False, True])
def test_packed_by_hand(leading: bool) -> None:
    # Rollouts of 2, 0 and 1 tokens and a row of NaN past the last offset.
    logits = fp64([[0.0, LN3], [0.0, 0.0], [0.0, LN3], [NAN, NAN]])
    labels, offsets = torch.tensor([1, 0, 0, 1]), torch.tensor([0, 2, 2, 3], dtype=torch.int32)
    if leading:
        logits, labels = logits[None], labels[None]
    logits.requires_grad_()
    output = reference_loss(logits, labels, fp64(1.0, 1.0, 0.0), 3, cu_seqlens=offsets)
    assert output.logprobs.shape == output.entropy.shape == labels.shape
    close(output.logprobs.flatten(), [math.log(3 / 4), -LN2, -2 * LN2, 0.0])
    # Scores ln(3/8)/2 and ln(1/4): the ratio is (1/4) / sqrt(3/8).
    close(output.scores, [math.log(3 / 8) / 2, NAN, -2 * LN2])
    close(output.loss, math.log(1 + 0.25 / math.sqrt(3 / 8)))
    assert output.metrics["conspo/skipped_rollouts"] == 1.0
    grad = gradient(output, logits).reshape(4, 2)
    assert grad[:3].isfinite().all()
    assert grad[3].tolist() == [0.0, 0.0]


def test_packed_shift_stays_inside_its_segment() -> None:
    logits = fp64([0.0, LN3]).expand(5, 2)
    input_ids, offsets = torch.tensor([0, 1, 1, 0, 1]), torch.tensor([0, 2, 4])
    output = reference_loss(logits, input_ids, fp64(1.0, 0.0), 2, cu_seqlens=offsets, shift=True)
    # Row 0 predicts id 1, row 2 predicts id 3; rows 1 and 3 end their segments, row 4 belongs to none.
    close(output.logprobs, [math.log(3 / 4), 0.0, -2 * LN2, 0.0, 0.0])


@pytest.mark.parametrize("shift", [False, True])
def test_padded_equals_packed(shift: bool) -> None:
    torch.manual_seed(1)
    lengths = [4, 1, 3, 2]
    logits = torch.randn(4, 4, 6, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(6, (4, 4))
    inside = torch.arange(4) < torch.tensor(lengths)[:, None]
    arguments: dict[str, Any] = {"tau": 0.7, "margin": 0.2, "softcap": 3.0, "temperature": 1.3, "shift": shift}
    rewards, ids = fp64(1.0, 0.0, 0.0, 1.0), torch.tensor([5, 6, 5, 6])
    boxes = reference_loss(logits, labels, rewards, ids, response_mask=inside, **arguments)
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    bags = reference_loss(logits[inside], labels[inside], rewards, ids, cu_seqlens=offsets, **arguments)
    assert torch.equal(boxes.loss, bags.loss)
    assert torch.equal(boxes.weights, bags.weights)
    assert torch.equal(boxes.entropy[inside], bags.entropy)
    assert torch.equal(gradient(boxes, logits), gradient(bags, logits))
    for name, value in boxes.metrics.items():
        assert bags.metrics[name] == pytest.approx(value, nan_ok=True), name


def test_low_precision_logits_are_computed_in_fp64() -> None:
    torch.manual_seed(2)
    logits = torch.randn(4, 3, 7).bfloat16().requires_grad_()
    labels, rewards = torch.randint(7, (4, 3)), torch.tensor([1, 0, 1, 0])
    output = reference_loss(logits, labels, rewards, 4)
    exact = reference_loss(logits.double(), labels, rewards, 4)
    assert output.loss.dtype == output.scores.dtype == output.weights.dtype == torch.float64
    assert torch.equal(output.loss, exact.loss)
    assert gradient(output, logits).dtype == torch.bfloat16


def test_strided_views_and_no_grad() -> None:
    torch.manual_seed(3)
    logits, labels = torch.randn(4, 4, 7), torch.randint(7, (4, 3))
    rewards = torch.tensor([1, 0, 1, 0])
    expected = reference_loss(logits[:, :-1].contiguous(), labels, rewards, 2)
    with torch.no_grad():
        output = reference_loss(logits[:, :-1], labels, rewards, 2)
    assert torch.equal(output.loss, expected.loss)
    assert torch.equal(output.weights, expected.weights)
    assert not output.loss.requires_grad


# ---- metrics ---------------------------------------------------------------------------------------------------------


def test_every_metric_by_hand() -> None:
    # Two valid groups of one positive and one negative, one group all right, one rollout without a reward.
    logits, labels = padded([[1 / 2], [1 / 4], [1 / 4], [1 / 2, 1 / 2], [1 / 5], [1 / 5]], length=2)
    ids = torch.tensor([0, 0, 1, 1, 2, 1])
    output = reference_loss(logits, labels, fp64(1.0, 0.0, 1.0, 0.0, 1.0, NAN), ids, margin=torch.tensor(0.0))
    expected = {
        "conspo/loss": (FIRST + SECOND) / 2,
        "conspo/margin": 0.0,
        "conspo/score_pos_mean": -1.5 * LN2,  # -ln 2 and -2 ln 2; the group without a negative is left out
        "conspo/score_neg_mean": -1.5 * LN2,  # -2 ln 2 and -ln 2
        "conspo/score_gap": 0.0,
        "conspo/score_std": LN2 / 2,  # each is half of ln 2 from its group's mean
        "conspo/ordered_pairs": 1 / 2,  # the first group's pair is in order, the second's is not
        "conspo/pos_prob_mean": 1 / 2,  # 2/3 and 1/3
        "conspo/valid_group_fraction": 2 / 3,
        "conspo/weight_abs_max": 1 / 3,  # 2/3, halved by the mean
        "conspo/response_tokens": 7.0,
        "conspo/skipped_rollouts": 1.0,
    }
    assert output.metrics == pytest.approx(expected, abs=1e-14)
    assert all(type(value) is float for value in output.metrics.values())


def test_means_run_over_rollouts_not_over_groups() -> None:
    # Group 0: positives of score -ln 2 and -3 ln 2 against -ln 2; group 1: positive -2 ln 2 against three of -2 ln 2.
    logits, labels = one_token([1 / 2, 1 / 8, 1 / 2, 1 / 4, 1 / 4, 1 / 4, 1 / 4])
    output = reference_loss(logits, labels, fp64(1.0, 1.0, 0.0, 1.0, 0.0, 0.0, 0.0), torch.tensor([0] * 3 + [1] * 4))
    close(output.metrics["conspo/score_pos_mean"], -2 * LN2)  # (1 + 3 + 2) / 3
    close(output.metrics["conspo/score_neg_mean"], -1.75 * LN2)  # (1 + 2 + 2 + 2) / 4
    close(output.metrics["conspo/score_gap"], -0.25 * LN2)
    # Means -5/3 ln 2 and -2 ln 2: squares (4 + 16 + 4)/9 and 0 over seven rollouts.
    close(output.metrics["conspo/score_std"], math.sqrt(24 / 9 / 7) * LN2)
    close(output.metrics["conspo/ordered_pairs"], 0.0)  # a tie is not ordered
    # Shares: 1/2,  (1/8) / (5/8) = 1/5,  (1/4) / (4/4) = 1/4.
    close(output.metrics["conspo/pos_prob_mean"], (1 / 2 + 1 / 5 + 1 / 4) / 3)


# ---- gradients -------------------------------------------------------------------------------------------------------


TRANSFORMS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.7},
    {"softcap": 2.0},
    {"softcap": 3.0, "logit_scale": 1.5, "temperature": 1.2},
]


@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradcheck_padded(transform: dict[str, Any], reduction: str) -> None:
    torch.manual_seed(4)
    logits = torch.randn(5, 3, 4, dtype=torch.float64)
    logits[0, 1, 2] = -INF  # an impossible token, never the label
    labels = torch.tensor([[0, 1, 3], [2, IGNORE, 1], [IGNORE] * 3, [3, 3, 0], [1, 0, IGNORE]])
    rewards, ids = fp64(1.0, 0.0, 1.0, 0.0, 1.0), torch.tensor([0, 0, 0, 1, 1])

    def loss(x: Tensor) -> Tensor:
        return reference_loss(x, labels, rewards, ids, tau=0.5, margin=0.25, reduction=reduction, **transform).loss

    assert torch.autograd.gradcheck(loss, (logits.requires_grad_(),))


@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
@pytest.mark.parametrize("shift", [False, True])
def test_gradcheck_packed(transform: dict[str, Any], shift: bool) -> None:
    torch.manual_seed(5)
    logits = torch.randn(11, 4, dtype=torch.float64, requires_grad=True)
    labels, mask = torch.randint(4, (11,)), torch.ones(11)
    mask[3] = 0
    offsets = torch.tensor([0, 3, 5, 8, 10])

    def loss(x: Tensor) -> Tensor:
        arguments: dict[str, Any] = {
            "cu_seqlens": offsets,
            "response_mask": mask,
            "shift": shift,
            "margin": 0.1,
            **transform,
        }
        return reference_loss(x, labels, torch.tensor([1, 0, 0, 1]), 4, **arguments).loss

    assert torch.autograd.gradcheck(loss, (logits,))


def test_gradcheck_of_scores_logprobs_and_entropy() -> None:
    torch.manual_seed(6)
    logits = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([[0, 1, IGNORE], [2, 3, 3]])

    def outputs(x: Tensor) -> tuple[Tensor, ...]:
        output = reference_loss(x, labels, fp64(1.0, 0.0), 2, softcap=2.0, temperature=0.8)
        return output.scores, output.logprobs, output.entropy

    assert torch.autograd.gradcheck(outputs, (logits,))


def test_gradcheck_through_a_linear_head() -> None:
    torch.manual_seed(7)
    hidden = torch.randn(4, 2, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(5, (4, 2))

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        return reference_loss(hidden @ weight.T, labels, torch.tensor([1, 0, 1, 0]), 2, softcap=4.0).loss

    assert torch.autograd.gradcheck(loss, (hidden, weight))


def test_weights_and_tokens_make_the_gradient() -> None:
    # The separation the kernels rest on: dL/dz = w_i/n_i * (1[v=a] - p_v) * f'(z)/T, f' = 1 - (f/softcap)^2.
    torch.manual_seed(8)
    logits = torch.randn(4, 3, 5, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(5, (4, 3))
    labels[1, 1:] = IGNORE
    rewards = torch.tensor([1, 0, 0, 1])
    output = reference_loss(logits, labels, rewards, 4, tau=0.5, margin=0.3, softcap=2.0, temperature=1.4)
    counts = (labels != IGNORE).sum(-1, keepdim=True)
    coefficients = output.weights[:, None] / counts * (labels != IGNORE)
    tanh = torch.tanh(logits / 2.0)
    hits = torch.nn.functional.one_hot(labels.clamp(min=0), 5)
    expected = coefficients[..., None] * (hits - (2.0 * tanh / 1.4).softmax(-1)) * (1 - tanh**2) / 1.4
    close(gradient(output, logits), expected.tolist())


# ---- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"reduction": "avg"}, "reduction"),
        ({"labels": torch.zeros(3, 4, dtype=torch.int64)}, "labels"),  # transposed
        ({"labels": torch.zeros(12, dtype=torch.int64)}, "labels"),
        ({"response_mask": torch.ones(4, 1)}, "response_mask"),
        ({"rewards": torch.ones(3)}, "rewards"),
        ({"groups": 3}, "groups"),
        ({"groups": 0}, "groups"),
        ({"groups": torch.zeros(5, dtype=torch.int64)}, "groups"),
        ({"cu_seqlens": torch.tensor([0, 8, 4, 12, 12])}, "cu_seqlens"),
        ({"cu_seqlens": torch.tensor([1, 4, 8, 10, 12])}, "cu_seqlens"),
        ({"cu_seqlens": torch.tensor([0, 4, 8, 10, 13])}, "cu_seqlens"),
    ],
)
def test_what_does_not_fit_raises(change: dict[str, Any], name: str) -> None:
    arguments: dict[str, Any] = {
        "logits": torch.zeros(4, 3, 2),
        "labels": torch.zeros(4, 3, dtype=torch.int64),
        "rewards": torch.ones(4),
        "groups": 2,
    }
    with pytest.raises(ValueError, match=rf"^{name}: expected"):
        reference_loss(**{**arguments, **change})
