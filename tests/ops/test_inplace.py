"""inplace_backward: whoever would get a wrong gradient gets an error instead."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from conspo_kernels import conspo_loss, token_logprobs
from conspo_kernels.backends import eager

LABELS = torch.tensor([[1, 2], [3, 4]])
REWARDS = torch.tensor([1.0, 0.0])
MODIFIED = "modified by an inplace operation"


@pytest.fixture
def leaf(device: torch.device) -> Tensor:
    return torch.randn(2, 2, 9, device=device, requires_grad=True)


def loss_of(logits: Tensor, implementation: str, **kwargs: object) -> Tensor:
    labels = LABELS.to(logits.device)
    return conspo_loss(logits, labels, REWARDS, 2, inplace_backward=True, implementation=implementation, **kwargs)


def test_a_leaf_raises(leaf: Tensor, implementation: str) -> None:
    with pytest.raises(ValueError, match="inplace_backward would overwrite logits, a leaf tensor of yours"):
        loss_of(leaf, implementation)


def test_a_view_of_a_leaf_raises(implementation: str, device: torch.device) -> None:
    leaf = torch.randn(2, 3, 9, device=device, requires_grad=True)
    for view in (leaf[:, :-1], leaf[:, 1:], leaf.view(6, 9)[:4].view(2, 2, 9)):
        with pytest.raises(ValueError, match="inplace_backward would overwrite logits, a view of a leaf tensor"):
            loss_of(view, implementation)


def test_a_leaf_without_gradient_is_left_alone(leaf: Tensor, implementation: str) -> None:
    before = leaf.detach().clone()
    loss_of(leaf.detach(), implementation)
    assert torch.equal(leaf, before)


def test_overlapping_rows_raise(implementation: str, device: torch.device) -> None:
    row = torch.randn(2, 1, 9, device=device, requires_grad=True) * 1
    with pytest.raises(ValueError, match="inplace_backward needs logits whose rows do not overlap"):
        loss_of(row.expand(2, 2, 9), implementation)


def test_another_saved_use_of_the_logits_raises(leaf: Tensor, implementation: str) -> None:
    logits = leaf * 1
    other = (logits * logits).sum()
    loss_of(logits, implementation).backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=MODIFIED):
        other.backward()


def test_a_producer_that_saved_its_output_raises(leaf: Tensor, implementation: str) -> None:
    with pytest.raises(RuntimeError, match=MODIFIED):
        loss_of(leaf.tanh(), implementation).backward()


def test_two_losses_on_the_same_logits_raise(leaf: Tensor, implementation: str) -> None:
    logits = leaf * 1
    total = loss_of(logits, implementation) + loss_of(logits, implementation, tau=0.5)
    with pytest.raises(RuntimeError, match=MODIFIED):
        total.backward()


def test_logits_changed_after_forward_raise(leaf: Tensor, implementation: str) -> None:
    logits = leaf * 1
    loss = loss_of(logits, implementation)
    logits.add_(1.0)
    with pytest.raises(RuntimeError, match=MODIFIED):
        loss.backward()


def test_a_use_that_saved_nothing_is_right(leaf: Tensor, implementation: str) -> None:
    """The sum's backward needs no logits, so both gradients arrive and add up."""

    def total(inplace: bool) -> Tensor:
        logits = leaf * 1
        loss = conspo_loss(
            logits, LABELS.to(leaf.device), REWARDS, 2, inplace_backward=inplace, implementation=implementation
        )
        (grad,) = torch.autograd.grad(loss + 3 * logits.sum(), leaf)
        return grad

    assert torch.equal(total(inplace=True), total(inplace=False))


def test_a_second_backward_is_right_without_inplace(leaf: Tensor, implementation: str) -> None:
    loss = conspo_loss(leaf * 1, LABELS.to(leaf.device), REWARDS, 2, implementation=implementation)
    (first,) = torch.autograd.grad(loss, leaf, retain_graph=True)
    (second,) = torch.autograd.grad(loss, leaf)
    assert torch.equal(first, second)


def test_slices_of_a_longer_tensor(implementation: str, device: torch.device) -> None:
    """logits[:, :-1] of a non-leaf: what is not in the view keeps its value and gets no gradient."""
    leaf = torch.randn(2, 3, 9, device=device, requires_grad=True)
    whole = leaf * 1
    kept = whole[:, -1].detach().clone()
    loss_of(whole[:, :-1], implementation).backward()
    assert torch.equal(whole[:, -1], kept)
    assert leaf.grad is not None
    assert not leaf.grad[:, -1].any()
    assert leaf.grad[:, :-1].any()


def test_entropy_too(leaf: Tensor, implementation: str) -> None:
    grads = []
    for inplace in (False, True):
        logprobs, entropy = token_logprobs(
            leaf * 1, LABELS.to(leaf.device), return_entropy=True, inplace_backward=inplace,
            implementation=implementation,
        )  # fmt: skip
        grads.append(torch.autograd.grad((logprobs * 2 + entropy).sum(), leaf)[0])
    assert torch.equal(*grads)


def test_a_gradient_of_the_gradient_raises(leaf: Tensor, implementation: str) -> None:
    loss = conspo_loss(leaf, LABELS.to(leaf.device), REWARDS, 2, implementation=implementation)
    (grad,) = torch.autograd.grad(loss, leaf, create_graph=True)
    with pytest.raises(RuntimeError):
        grad.sum().backward()
    with pytest.raises(NotImplementedError, match="no second derivative"):
        torch.autograd.functional.hvp(
            lambda z: conspo_loss(z, LABELS.to(leaf.device), REWARDS, 2, implementation=implementation),  # type: ignore[return-value]
            leaf.detach(),
            torch.ones_like(leaf),
        )


def test_saved_tensor_hooks_and_checkpoints_raise(leaf: Tensor, implementation: str) -> None:
    """What hooks unpack, autograd does not check for modifications: nobody would be told."""
    weight = torch.randn(9, 9, requires_grad=True, device=leaf.device)

    def loss(hidden: Tensor) -> Tensor:
        return loss_of(torch.tanh(hidden @ weight), implementation)

    with pytest.raises(ValueError, match="inplace_backward must be called outside of saved-tensor hooks"):
        checkpoint(loss, leaf, use_reentrant=False)
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x),
        pytest.raises(ValueError, match="inplace_backward must be called outside of saved-tensor hooks"),
    ):
        loss(leaf)


def test_packed_rows_that_overlap_by_one_raise(implementation: str, device: torch.device) -> None:
    flat = torch.randn(33, device=device, requires_grad=True) * 1
    labels = torch.tensor([1, 2, 3, 4], device=device)
    with pytest.raises(ValueError, match="inplace_backward needs logits whose rows do not overlap"):
        token_logprobs(flat.unfold(0, 9, 8), labels, inplace_backward=True, implementation=implementation)


def test_a_leaf_under_no_grad_is_left_alone(leaf: Tensor, implementation: str) -> None:
    with torch.no_grad():
        assert not loss_of(leaf, implementation).requires_grad


def test_where_rows_cannot_be_chosen(leaf: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's way on an accelerator, taken on the CPU: all rows, some of them without gradient."""
    labels = torch.tensor([[1, -100], [3, 4]])

    def grad(inplace: bool) -> Tensor:
        loss = conspo_loss(leaf.cpu() * 1, labels, REWARDS, 2, inplace_backward=inplace, implementation="torch")
        return torch.autograd.grad(loss, leaf)[0]

    expected = grad(inplace=False)
    monkeypatch.setattr(eager, "_can_choose", lambda keep: False)
    assert torch.equal(grad(inplace=False), expected)
    assert torch.equal(grad(inplace=True), expected)
