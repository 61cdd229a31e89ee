"""Which tokens' coefficients a trust region stops: against a loop, a clipped surrogate's gradient, and the identity."""

from __future__ import annotations

import math

import pytest
import torch
from objectives import coefficients as coefficients_of
from objectives import dapo
from torch import Tensor

from conspo_kernels import trust_region

EPSILON = 0.2


def batch(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Coefficients of either sign and none, and log-probabilities that have moved by up to a nat."""
    generator = torch.Generator().manual_seed(0)
    coefficients = torch.randn(8, 50, generator=generator, dtype=dtype)
    coefficients[:, ::7] = 0.0
    old = -torch.rand(8, 50, generator=generator, dtype=dtype)
    return coefficients, old + 0.4 * torch.randn(8, 50, generator=generator, dtype=dtype), old


def stopped_by(c: float, now: float, old: float) -> bool:
    """A falling loss raises what has a negative coefficient."""
    ratio = math.exp(now - old)
    if c < 0:
        return ratio > 1 + EPSILON
    return c > 0 and ratio < 1 - EPSILON


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_against_a_loop(dtype: torch.dtype) -> None:
    coefficients, now, old = batch(dtype)
    result = trust_region(coefficients, now, old, EPSILON)
    expected = [
        0.0 if stopped_by(*token) else token[0]
        for token in zip(*(x.flatten().tolist() for x in (coefficients, now, old)), strict=True)
    ]
    assert result.dtype == dtype
    assert result.flatten().tolist() == expected
    assert 0 < (result != coefficients).sum() < coefficients.numel() / 2


def test_the_tokens_are_those_whose_clipped_surrogate_has_no_gradient() -> None:
    _, now, old = batch()
    mask, rewards = torch.ones_like(now), torch.tensor([1.0, 0, 0, 1, 0, 0, 0, 1], dtype=now.dtype)
    _, free = coefficients_of(dapo, now, old, mask, rewards, 4, clip_low=10.0, clip_high=1e6)
    _, clipped = coefficients_of(dapo, now, old, mask, rewards, 4, clip_low=EPSILON, clip_high=EPSILON)
    assert (clipped == 0).any()
    torch.testing.assert_close(trust_region(free, now, old, EPSILON), clipped, rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_the_same_bits_where_nothing_has_moved_and_without_a_trust_region(dtype: torch.dtype) -> None:
    coefficients, now, old = batch(dtype)
    for logprobs, epsilon in ((old, EPSILON), (old, 1e-6), (now, None)):
        result = trust_region(coefficients, logprobs, old, epsilon)
        assert result.view(torch.uint8).equal(coefficients.view(torch.uint8))


def test_it_takes_no_part_in_a_graph() -> None:
    coefficients, now, old = batch()
    assert not trust_region(coefficients, now.requires_grad_(), old, EPSILON).requires_grad


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"coefficients": [1.0]}, TypeError, "coefficients must be a torch.Tensor, got list"),
        ({"coefficients": torch.zeros(8, 50).requires_grad_()}, ValueError, "pass coefficients.detach"),
        ({"logprobs": torch.zeros(8, 49)}, ValueError, r"logprobs must have shape \[8, 50\] .* got \[8, 49\]"),
        ({"old_logprobs": torch.zeros(8, 50).long()}, ValueError, "old_logprobs must be floating point, got torch.int"),
        ({"epsilon": 0.0}, ValueError, "epsilon must be"),
        ({"epsilon": math.nan}, ValueError, "epsilon must be"),
        ({"epsilon": "0.2"}, TypeError, "epsilon must be a number, got str"),
    ],
)
def test_errors_name_the_argument(arguments: dict[str, object], error: type[Exception], text: str) -> None:
    good = dict(zip(("coefficients", "logprobs", "old_logprobs"), batch(), strict=True), epsilon=EPSILON)
    with pytest.raises(error, match=text):
        trust_region(**{**good, **arguments})  # type: ignore[arg-type]
