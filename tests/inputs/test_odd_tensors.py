"""Tensors and settings of torch that are rare: what they change is computed, or it raises."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tolerance import max_error
from torch import Tensor

from conspo_kernels import (
    conspo_loss,
    conspo_loss_from_scores,
    linear_conspo_loss,
    linear_token_logprobs,
    linear_weighted_score_loss,
    sequence_scores,
    token_logprobs,
    weighted_logprob_loss,
    weighted_score_loss,
)

LABELS = torch.arange(12).view(4, 3) % 5
REWARDS = torch.tensor([1.0, 0, 0, 1])
WEIGHTS = torch.tensor([1.0, -2, 0, 0.5])


def negated(x: Tensor) -> Tensor:
    """x as a view whose elements are minus what memory holds, as `.conj().imag` is one."""
    return torch._neg_view(-x)


# Of a tensor [4, 3, 5], which stands for whatever may be a view.
CALLS: dict[str, Callable[[Tensor, str, Callable[[Tensor], Tensor]], Tensor]] = {
    "logits": lambda x, i, view: token_logprobs(view(x), LABELS.to(x.device), implementation=i),
    "labels": lambda x, i, view: token_logprobs(x, view(LABELS.to(x.device)), implementation=i),
    "rewards": lambda x, i, view: conspo_loss(x, LABELS.to(x.device), view(REWARDS.to(x.device)), 2, implementation=i),
    "scores": lambda x, i, view: conspo_loss_from_scores(
        view(x[:, 0, 0].contiguous()), REWARDS.to(x.device), 2, implementation=i
    ),
    "log-probabilities": lambda x, i, view: sequence_scores(
        view(x[..., 0].contiguous()), LABELS.to(x.device), implementation=i
    ),
    "weights": lambda x, i, view: weighted_score_loss(
        x, LABELS.to(x.device), view(WEIGHTS.to(x.device)), implementation=i
    ),
    "coefficients": lambda x, i, view: weighted_logprob_loss(
        x, LABELS.to(x.device), view(x[..., 1].detach().contiguous()), implementation=i
    ),
    "hidden": lambda x, i, view: linear_token_logprobs(
        view(x), x[0].detach().T @ x[0].detach(), LABELS.to(x.device), implementation=i
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_negative_views(name: str, implementation: str, device: torch.device) -> None:
    """Values and gradients are those of the elements, also where the incoming gradient is such a view."""
    results = []
    for view in (Tensor.clone, negated):
        x = torch.linspace(-2, 1, 60, device=device).sin().view(4, 3, 5).requires_grad_()
        value = CALLS[name](x, implementation, view)
        upstream = torch.linspace(1, 2, value.numel(), device=device).view(value.shape)
        (grad,) = torch.autograd.grad(value, x, view(upstream))
        results.append((value.detach(), grad))
    for plain, of_view in zip(*results, strict=True):
        assert max_error(of_view, plain) == 0


def test_what_is_overwritten_is_no_negative_view(device: torch.device) -> None:
    x = torch.randn(4, 3, 5, device=device, requires_grad=True)
    labels = LABELS.to(device)
    with pytest.raises(ValueError, match="inplace is written to memory, got a view that negates"):
        weighted_score_loss(torch._neg_view(x * 1), labels, WEIGHTS, inplace=True)
    with pytest.raises(ValueError, match="inplace_backward is written to memory, got a view that negates"):
        token_logprobs(torch._neg_view(x * 1), labels, inplace_backward=True)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_scores_have_no_second_derivative(reduction: str, implementation: str, device: torch.device) -> None:
    """A penalty on the gradient raises: it must not be left out of the sum in silence."""
    scores = torch.randn(4, device=device, requires_grad=True)
    loss = conspo_loss_from_scores(scores, REWARDS, 2, reduction=reduction, implementation=implementation).sum()
    (grad,) = torch.autograd.grad(loss, scores, create_graph=True)
    for ask in (lambda x: x.backward(retain_graph=True), lambda x: torch.autograd.grad(x, scores)):
        with pytest.raises(NotImplementedError, match="no second derivative"):
            ask(loss + grad.square().sum())

    logprobs = torch.randn(4, 3, device=device, requires_grad=True)
    loss = sequence_scores(logprobs, LABELS.to(device), implementation=implementation).square().sum()
    (grad,) = torch.autograd.grad(loss, logprobs, create_graph=True)
    for ask in (lambda x: x.backward(retain_graph=True), lambda x: torch.autograd.grad(x, logprobs)):
        with pytest.raises(NotImplementedError, match="no second derivative"):
            ask(loss + grad.square().sum())


def test_another_default_device(implementation: str, device: torch.device) -> None:
    """Numbers go to the kernels on the CPU, whatever device new tensors are made on."""
    x, labels = torch.randn(4, 3, 5, device=device), LABELS.to(device)
    weight = torch.randn(5, 5, device=device)
    results = []
    for default in ("cpu", "meta"):
        with torch.device(default):
            results.append((
                conspo_loss(x, labels, REWARDS, 2, margin=0.2, num_groups=3, implementation=implementation),
                linear_conspo_loss(x, weight, labels, REWARDS, 2, margin=0.2, implementation=implementation),
                linear_weighted_score_loss(x, weight, labels, WEIGHTS, implementation=implementation),
            ))  # fmt: skip
    for one, other in zip(*results, strict=True):
        assert one.device == other.device == x.device
        assert max_error(other, one) == 0


def test_linear_functions_of_meta_tensors() -> None:
    """Shapes without data, on a device that has no autocast."""
    hidden, weight = torch.empty(4, 3, 6, device="meta", requires_grad=True), torch.empty(5, 6, device="meta")
    labels = LABELS.to("meta")
    assert linear_token_logprobs(hidden, weight, labels).shape == (4, 3)
    loss = linear_conspo_loss(hidden, weight, labels, REWARDS.to("meta"), 2)
    loss.backward()
    assert hidden.grad is not None
    assert hidden.grad.is_meta
