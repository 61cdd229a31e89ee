"""A frozen head whose vocabulary is split over ranks: two GEMMs, and the numbers of the whole head."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import ranks
import torch
import torch.distributed as dist
from tolerance import assert_accurate, max_error, value_floor
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import conspo_kernels as ck
from conspo_kernels.gradcheck.tolerance import RELATIVE_FP64
from conspo_kernels.linear import gemm
from conspo_kernels.linear.modes import complete_frozen
from conspo_kernels.values import ELSEWHERE, LogitTransform, Statistics

TOKENS, HIDDEN, VOCAB, CUT = 40, 16, 300, 190
TRANSFORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "softcap": {"softcap": 8.0},
    "softcap and temperature": {"softcap": 5.0, "temperature": 0.7, "logit_scale": 1.3},
}
CASES = [
    (dtype, name, mib, implementation)
    for dtype in (torch.float64, torch.float32, torch.bfloat16)
    for name in TRANSFORMS
    for mib, implementation in ((512.0, "native"), (2.0**-8, "native"), (512.0, "torch"))
]

MASKED = [(name, masked) for name in ("plain", "softcap") for masked in ((CUT - 50, CUT), (CUT, VOCAB))]


def batch(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """hidden, weight, bias, labels, coefficients. Of every second token the label is nearly certain."""
    generator = torch.Generator().manual_seed(5)
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator).to(dtype)
    weight, bias = torch.randn(VOCAB, HIDDEN, generator=generator).to(dtype), torch.zeros(VOCAB, dtype=dtype)
    labels = torch.randint(VOCAB, (TOKENS,), generator=generator)
    hidden[::2] = (weight[labels[::2]].float()).to(dtype)
    labels[5::7] = -100
    return hidden, weight, bias, labels, torch.randn(TOKENS, generator=generator)


def masked_labels(name: str, masked: tuple[int, int], part: slice, shard: ck.Parallel | None) -> tuple[Tensor, Tensor]:
    """Log-probabilities and gradient of a part, in fp64, where a bias of -inf masks some entries, labels among them."""
    hidden, weight, bias, labels, coefficients = batch(torch.float64)
    bias[slice(*masked)] = -torch.inf
    hidden.requires_grad_()
    logprobs = ck.linear_token_logprobs(
        hidden, weight[part], labels, bias=bias[part], parallel=shard, **TRANSFORMS[name]
    )
    assert isinstance(logprobs, Tensor)
    logprobs.backward(coefficients.double())
    assert hidden.grad is not None
    return logprobs.detach(), hidden.grad


def parts(rank: int, size: int) -> dict[Any, Any]:
    """Log-probabilities and gradient of every case; in the first one what it multiplied, too."""
    del size
    results: dict[Any, Any] = {}
    part = slice(0, CUT) if rank == 0 else slice(CUT, VOCAB)
    shard = ck.Parallel(vocab=dist.group.WORLD, vocab_start=part.start)
    products: list[int] = []
    product = gemm.gemm

    def counted(a: Tensor, b: Tensor, out: Tensor, bias: Tensor | None = None) -> Tensor:
        products.append(2 * a.shape[0] * a.shape[1] * b.shape[1])
        return product(a, b, out, bias)

    for name, masked in MASKED:
        results[name, masked] = masked_labels(name, masked, part, shard)
    gemm.gemm = counted
    for dtype, name, mib, implementation in CASES:
        hidden, weight, bias, labels, coefficients = batch(dtype)
        hidden.requires_grad_()
        del products[:]
        with FlopCounterMode(display=False) as counter:
            logprobs = ck.linear_token_logprobs(
                hidden, weight[part], labels, bias=bias[part], parallel=shard, workspace_mib=mib,
                implementation=implementation, **TRANSFORMS[name],
            )  # fmt: skip
            assert isinstance(logprobs, Tensor)
            (logprobs * coefficients.to(logprobs.dtype)).sum().backward()
        operations = (counter.get_total_flops(), sum(products), len(products), weight[part].shape[0])
        results[dtype, name, mib, implementation] = (logprobs.detach(), hidden.grad, *operations)
    return results


@functools.cache
def on_two_ranks() -> list[Any]:
    return ranks.run(2, parts)


def eager(dtype: torch.dtype, compute: torch.dtype, name: str) -> tuple[Tensor, Tensor]:
    """The whole head in eager PyTorch, of operands in `dtype`."""
    hidden, weight, _bias, labels, coefficients = batch(dtype)
    hidden, weight = hidden.to(compute).requires_grad_(), weight.to(compute)
    options = {"softcap": None, "temperature": 1.0, "logit_scale": 1.0} | TRANSFORMS[name]
    z = hidden @ weight.T * options["logit_scale"]
    if options["softcap"] is not None:
        z = options["softcap"] * torch.tanh(z / options["softcap"])
    active = labels != -100
    logprobs = (z / options["temperature"]).log_softmax(-1).gather(-1, labels.clamp(min=0)[:, None])[:, 0]
    logprobs = torch.where(active, logprobs, 0.0)
    (logprobs * coefficients.to(logprobs.dtype)).sum().backward()
    assert hidden.grad is not None
    return logprobs.detach(), hidden.grad


@pytest.mark.parametrize(("dtype", "name", "mib", "implementation"), CASES, ids=str)
def test_parts_of_a_frozen_head(dtype: torch.dtype, name: str, mib: float, implementation: str) -> None:
    exact, exact_grad = eager(dtype, torch.float64, name)
    rounded, rounded_grad = eager(dtype, dtype, name)
    for results in on_two_ranks():
        logprobs, grad, counted, made, number, size = results[dtype, name, mib, implementation]
        if dtype == torch.float64:
            assert max_error(logprobs, exact) <= RELATIVE_FP64 * exact.abs().max()
            assert max_error(grad, exact_grad) <= RELATIVE_FP64 * exact_grad.abs().max()
        else:
            assert_accurate(logprobs, rounded, exact, value_floor(exact, logprobs.dtype), "log-probabilities")
            floor = torch.finfo(dtype).eps * exact_grad.abs().max().item()
            assert_accurate(grad, rounded_grad, exact_grad, floor, "gradient")
        active = int((batch(dtype)[3] != -100).sum())
        assert counted == made == 2 * 2 * active * HIDDEN * size
        assert number == 2 if mib > 1 else number > 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_certain_tokens_keep_their_digits(dtype: torch.dtype) -> None:
    """Where the label has nearly all of the probability, its term and that of the whole vocabulary nearly cancel: no
    worse than on one rank, but for roundings of sums that are one and a little.
    """
    exact, exact_grad = eager(dtype, torch.float64, "plain")
    certain = (exact > -1e-2) & (exact < 0)
    assert certain.sum() > 5
    hidden, weight, _bias, labels, coefficients = batch(dtype)
    hidden.requires_grad_()
    logprobs = ck.linear_token_logprobs(hidden, weight, labels)
    assert isinstance(logprobs, Tensor)
    (logprobs * coefficients).sum().backward()
    assert hidden.grad is not None
    whole = max_error(hidden.grad[certain], exact_grad[certain])
    rounding = 4 * torch.finfo(torch.float32).eps * weight.abs().max().item()
    for results in on_two_ranks():
        grad = results[dtype, "plain", 512.0, "native"][1]
        assert max_error(grad[certain], exact_grad[certain]) <= 2 * whole + rounding


@pytest.mark.parametrize(("name", "masked"), MASKED, ids=str)
def test_masked_labels_as_on_one_rank(name: str, masked: tuple[int, int]) -> None:
    """Entries of a part, or all of it, are -inf: a label there is impossible, and spoils no gradient."""
    exact, exact_grad = masked_labels(name, masked, slice(0, VOCAB), None)
    assert (exact == -torch.inf).sum() > 2
    assert exact_grad.isfinite().all()
    for results in on_two_ranks():
        logprobs, grad = results[name, masked]
        torch.testing.assert_close(logprobs, exact, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(grad, exact_grad, rtol=1e-12, atol=1e-12)


def test_a_part_without_a_share() -> None:
    """All of its logits are -inf: its own gradient is NaN, and it adds nothing. The other part is the whole."""
    infinity, zero = torch.tensor([-torch.inf, 2.0]), torch.zeros(2)
    part = Statistics(torch.tensor([torch.nan, -0.5]), None, infinity, torch.tensor([-torch.inf, 0.5]))
    whole = Statistics(zero, None, torch.tensor([3.0, 2.0]), torch.tensor([0.1, 0.5]))
    gradient = torch.tensor([[torch.nan], [4.0]])
    labels = torch.tensor([ELSEWHERE, 0])
    complete_frozen(gradient, part, whole, labels, torch.ones(3, 1), LogitTransform())
    assert gradient.tolist() == [[0.0], [4.0]]
