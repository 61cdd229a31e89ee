"""CosineMargin against points worked by hand, its shape as properties, and its errors."""

from __future__ import annotations

import functools
import math
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conspo_kernels.margin import CosineMargin

TARGETS = st.floats(min_value=1e-3, max_value=10.0)
RATIOS = st.floats(min_value=0.0, max_value=1.0)
TOTALS = st.integers(min_value=1, max_value=100_000)
STEPS = st.integers(min_value=0, max_value=200_000)


# Target 0.8, warm-up over 0.5 of 100 steps, so over 50:  m_t = 0.4 * (1 - cos(pi * t / 50)).
@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (0, 0.0),  # cos(0) = 1
        (50 / 3, 0.2),  # cos(pi/3) = 1/2: 0.4 * 1/2
        (25, 0.4),  # cos(pi/2) = 0: half-way, half the target
        (100 / 3, 0.6),  # cos(2 pi/3) = -1/2: 0.4 * 3/2
        (50, 0.8),  # cos(pi) = -1: the end of the warm-up
        (75, 0.8),  # held
        (100, 0.8),  # the last step
        (101, 0.8),  # beyond it
        (10**9, 0.8),
    ],
)
def test_points_worked_by_hand(step: float, expected: float) -> None:
    assert CosineMargin(target=0.8, warmup_ratio=0.5, total_steps=100)(step) == pytest.approx(expected, abs=1e-15)


def test_warm_up_over_the_whole_training_is_held_beyond_it() -> None:
    margin = CosineMargin(target=0.8, warmup_ratio=1.0, total_steps=100)
    assert margin(50) == pytest.approx(0.4, abs=1e-15)
    assert margin(100) == 0.8
    # A cosine that went on would come down again: 0.4 * (1 - cos(1.5 pi)) = 0.4.
    assert margin(150) == 0.8


@pytest.mark.parametrize("step", [0, 1, 99, 100, 101])
def test_no_warm_up_is_the_target_from_the_first_step(step: int) -> None:
    assert CosineMargin(target=0.8, warmup_ratio=0.0, total_steps=100)(step) == 0.8


def test_warm_up_too_short_for_a_float_still_starts_at_zero() -> None:
    margin = CosineMargin(target=0.8, warmup_ratio=5e-324, total_steps=100)
    assert margin(0) == 0.0
    assert margin(1) == 0.8


def test_negative_target_goes_down() -> None:
    margin = CosineMargin(target=-0.8, warmup_ratio=0.5, total_steps=100)
    assert margin(25) == pytest.approx(-0.4, abs=1e-15)
    assert margin(1000) == -0.8


@pytest.mark.parametrize("target", [0.5, 1])
def test_returns_a_python_float(target: float) -> None:
    for ratio in (0.0, 0.5):
        margin = CosineMargin(10, target, ratio)
        assert [type(margin(step)) for step in (0, 2, 10, 11)] == [float] * 4


@given(target=TARGETS, ratio=RATIOS, total=TOTALS, steps=st.tuples(STEPS, STEPS))
def test_rises_and_stays_between_zero_and_target(
    target: float, ratio: float, total: int, steps: tuple[int, int]
) -> None:
    margin = CosineMargin(total, target, ratio)
    earlier, later = margin(min(steps)), margin(max(steps))
    rounding = 4e-16 * target  # of 1 - cos, a number of at most 2 with an error of at most one ulp
    assert 0 <= earlier <= later + rounding
    assert later <= target


@given(target=TARGETS, ratio=st.floats(min_value=0.01, max_value=1.0), total=TOTALS, part=st.floats(0.0, 1.0))
def test_halves_of_the_warm_up_mirror_each_other(target: float, ratio: float, total: int, part: float) -> None:
    margin = CosineMargin(total, target, ratio)
    end = ratio * total
    assert margin(part * end) + margin((1 - part) * end) == pytest.approx(target, abs=1e-12 * target)


@given(target=TARGETS, ratio=RATIOS, total=TOTALS, beyond=st.integers(min_value=1, max_value=100_000))
def test_beyond_the_last_step_the_target_is_exact(target: float, ratio: float, total: int, beyond: int) -> None:
    assert CosineMargin(total, target, ratio)(total + beyond) == target


@pytest.mark.parametrize("total_steps", [0, -1, -0.5, math.nan, math.inf, -math.inf])
def test_total_steps_must_be_positive_and_finite(total_steps: float) -> None:
    with pytest.raises(ValueError, match=r"total_steps.*got"):
        CosineMargin(target=0.5, warmup_ratio=0.1, total_steps=total_steps)


@pytest.mark.parametrize("warmup_ratio", [-0.1, 1.1, 30, math.nan, math.inf])
def test_warmup_ratio_must_be_a_fraction(warmup_ratio: float) -> None:
    with pytest.raises(ValueError, match=r"warmup_ratio.*got"):
        CosineMargin(target=0.5, warmup_ratio=warmup_ratio, total_steps=100)


@pytest.mark.parametrize("target", [math.nan, math.inf, -math.inf])
def test_target_must_be_finite(target: float) -> None:
    with pytest.raises(ValueError, match=r"target.*got"):
        CosineMargin(target=target, warmup_ratio=0.1, total_steps=100)


@pytest.mark.parametrize("warmup_ratio", [0.0, 0.1])  # without a warm-up the formula is not evaluated, the check is
@pytest.mark.parametrize("step", [-1, -1e-9, math.nan, math.inf])
def test_step_must_be_non_negative_and_finite(step: float, warmup_ratio: float) -> None:
    with pytest.raises(ValueError, match=r"step.*got"):
        CosineMargin(target=0.5, warmup_ratio=warmup_ratio, total_steps=100)(step)


@pytest.mark.parametrize("bad", ["1", None, True, [1.0], 1j])
@pytest.mark.parametrize("name", ["target", "warmup_ratio", "total_steps"])
def test_what_is_no_number_is_named(name: str, bad: object) -> None:
    with pytest.raises(TypeError, match=f"{name}: expected a number, got {type(bad).__name__}"):
        CosineMargin(**{"target": 0.5, "warmup_ratio": 0.1, "total_steps": 100, name: bad})
    with pytest.raises(TypeError, match=f"step: expected a number, got {type(bad).__name__}"):
        CosineMargin(100, 0.5, 0.1)(bad)  # type: ignore[arg-type]


def test_integers_beyond_floats_are_not_finite() -> None:
    for huge in (10**400, -(10**400)):
        with pytest.raises(ValueError, match="target: expected a finite margin"):
            CosineMargin(100, huge, 0.1)
        with pytest.raises(ValueError, match="step: expected a non-negative finite number"):
            CosineMargin(100, 0.5, 0.1)(huge)


def test_numbers_of_numpy_cost_no_digits() -> None:
    schedule = CosineMargin(np.int64(10), np.float32(0.7), np.float64(0.5))
    assert schedule(np.float32(3)) == CosineMargin(10, float(np.float32(0.7)), 0.5)(3)


def test_is_a_value() -> None:
    margin = CosineMargin(target=0.5, warmup_ratio=0.1, total_steps=100)
    assert margin == CosineMargin(100, 0.5, 0.1)
    assert hash(margin) == hash(CosineMargin(100, 0.5, 0.1))
    assert pickle.loads(pickle.dumps(margin)) == margin
    with pytest.raises(AttributeError):
        margin.target = 1.0  # type: ignore[misc]


def test_works_with_functools() -> None:
    calls = functools.lru_cache(CosineMargin(target=0.5, warmup_ratio=0.1, total_steps=100))
    assert calls(5) == calls(5) == pytest.approx(0.25)
    assert calls.cache_info().hits == 1
    assert functools.partial(CosineMargin, target=0.5, warmup_ratio=0.1)(100)(10) == 0.5
