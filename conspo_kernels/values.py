"""Values that layers pass on: labels and their sentinels, the logit transform, the statistics of tokens."""

from __future__ import annotations

from numbers import Integral, Real
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

# Behind `inputs` a label is an entry of the vocabulary or IGNORED: no response token, no result, no gradient. Any other
# number is a label outside of the logits that a kernel sees: in another tile, on another rank, or nowhere. Then the
# statistics of the row are computed, its log-probability is NaN, and its gradient lacks the label's own term.
IGNORED = -1
ELSEWHERE = -2


# logit_scale / temperature / tau, like every other product of three numbers between these, is at most 1e27. That fits
# fp32, also times a logit of 1e10: no kernel meets an infinite or a zero factor. No dtype rounds a power of two.
SMALLEST, LARGEST = 2.0**-30, 2.0**30


def number(name: str, value: Any) -> Any:
    """A number of Python's or NumPy's, as Python's."""
    value = python_number(value)
    if isinstance(value, bool) or not isinstance(value, (int, float, torch.SymInt, torch.SymFloat)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    return value


def integer(name: str, value: Any) -> Any:
    """The same, of 64 bits."""
    value = value if type(value) is int else python_number(value)
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"{name} must fit 64 bits, got {value}")
    return value


def factor(name: str, value: Any) -> Any:
    """A number that is multiplied and divided by."""
    value = value if type(value) is float else number(name, value)
    if not SMALLEST <= value <= LARGEST:
        raise ValueError(f"{name} must be positive and finite, from 2**-30 to 2**30, got {value}")
    return value


def check_margin(value: float) -> None:
    if not -LARGEST <= value <= LARGEST:
        raise ValueError(f"margin must be finite, from -2**30 to 2**30, got {value}")


def python_number(value: Any) -> Any:
    """A scalar of NumPy, an integer or a floating-point number, as Python's, which ops take; anything else as it is."""
    if type(value) in (int, float) or not isinstance(value, Real) or not hasattr(value, "item"):
        return value
    return int(value) if isinstance(value, Integral) else float(value)


def accumulated(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which numbers of a dtype are summed."""
    return torch.float64 if dtype == torch.float64 else torch.float32


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
        """As the schema of an op takes it: `LogitTransform(*numbers)` is the transform again."""
        return [self.temperature, self.logit_scale, *(() if self.softcap is None else (self.softcap,))]


def local_labels(labels: Tensor, start: int, size: int) -> Tensor:
    """Labels relative to `size` entries of the vocabulary from `start` on: ELSEWHERE if not among them."""
    inside = (labels >= start) & (labels < start + size)
    return torch.where(inside, labels - start, torch.where(labels == IGNORED, IGNORED, ELSEWHERE))


def response_counts(labels: Tensor, offsets: Tensor | None) -> Tensor:
    """[S] int32 tokens of each rollout whose label is not `IGNORED`.  offsets: of packed labels [1, N], or None."""
    active = labels != IGNORED
    if offsets is None:
        return active.sum(1, dtype=torch.int32)
    total = torch.nn.functional.pad(active.flatten().cumsum(0), (1, 0))
    before = total[offsets.long().clamp(0, labels.numel())]  # on an accelerator offsets are not checked
    return (before[1:] - before[:-1]).clamp(min=0).int()


class LogitRows(NamedTuple):
    """Rows of logits [B, T, V], last stride 1, fp16, bf16, fp32 or fp64, with their labels and transform.

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
        return local_labels(self.labels, self.start, self.logits.shape[-1])


class Incoming(NamedTuple):
    """The inputs of a backward per token, [B, T], contiguous: statistics of forward, and incoming gradients.

    grad_logprobs: of log-probabilities.  entropy: of forward, with grad_entropy, that of entropies.
    """

    row_max: Tensor
    log_sum: Tensor
    grad_logprobs: Tensor
    entropy: Tensor | None = None
    grad_entropy: Tensor | None = None


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
        row_max = torch.empty(shape, dtype=dtype, device=device)
        logprobs, log_sum = torch.empty_like(row_max), torch.empty_like(row_max)
        return cls(logprobs, torch.empty_like(row_max) if with_entropy else None, row_max, log_sum)

    def incoming(self, grad_logprobs: Tensor, grad_entropy: Tensor | None = None) -> Incoming:
        """For the backward of these rows."""
        entropy = None if grad_entropy is None else self.entropy
        return Incoming(self.row_max, self.log_sum, grad_logprobs, entropy, grad_entropy)

    def copied_to(self, out: Statistics) -> Statistics:
        for mine, other in zip(self, out, strict=True):
            if mine is not None and other is not None:
                other.copy_(mine)
        return out


PerToken = TypeVar("PerToken", Incoming, Statistics)  # tensors per token, some of them None


class Tokens(NamedTuple):
    """Which tokens count, padded or packed; packed ones are one row.

    labels: [B, T] int64, an index or `IGNORED`.  offsets: [S + 1] integers on the labels' device, or None: the rows are
    the rollouts.  cpu_offsets: the same on the CPU, where they are known there.  shape: of the user's labels.
    mask: [B, T] bool on the CPU, the tokens whose log-probabilities are needed; None: the CPU does not know them.

    counts, num_dropped: response tokens [S] of all rollouts, and how many rollouts were dropped (0-d), after
    `tokens_with_gradient`; None: not counted.
    """

    labels: Tensor
    offsets: Tensor | None
    cpu_offsets: Tensor | None
    shape: torch.Size
    mask: Tensor | None = None
    counts: Tensor | None = None
    num_dropped: Tensor | None = None

    @property
    def num_rollouts(self) -> int:
        return self.labels.shape[0] if self.offsets is None else self.offsets.shape[0] - 1

    @property
    def active(self) -> Tensor:
        """[B, T] bool: response tokens."""
        return self.labels != IGNORED

    def only(self, mask: Tensor) -> Tokens:
        """The same, with response tokens only where `mask` [B, T] is True."""
        return self._replace(labels=torch.where(mask, self.labels, IGNORED))

    def per_token(self, values: Tensor) -> Tensor | None:
        """Values of rollouts [S] at their tokens, [B, T]; zero at those of no rollout.

        On the device of the values, which is the labels' or the CPU; None where the offsets are not known there.
        """
        offsets = self.offsets if values.device == self.labels.device else self.cpu_offsets
        if self.offsets is None:
            return values[:, None].expand(self.labels.shape)
        if offsets is None:
            return None
        position = torch.arange(self.labels.shape[1], dtype=offsets.dtype, device=offsets.device)
        rollout = torch.searchsorted(offsets[1:].contiguous(), position, right=True)
        return torch.cat([values, values.new_zeros(1)])[rollout][None]

    def response_counts(self) -> Tensor:
        """[S] int32 response tokens; those of this rank where rollouts are spread over several."""
        return response_counts(self.labels, self.offsets)
