"""Coefficients per token: any policy-gradient loss on the kernels equals autograd through eager log-probabilities."""

from __future__ import annotations

import functools

import pytest
import torch
from objectives import OBJECTIVES, Objective
from objectives import coefficients as coefficients_of
from torch import Tensor

from conspo_kernels import linear_weighted_logprob_loss, token_logprobs, weighted_logprob_loss

ROLLOUTS, LENGTH, VOCAB, HIDDEN, GROUP = 6, 5, 23, 4, 3
LENGTHS = (5, 3, 1, 4, 5, 2)
REWARDS = (1.0, 0.0, 0.0, 1.0, 1.0, 0.0)


class Batch:
    """Hidden states and a head, labels with prompts and padding, old log-probabilities that the clip acts on."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(0)

        def draw(*size: int) -> Tensor:
            return torch.randn(*size, generator=generator, dtype=torch.float64)

        self.hidden = draw(ROLLOUTS, LENGTH, HIDDEN).to(device, dtype).requires_grad_()
        self.weight = draw(VOCAB, HIDDEN).to(device, dtype).requires_grad_()
        self.labels = torch.randint(VOCAB, (ROLLOUTS, LENGTH), generator=generator).to(device)
        self.mask = (torch.arange(LENGTH) < torch.tensor(LENGTHS)[:, None]).to(device)
        self.noise = 0.3 * draw(ROLLOUTS, LENGTH).to(device, dtype)
        self.rewards = torch.tensor(REWARDS, device=device, dtype=dtype)

    def eager(self, loss: Objective) -> tuple[Tensor, Tensor, list[Tensor]]:
        """The gradients of the loss by autograd, and its coefficients."""
        logits = self.hidden @ self.weight.T
        logits.retain_grad()
        logp = logits.log_softmax(-1).gather(-1, self.labels[..., None])[..., 0]
        logp.retain_grad()
        old = logp.detach() + self.noise
        for x in (self.hidden, self.weight):
            x.grad = None
        loss(logp, old, self.mask.to(logp.dtype), self.rewards, GROUP).backward()
        grads = [x.grad for x in (logits, self.hidden, self.weight)]
        return logp.detach(), logp.grad, grads  # type: ignore[return-value]


def relative(actual: Tensor, exact: Tensor) -> float:
    return ((actual - exact).abs().max() / exact.abs().max()).item()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_losses_of_logprobs(
    name: str, packed: bool, dtype: torch.dtype, implementation: str, device: torch.device
) -> None:
    batch, loss = Batch(dtype, device), OBJECTIVES[name]
    if name == "dr_grpo":
        loss = functools.partial(loss, max_length=LENGTH)
    logp, _, exact = batch.eager(loss)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6

    def laid_out(x: Tensor) -> Tensor:
        return x[batch.mask] if packed else x

    labels, mask = laid_out(batch.labels), None if packed else batch.mask
    with torch.no_grad():
        first = token_logprobs(
            laid_out(batch.hidden @ batch.weight.T), labels, response_mask=mask, implementation=implementation
        )
    whole = torch.zeros_like(logp, dtype=first.dtype)
    whole[batch.mask] = first if packed else first[batch.mask]
    rest = (logp + batch.noise, batch.mask.to(logp.dtype), batch.rewards, GROUP)
    coefficients = laid_out(coefficients_of(loss, whole, *rest)[1])

    for inplace in (False, True):
        logits = laid_out(batch.hidden @ batch.weight.T)
        value = weighted_logprob_loss(
            logits * 1, labels, coefficients, response_mask=mask, inplace=inplace, implementation=implementation
        )
        (grad,) = torch.autograd.grad(value, logits)
        assert relative(grad, laid_out(exact[0])) <= tolerance
        # Positive and negative terms cancel: an error is judged by their size, not by what is left of them.
        terms = coefficients * first
        assert (value.detach() - terms.sum()).abs() <= tolerance * terms.abs().sum()
    for workspace_mib in (512, 2.0**-12):
        value = linear_weighted_logprob_loss(
            laid_out(batch.hidden), batch.weight, labels, coefficients, response_mask=mask,
            workspace_mib=workspace_mib, implementation=implementation,
        )  # fmt: skip
        for grad, truth in zip(torch.autograd.grad(value, (batch.hidden, batch.weight)), exact[1:], strict=True):
            assert relative(grad, truth) <= tolerance


def test_shift_aligns_coefficients_with_logprobs(implementation: str, device: torch.device) -> None:
    """Coefficients stand where `token_logprobs` has its results; packed, a sequence's last token has none."""
    torch.manual_seed(1)
    logits = torch.randn(7, VOCAB, dtype=torch.float64, device=device, requires_grad=True)
    ids, offsets = torch.randint(VOCAB, (7,), device=device), torch.tensor([0, 3, 7])
    options = {"cu_seqlens": offsets, "shift": True, "temperature": 0.7, "softcap": 3.0}
    logp = token_logprobs(logits, ids, implementation=implementation, **options)
    coefficients = torch.randn(7, dtype=torch.float64, device=device)
    (expected,) = torch.autograd.grad((coefficients * logp).sum(), logits)
    value = weighted_logprob_loss(logits, ids, coefficients, implementation=implementation, **options)
    (grad,) = torch.autograd.grad(value, logits)
    torch.testing.assert_close(grad, expected, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(value, (coefficients * logp).sum(), rtol=1e-12, atol=1e-14)


def test_coefficients_of_ignored_tokens_are_not_looked_at(implementation: str, device: torch.device) -> None:
    logits = torch.randn(2, 3, VOCAB, device=device, requires_grad=True)
    labels = torch.tensor([[1, -100, 2], [-100, 3, 4]], device=device)
    coefficients = torch.tensor([[1.0, torch.nan, 0.0], [torch.inf, 2.0, -1.0]], device=device)
    value = weighted_logprob_loss(logits, labels, coefficients, implementation=implementation)
    (grad,) = torch.autograd.grad(value, logits)
    assert value.isfinite()
    assert grad.isfinite().all()
    assert not grad[labels == -100].any()
    assert not grad[0, 2].any()


def test_a_second_backward_raises(implementation: str, device: torch.device) -> None:
    logits = torch.randn(2, 3, VOCAB, device=device, requires_grad=True)
    labels = torch.zeros(2, 3, dtype=torch.long, device=device)
    value = weighted_logprob_loss(logits, labels, torch.ones(2, 3), implementation=implementation)
    (value * 2).backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"modified by an inplace operation|second backward"):
        value.backward()


def test_without_a_gradient_there_is_none(implementation: str, device: torch.device) -> None:
    logits, labels = torch.randn(2, 3, VOCAB, device=device), torch.zeros(2, 3, dtype=torch.long, device=device)
    value = weighted_logprob_loss(logits, labels, torch.ones(2, 3), inplace=True, implementation=implementation)
    torch.testing.assert_close(value, logits.log_softmax(-1)[..., 0].sum())
    assert not value.requires_grad
