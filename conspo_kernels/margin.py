"""The curriculum of the margin: positives must first score above negatives at all, then by more and more."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real
from typing import Any


@dataclass(frozen=True, slots=True)
class CosineMargin:
    """The margin at a training step: raised from 0 to its target along half a cosine, then held.

        m_t = (M/2) * (1 - cos(pi * min((t/T)/alpha, 1)))        # alpha = 0: m_t = M; t > T: m_t = M

    Half-way through the warm-up the margin is M/2. A value of this class is immutable, hashable and picklable.

    Args:
        total_steps: T, the length of training in steps (optimizer steps, usually), positive and finite.
        target: M, the final margin in nats per token (the unit of a score), finite; the paper's is 0.01. A negative one
            is allowed: it lowers the bar for the positives.
        warmup_ratio: alpha, the fraction of training over which the margin rises, in [0, 1]; the paper's is 0.3. 0: no
            warm-up.

    Returns:
        A schedule: call it with the step t, get m_t as a float.

    Raises:
        TypeError: an argument is not a number.
        ValueError: an argument is out of its range; the message names it.

    Source: arXiv:2605.12969, sections 4.3 (the curriculum) and 5.1 (the defaults).

    >>> CosineMargin(total_steps=100)(30)
    0.01
    """

    total_steps: float
    target: float = 0.01
    warmup_ratio: float = 0.3

    def __post_init__(self) -> None:
        # Comparisons with NaN are false, so each test is written to pass only what is right.
        if not math.isfinite(_number("target", self.target)):
            raise ValueError(f"target: expected a finite margin, got {self.target!r}")
        if not 0 <= _number("warmup_ratio", self.warmup_ratio) <= 1:
            raise ValueError(f"warmup_ratio: expected a fraction in [0, 1], got {self.warmup_ratio!r}")
        if not 0 < _number("total_steps", self.total_steps) < math.inf:
            raise ValueError(f"total_steps: expected a positive finite number of steps, got {self.total_steps!r}")

    def __call__(self, step: float) -> float:
        """The margin at one step, by the class's equation.

        Args:
            step: t, counted from 0 in the unit of total_steps, non-negative and finite; past total_steps the margin
                stays at its target.

        Returns:
            m_t in nats per token, between 0 and target.

        Raises:
            TypeError: step is not a number.
            ValueError: step is negative, infinite or NaN.
        """
        t = _number("step", step)
        if not 0 <= t < math.inf:
            raise ValueError(f"step: expected a non-negative finite number, got {step!r}")
        if self.warmup_ratio == 0:
            return float(self.target)
        # warmup_ratio <= 1, so a step past total_steps is past the warm-up, and the min covers it.
        progress = min(t / float(self.total_steps) / float(self.warmup_ratio), 1.0)
        return float(self.target) / 2 * (1 - math.cos(math.pi * progress))


def _number(name: str, value: Any) -> float:
    """A number of Python or NumPy as a float; an integer beyond the range of a float is infinite."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf  # type: ignore[operator]
