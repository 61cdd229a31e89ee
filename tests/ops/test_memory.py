"""What the loss allocates, read off the allocator: nothing of the logits' size but the gradient, or not even that."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from benchmarks.timing.measure import Call, allocations, peak_bytes
from conspo_kernels import conspo_loss, linear_conspo_loss, linear_conspo_scores, linear_weighted_score_loss
from conspo_kernels.linear.gemm import PRODUCT_BYTES

B, T, V = 4, 256, 20_000
LOGITS_BYTES = B * T * V * 2


def allocated(function: Callable[[], object]) -> list[int]:
    """Bytes of each allocation on the CPU during a call, by any thread and any op."""
    return [size for size in allocations(function) if size > 0]


@pytest.fixture
def no_poison() -> None:
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("view", ["shift", "slice"])
def test_allocations(inplace: bool, view: str, no_poison: None) -> None:
    """conspo_loss(shift=True) needs the gradient and no more; in place, not even that. A view is read in place."""
    base = torch.randn(B, T, V, dtype=torch.bfloat16, requires_grad=True)
    ids = torch.randint(0, V, (B, T))
    rewards = torch.tensor([1.0, 0.0, 0.0, 1.0])
    logits = base * 1

    def forward() -> torch.Tensor:
        if view == "shift":
            return conspo_loss(logits, ids, rewards, 2, shift=True, inplace_backward=inplace, implementation="torch")
        return conspo_loss(logits[:, :-1], ids[:, 1:], rewards, 2, inplace_backward=inplace, implementation="torch")

    losses: list[torch.Tensor] = []
    assert max(allocated(lambda: losses.append(forward()))) < LOGITS_BYTES // 2

    def backward() -> None:
        torch.autograd.grad(losses[0], logits)

    large = [size for size in allocated(backward) if size >= LOGITS_BYTES // 2]
    # The backward of slicing, autograd's own, allocates a full buffer; that is why `shift` is the recommended way.
    assert len(large) == (0 if inplace else 1) + (1 if view == "slice" else 0), large


def test_the_count_sees_what_it_should(no_poison: None) -> None:
    """Eager PyTorch keeps several copies: the same count finds them."""
    logits = torch.randn(B, T, V, dtype=torch.bfloat16)
    assert sum(size >= LOGITS_BYTES for size in allocated(lambda: logits.float().log_softmax(-1))) == 2


@pytest.mark.parametrize("inplace", [False, True])
def test_allocations_of_the_triton_launchers(inplace: bool) -> None:
    """Small enough to interpret: of a size to tell [B, T, V] from everything else."""
    logits = torch.randn(2, 4, 4096, requires_grad=True) * 1
    labels = torch.randint(0, 4096, (2, 4))
    losses: list[torch.Tensor] = []

    def forward() -> None:
        losses.append(
            conspo_loss(
                logits, labels, torch.tensor([1, 0]), 2, inplace_backward=inplace, shift=True, implementation="triton"
            )
        )

    assert max(allocated(forward)) < logits.numel()
    large = [n for n in allocated(lambda: torch.autograd.grad(losses[0], logits)) if n >= logits.numel()]
    assert len(large) == (0 if inplace else 1)


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["recompute", "frozen", "known", "phase 1"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("num_tokens", [512, 4096])
def test_fused_linear(mode: str, dtype: torch.dtype, num_tokens: int, device: torch.device, no_poison: None) -> None:
    """Beyond the gradients and one fp32 accumulator the workspace and a constant, however many the tokens.

    The logits would be 20 to 320 MB.
    """
    vocab_size, hidden_size, workspace_mib, constant = 20_000, 128, 8, 2**20
    hidden = torch.randn(4, num_tokens // 4, hidden_size, dtype=dtype, device=device, requires_grad=True)
    weight = torch.randn(vocab_size, hidden_size, dtype=dtype, device=device, requires_grad=mode != "frozen")
    labels = torch.randint(vocab_size, hidden.shape[:-1], device=device)
    rewards = torch.tensor([1.0, 0.0, 0.0, 1.0])

    def run(_: object) -> None:
        if mode == "phase 1":
            linear_conspo_scores(hidden, weight, labels, workspace_mib=workspace_mib)
            return
        if mode == "known":
            loss = linear_weighted_score_loss(hidden, weight, labels, rewards - 0.5, workspace_mib=workspace_mib)
        else:
            loss = linear_conspo_loss(hidden, weight, labels, rewards, 2, workspace_mib=workspace_mib)  # type: ignore[assignment]
        torch.autograd.grad(loss, [x for x in (hidden, weight) if x.requires_grad])

    gradients = sum(x.numel() * x.element_size() for x in (hidden, weight) if x.requires_grad and mode != "phase 1")
    accumulator = 4 * (max(hidden.numel(), weight.numel()) if mode != "phase 1" else 0)
    # Where GEMMs do not add to fp32: a product, and its copy that is added.
    product = 3 * min(PRODUCT_BYTES, weight.numel() * 2) if dtype == torch.bfloat16 and device.type == "cpu" else 0
    peak = peak_bytes(Call(lambda: None, run), device)
    assert peak <= gradients + accumulator + workspace_mib * 2**20 + product + constant + 200 * num_tokens
