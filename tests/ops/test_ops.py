"""The registered ops: torch's own opcheck, gradcheck through the kernels, and the choice of implementation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

from conspo_kernels import (
    conspo_loss,
    conspo_loss_from_scores,
    linear_conspo_loss,
    linear_weighted_score_loss,
    sequence_scores,
    token_logprobs,
    weighted_score_loss,
)
from conspo_kernels.backends import registry
from conspo_kernels.objective import Groups
from conspo_kernels.ops.label_alignment import sequence_offsets
from conspo_kernels.ops.token_logprob import token_logprob
from conspo_kernels.values import IGNORED, LogitTransform

LABELS = torch.tensor([[1, -100, 2], [3, 4, -100]])
ALIGNED = torch.where(LABELS == -100, IGNORED, LABELS)  # as an op takes them
OPS = torch.ops.conspo


def test_opcheck_token_logprob(implementation: str, device: torch.device) -> None:
    logits = torch.randn(2, 3, 17, device=device, requires_grad=True)
    labels, transform = ALIGNED.to(device), LogitTransform(0.7, 1.5, 4.0).to_numbers()
    for with_entropy in (False, True):
        arguments = (logits, labels, transform, with_entropy, False, implementation, 0, "")
        opcheck(OPS.token_logprob.default, arguments)
    saved = token_logprob(logits.detach(), labels, transform, True, False, implementation, 0, "")
    logprobs, entropy, row_max, log_sum = saved
    for grad_entropy in (None, torch.rand_like(logprobs)):
        saved_for_backward = (logits.detach(), labels, row_max, log_sum, None if grad_entropy is None else entropy)
        for op in (OPS.token_logprob_backward.default, OPS.token_logprob_backward_.default):
            upstream = (torch.rand_like(logprobs), grad_entropy)
            opcheck(op, (*saved_for_backward, *upstream, transform, implementation))


def test_opcheck_forward_backward(implementation: str, device: torch.device) -> None:
    logits, labels, transform = torch.randn(2, 3, 17, device=device), ALIGNED.to(device), LogitTransform().to_numbers()
    coefficients = torch.rand(2, 3, device=device)
    for grad_logits in (None, torch.empty_like(logits)):
        opcheck(
            OPS.token_logprob_forward_backward.default,
            (logits, labels, coefficients, grad_logits, transform, implementation),
        )
    factor = torch.tensor(2.0, device=device)
    opcheck(OPS.scale_.default, (torch.rand(4, device=device), factor, implementation))
    buffer, gradient = torch.rand(2, 4, device=device).unbind()
    opcheck(OPS.add_scaled_.default, (buffer.clone(), gradient.clone(), factor))
    values, x = (torch.rand(3, device=device, requires_grad=True) for _ in range(2))
    weights, counts = torch.tensor([0.0, 1.0, -2.0], device=device), torch.tensor([1, 0, 3], device=device)
    opcheck(OPS.weighted_sum.default, (values, weights, counts, *(None,) * 7, implementation))
    # Its backward scales the gradient in place, which the functional check of autograd would call twice.
    opcheck(
        OPS.weighted_sum.default,
        (values.detach(), weights, counts, x, None, None, torch.rand(3, device=device), *(None,) * 3, implementation),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


def test_opcheck_linear_logprob_forward_backward(implementation: str, device: torch.device) -> None:
    hidden, weight, bias = (torch.randn(*n, device=device) for n in ((6, 4), (17, 4), (17,)))
    labels, transform = ALIGNED.to(device).flatten(), LogitTransform(0.7, 1.5, 4.0).to_numbers()
    tensors = (hidden, weight, bias, labels, None, torch.rand(6, device=device))
    opcheck(
        OPS.linear_logprob_forward_backward.default,
        (*tensors, [True, True, True], False, torch.float32, transform, 600, implementation),
    )


def test_opcheck_sequence_score(implementation: str, device: torch.device) -> None:
    logprobs, labels = torch.randn(2, 3, device=device, requires_grad=True), ALIGNED.to(device)
    opcheck(OPS.sequence_score.default, (logprobs, labels, None, implementation))
    packed = (logprobs.detach().view(1, 6).requires_grad_(True), labels.view(1, 6))
    offsets = sequence_offsets(torch.tensor([0, 1, 4]), 6, device)
    opcheck(OPS.sequence_score.default, (*packed, offsets, implementation))
    opcheck(OPS.sequence_offsets.default, (torch.tensor([0, 1, 4], dtype=torch.int32), 6, device))
    counts = torch.tensor([1, 2], dtype=torch.int32, device=device)
    for factor in (None, torch.tensor(2.0, device=device)):
        opcheck(OPS.sequence_score_backward.default, (counts.float(), counts, labels, None, implementation, factor))
    opcheck(OPS.token_coefficients.default, (counts.float(), labels, None, implementation))
    opcheck(OPS.token_coefficients.default, (counts.float(), labels.view(1, 6), offsets, implementation))
    opcheck(OPS.masked_coefficients.default, (labels.float(), labels, implementation))


def test_opcheck_aligned_labels(implementation: str, device: torch.device) -> None:
    mask, offsets = LABELS.to(device) > 1, torch.tensor([0, 2, 5], device=device)
    opcheck(OPS.aligned_labels.default, (LABELS.to(device), mask, None, True, -100, 17, implementation))
    opcheck(OPS.aligned_labels.default, (LABELS.to(device).flatten(), None, offsets, True, -100, 17, implementation))
    by_columns = LABELS.to(device).T.contiguous().T
    opcheck(OPS.aligned_labels.default, (by_columns, None, None, False, -100, 17, implementation))


def test_opcheck_copied_to(device: torch.device) -> None:
    for x in (torch.rand(2, 3, dtype=torch.float64), torch.rand(3, 2, dtype=torch.float64).T):
        opcheck(OPS.copied_to.default, (x, device, torch.float32))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_opcheck_infonce(reduction: str, implementation: str, device: torch.device) -> None:
    logprobs = torch.randn(6, 2, device=device, requires_grad=True)
    labels = torch.tensor([[0, 0]] * 5 + [[0, IGNORED]], device=device)
    rewards = torch.tensor([1.0, 0, 1, 0, 0, 1], device=device)
    margin = torch.tensor(0.1, device=device)
    packed = (logprobs.detach().view(1, 12).requires_grad_(), labels.view(1, 12), torch.arange(7, device=device) * 2)
    by_ids = Groups.of_ids(torch.tensor([1, 1, 2, 2, 1, 2], device=device))
    for tokens, groups in (((logprobs, labels, None), Groups(2)), (packed, by_ids)):
        arguments = (*tokens, rewards, *groups, margin, None, 0.5, 0.5, reduction, implementation)
        opcheck(OPS.infonce.default, arguments)


def test_fake_tensors_and_modes_see_the_op() -> None:
    """Eager mode goes past the dispatcher; who asks for the op still gets it."""
    calls: list[str] = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            calls.append(str(func))
            return func(*args, **(kwargs or {}))

    logits = torch.randn(2, 3, 17)
    with Recorder():
        conspo_loss(logits, LABELS.abs() % 17, torch.tensor([1.0, 0.0]), 2)
    assert {name for name in calls if name.startswith("conspo.")} >= {
        "conspo.aligned_labels.default", "conspo.token_logprob.default", "conspo.infonce.default",
    }  # fmt: skip
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(logits)
        assert token_logprobs(fake, mode.from_tensor(LABELS)).shape == (2, 3)


def test_an_explicit_name_runs_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No op of a forward or a backward asks for another backend than the one that was named."""
    for name in ("native", "triton"):
        monkeypatch.setitem(registry.BACKENDS, name, ".absent")
    registry.forget_choices()
    logits, hidden, weight = (torch.randn(*size, requires_grad=True) for size in ((2, 3, 17), (2, 3, 4), (17, 4)))
    labels, rewards = LABELS.clamp_min(0), torch.tensor([1.0, 0.0])
    more: dict[str, Any] = {"implementation": "torch"}
    try:
        conspo_loss(logits, labels, rewards, torch.tensor([5, 5]), shift=True, **more).backward()
        weighted_score_loss(logits * 1, labels, rewards - 0.5, inplace=True, **more).backward()
        linear_conspo_loss(hidden, weight, labels, rewards, 2, **more).backward()
        linear_conspo_loss(hidden, weight.detach(), labels, rewards, 2, **more).backward()
        linear_weighted_score_loss(
            hidden, weight, labels, rewards - 0.5, weight_grad=torch.zeros(17, 4), **more
        ).backward()
    finally:
        monkeypatch.undo()
        registry.forget_choices()


FUNCTIONS: dict[str, Callable[[Tensor, str], Tensor]] = {
    "padded": lambda z, i: conspo_loss(
        z.view(3, 2, 11), torch.tensor([[1, 2], [3, -100], [10, 0]]).to(z.device), torch.tensor([1, 0, 0]), 3,
        margin=0.3, tau=0.4, temperature=0.8, softcap=3.0, logit_scale=1.2, implementation=i,
    ),
    "packed": lambda z, i: conspo_loss(
        z, torch.tensor([1, 2, 3, 4, 5, 6]).to(z.device), torch.tensor([1, 0, 1]), torch.tensor([4, 4, 4]),
        cu_seqlens=torch.tensor([0, 2, 3, 5]), shift=True, tau=0.4, temperature=0.8, softcap=3.0, implementation=i,
    ),
    "no softcap, none": lambda z, i: conspo_loss(
        z.view(6, 1, 11), torch.arange(6).to(z.device)[:, None], torch.tensor([1, 0, 1, 0, 1, 1]), 2,
        reduction="none", implementation=i,
    ),
    "entropy": lambda z, i: torch.cat(
        token_logprobs(z.view(2, 3, 11), LABELS.to(z.device), temperature=1.3, return_entropy=True, implementation=i)
    ),
    "entropy under a softcap": lambda z, i: torch.cat(
        token_logprobs(z.view(2, 3, 11), LABELS.to(z.device), softcap=2.0, return_entropy=True, implementation=i)
    ),
    "scores": lambda z, i: sequence_scores(
        z, (torch.arange(66) % 5).view(6, 11).to(z.device), ignore_index=3, implementation=i
    ),
    "loss from scores": lambda z, i: conspo_loss_from_scores(
        z.flatten()[:8], torch.tensor([1, 0, 0, 1, 1, 0, 1, 1]), torch.tensor([3, 1, 3, 3, 1, 1, 1, 8]), margin=0.2,
        tau=0.3, reduction="sum", implementation=i,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradcheck_fp64(name: str, implementation: str, device: torch.device) -> None:
    """Through the kernels that users run."""
    logits = torch.randn(6, 11, dtype=torch.float64, device=device, requires_grad=True)
    # Along random directions under the interpreter: entry by entry it would run forward 132 times.
    interpreted = implementation == "triton" and device.type == "cpu"
    assert torch.autograd.gradcheck(lambda z: FUNCTIONS[name](z, implementation), logits, fast_mode=interpreted)
