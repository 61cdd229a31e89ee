"""The registered ops: torch's own opcheck, gradcheck through the kernels, and the choice of implementation."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from conspo_kernels import conspo_loss, conspo_loss_from_scores, sequence_scores, token_logprobs
from conspo_kernels.layout import GroupLayout
from conspo_kernels.ops.group_infonce import group_infonce
from conspo_kernels.ops.sequence_score import sequence_offsets, sequence_score, sequence_score_backward
from conspo_kernels.ops.token_logprob import token_logprob, token_logprob_backward, token_logprob_backward_

LABELS = torch.tensor([[1, -100, 2], [3, 4, -100]])


def test_opcheck_token_logprob(implementation: str, device: torch.device) -> None:
    logits = torch.randn(2, 3, 17, device=device, requires_grad=True)
    labels = LABELS.to(device)
    settings = (-100, 0.7, 1.5, 4.0)
    for with_entropy in (False, True):
        torch.library.opcheck(token_logprob, (logits, labels, *settings, with_entropy, False, implementation))
    saved = token_logprob(logits.detach(), labels, *settings, True, False, implementation)
    logprobs, entropy, row_max, log_sum = saved
    backward = (logits.detach(), labels, row_max, log_sum, entropy, torch.rand_like(logprobs))
    for grad_entropy in (None, torch.rand_like(logprobs)):
        torch.library.opcheck(token_logprob_backward, (*backward, grad_entropy, *settings, implementation))
        torch.library.opcheck(token_logprob_backward_, (*backward, grad_entropy, *settings, implementation))


def test_opcheck_sequence_score(implementation: str, device: torch.device) -> None:
    logprobs, labels = torch.randn(2, 3, device=device, requires_grad=True), LABELS.to(device)
    torch.library.opcheck(sequence_score, (logprobs, labels, None, -100, implementation))
    packed = (logprobs.detach().view(1, 6).requires_grad_(True), labels.view(1, 6))
    offsets = sequence_offsets(torch.tensor([0, 1, 4]), 6, device)
    torch.library.opcheck(sequence_score, (*packed, offsets, -100, implementation))
    torch.library.opcheck(sequence_offsets, (torch.tensor([0, 1, 4], dtype=torch.int32), 6, device))
    counts = torch.tensor([1, 2], dtype=torch.int32, device=device)
    torch.library.opcheck(sequence_score_backward, (counts.float(), counts, labels, None, -100, implementation))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_opcheck_group_infonce(reduction: str, implementation: str, device: torch.device) -> None:
    scores = torch.randn(6, device=device, requires_grad=True)
    rewards = torch.tensor([1.0, 0, 1, 0, 0, 1], device=device)
    margin = torch.tensor(0.1, device=device)
    ids = GroupLayout.of(torch.tensor([1, 1, 2, 2, 1, 2], device=device), 6)
    for layout, counts in ((GroupLayout.of(2, 6), None), (ids, torch.ones(6, dtype=torch.int32, device=device))):
        groups = (layout.order, layout.offsets, layout.slots, layout.size)
        torch.library.opcheck(
            group_infonce,
            (scores, rewards, counts, *groups, margin, None, 0.5, 0.5, reduction, implementation),
        )


DOORS: dict[str, Callable[[Tensor, str], Tensor]] = {
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


@pytest.mark.parametrize("door", DOORS)
def test_gradcheck_fp64(door: str, implementation: str, device: torch.device) -> None:
    """Through the kernels that users run."""
    logits = torch.randn(6, 11, dtype=torch.float64, device=device, requires_grad=True)
    # Along random directions under the interpreter: entry by entry it would run forward 132 times.
    interpreted = implementation == "triton" and device.type == "cpu"
    assert torch.autograd.gradcheck(lambda z: DOORS[door](z, implementation), logits, fast_mode=interpreted)
