"""Values that the layers hand to one another: what a label may be, the logit transform, the statistics of tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from numbers import Integral, Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Behind `inputs` a label is an entry of the vocabulary or IGNORED: no response token, no result, no gradient. Any other
# number is a label outside of the logits that a kernel sees: in another tile, on another rank, or nowhere. Then the
# statistics of the row are computed, its log-probability is NaN, and its gradient lacks the label's own term.
IGNORED = -1
ELSEWHERE = -2


# logit_scale / temperature / tau, and what else three numbers between these can make, is at most 1e27 and so fits fp32,
# also times a logit of 1e10: no kernel meets an infinite or a zero factor.
# Powers of two, which no dtype rounds to beyond them.
SMALLEST, LARGEST = 2.0**-30, 2.0**30


def check_factor(name: str, value: float) -> None:
    """A number that is multiplied and divided by."""
    if not SMALLEST <= value <= LARGEST:
        raise ValueError(f"{name} must be positive and finite, from 2**-30 to 2**30, got {value}")


def check_margin(value: float) -> None:
    if not -LARGEST <= value <= LARGEST:
        raise ValueError(f"margin must be finite, from -2**30 to 2**30, got {value}")


def python_number(value: Any) -> Any:
    """A scalar of NumPy, an integer or a floating-point number, as Python's, which ops take; anything else as it is."""
    if type(value) in (int, float) or not isinstance(value, Real) or not hasattr(value, "item"):
        return value
    return int(value) if isinstance(value, Integral) else float(value)


class LogitTransform(NamedTuple):
    """y = f(z) / temperature, f(z) = softcap * tanh(z * logit_scale / softcap), or z * logit_scale without a softcap.

    Kernels compute y = u * scale with u = tanh(z * inner), or u = z: maxima and differences are taken of u, so that the
    constant factor costs one multiplication per exponential and no digits of a large logit.
    """

    temperature: float = 1.0
    logit_scale: float = 1.0
    softcap: float | None = None

    @property
    def inner(self) -> float:
        return 1.0 if self.softcap is None else self.logit_scale / self.softcap

    @property
    def scale(self) -> float:
        return (self.logit_scale if self.softcap is None else self.softcap) / self.temperature

    def tanh(self, dtype: torch.dtype) -> str | None:
        """Which tanh of Triton's `softmax.py` the compiled kernels need for logits of a dtype.

        "short" is wrong by up to 1.5e-7, which `scale` multiplies: up to 64 that stays below 1e-5. fp32 logits, twice
        the bytes, leave time for "series".
        """
        if self.softcap is None:
            return None
        return "short" if dtype.itemsize == 2 and self.scale <= 64 else "series"

    def to_numbers(self) -> list[float]:
        """As the schema of an op takes it."""
        return [self.temperature, self.logit_scale, *(() if self.softcap is None else (self.softcap,))]

    @classmethod
    def from_numbers(cls, numbers: Sequence[float]) -> LogitTransform:
        return cls(*numbers)


class LogitRows(NamedTuple):
    """logits [B, T, V], last stride 1, fp16, bf16, fp32 or fp64, and what belongs to their rows.

    labels: [B, T] int64, contiguous.  start: the label that the first column is, where they are a slice of the columns.
    """

    logits: Tensor
    labels: Tensor
    transform: LogitTransform
    start: int = 0

    def labels_in_slice(self) -> Tensor:
        """Labels relative to the first column, ELSEWHERE if not among these columns."""
        if self.start == 0:  # a label beyond the last column is elsewhere as it is
            return self.labels
        inside = (self.labels >= self.start) & (self.labels < self.start + self.logits.shape[-1])
        return torch.where(inside, self.labels - self.start, torch.where(self.labels == IGNORED, IGNORED, ELSEWHERE))


class Upstream(NamedTuple):
    """The gradients that come into backward, [B, T], contiguous: of log-probabilities and of entropies."""

    logprobs: Tensor
    entropy: Tensor | None = None


class Statistics(NamedTuple):
    """Of rows of logits: log-probability of the label, entropy or None, max u, log of the sum of exp(y - max y).

    The last two are kept apart: their sum would lose the digits of log-probabilities at |z| = 1e4.
    """

    logprobs: Tensor
    entropy: Tensor | None
    row_max: Tensor
    log_sum: Tensor

    @classmethod
    def empty(cls, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, with_entropy: bool) -> Statistics:
        logprobs, row_max, log_sum = (torch.empty(shape, dtype=dtype, device=device) for _ in range(3))
        return cls(logprobs, torch.empty_like(logprobs) if with_entropy else None, row_max, log_sum)

    def map(self, function: Callable[[Tensor], Tensor]) -> Statistics:
        return Statistics(*(None if x is None else function(x) for x in self))  # type: ignore[arg-type]

    def copied_to(self, out: Statistics) -> Statistics:
        for mine, other in zip(self, out, strict=True):
            if mine is not None and other is not None:
                other.copy_(mine)
        return out
