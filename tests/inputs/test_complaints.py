"""What hurt the users of other libraries, each a test that fails where this one has the same fault.

Elsewhere: packed tokens equal padded ones in every case (test_loss.py, Liger#1281), more than 2^31 logits in memory
(test_token_logprob.py, slow), the same bits from the same inputs in every case (test_loss.py, RL-Kernel#96), right
values under sequence parallelism (test_ranks.py, verl#3723), a sharded or empty weight, and a DTensor beside plain
tensors, raise and say how to gather it (test_check.py, TRL#3368, #5891, #6372, #6064).
"""

from __future__ import annotations

import importlib
import logging
from pathlib import Path

import pytest
import torch
from processes import python
from tolerance import max_error
from torch import Tensor

from conspo_kernels import conspo_loss, linear_token_logprobs, token_logprobs
from conspo_kernels.backends import native, registry
from conspo_kernels.ops.token_logprob import token_logprob, token_logprob_backward_
from conspo_kernels.reference import reference_loss
from conspo_kernels.values import LogitTransform

REWARDS = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0, 0.0])


def batch(device: torch.device, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Logits (a leaf) and labels of six rollouts."""
    return torch.randn(6, 3, 11, device=device, dtype=dtype, requires_grad=True), torch.arange(18).view(6, 3) % 11


def gather(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.double().log_softmax(-1).gather(-1, labels[..., None])[..., 0]


@pytest.mark.parametrize("vocab_size", [1000, 4096 + 3, 251])
def test_padded_vocabulary_tail_gives_no_positive_logprobs(
    vocab_size: int, implementation: str, device: torch.device
) -> None:  # verl#2656
    """Neither memory past the vocabulary nor a tail that the caller masks is part of the softmax."""
    logits = torch.randn(2, 3, vocab_size, device=device)
    labels = torch.randint(0, vocab_size, (2, 3), device=device)
    labels[0, 0] = vocab_size - 1
    exact = gather(logits, labels)

    neighbours = torch.full((2, 3, vocab_size + 24), 80.0, device=device)  # a softmax over them would be another
    neighbours[..., :vocab_size] = logits
    masked = torch.cat([logits, torch.full((2, 3, 24), -torch.inf, device=device)], -1)
    for layout in (logits, neighbours[..., :vocab_size], masked):
        logprobs = token_logprobs(layout, labels, implementation=implementation)
        assert (logprobs <= 0).all()
        assert max_error(logprobs, exact) <= 1e-5


# A GPU's memory is not sparse; the slow test is the GPU's.
@pytest.mark.leave_out(where=lambda p: p["implementation"] == "triton" and torch.cuda.is_available())
def test_offsets_beyond_32_bits(tmp_path: Path, implementation: str, device: torch.device) -> None:  # TRL#7266
    """Rows 2^31 + 16 logits apart, read and written in place: a sparse file, of which only the rows take room.

    An offset that wraps around to a negative one stays within the file: a failure, not a crash.
    """
    stride = 2**31 + 16
    storage = torch.from_file(str(tmp_path / "logits"), shared=True, size=2 * stride + 8, dtype=torch.bfloat16)
    logits = storage.as_strided((1, 2, 8), (0, stride, 1), stride)
    logits.copy_(torch.randn(1, 2, 8))
    labels = torch.tensor([[3, 7]])
    exact_leaf = logits.double().requires_grad_()
    exact = gather(exact_leaf, labels)
    (exact_grad,) = torch.autograd.grad(exact.sum(), exact_leaf)

    transform = LogitTransform().to_numbers()
    logprobs, _entropy, row_max, log_sum = token_logprob(logits, labels, transform, False, True, implementation, 0, "")
    assert max_error(logprobs, exact) <= 1e-6
    token_logprob_backward_(
        logits, labels, row_max, log_sum, None, torch.ones_like(logprobs), None, transform, implementation
    )
    assert max_error(logits, exact_grad) <= 2**-8


class GridRecorder:
    """In place of a Triton kernel: keeps the grids it would be launched on."""

    def __init__(self) -> None:
        self.grids: list[tuple[int, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> object:
        self.grids.append(grid)
        return lambda *args, **kwargs: None


@pytest.mark.parametrize("shape", [(1, 65_537), (65_537, 1)], ids=["tokens", "rollouts"])
def test_more_than_65535_tokens(
    shape: tuple[int, int], implementation: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:  # Liger#1294
    """Only the first axis of a grid may be longer. Interpreted, so many programs take a minute: see their grids."""
    logits = torch.randn(*shape, 2, device=device)
    labels = torch.zeros(shape, dtype=torch.long, device=device)
    if implementation == "triton" and device.type == "cpu":
        recorder = GridRecorder()
        for op in ("token_logprob", "sequence_score", "group_infonce"):
            module = importlib.import_module(f"conspo_kernels.backends.triton.{op}")
            for name in [name for name in vars(module) if name.endswith("_kernel")]:
                monkeypatch.setattr(module, name, recorder)
        loss = conspo_loss(logits.requires_grad_(), labels, torch.ones(shape[0]), 1, implementation=implementation)
        loss.backward()
        assert {len(grid) for grid in recorder.grids} == {1}
        assert recorder.grids[0] == recorder.grids[-1] == (65_537,)
    else:
        logprobs = token_logprobs(logits, labels, implementation=implementation)
        assert max_error(logprobs, gather(logits, labels)) <= 1e-6


def test_micro_batches_add_up_to_the_batch(implementation: str, device: torch.device) -> None:  # Liger#1082
    """With `num_groups` the valid groups of all micro-batches; the mean of each micro-batch would be another loss."""
    logits, labels = batch(device)
    labels = labels.to(device)
    rewards = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0, 1.0])  # the second group is not valid
    whole = conspo_loss(logits, labels, rewards, 2, implementation=implementation)
    (grad,) = torch.autograd.grad(whole, logits)
    parts = [
        conspo_loss(logits[i], labels[i], rewards[i], 2, num_groups=2, implementation=implementation)
        for i in (slice(0, 2), slice(2, 6))
    ]
    total = torch.stack(parts).sum()
    assert max_error(total, whole.detach()) <= 1e-14
    assert max_error(torch.autograd.grad(total, logits)[0], grad) <= 1e-15


@pytest.mark.parametrize("groups", [2, torch.tensor([4, 1, 4, 1, 9, 9])], ids=["equal", "ids"])
def test_unreduced_losses_take_a_gradient_each(
    groups: int | Tensor, implementation: str, device: torch.device
) -> None:  # Liger#1298
    logits, labels = batch(device)
    losses = conspo_loss(
        logits, labels.to(device), REWARDS, groups, reduction="none", tau=0.3, implementation=implementation
    )
    weights = torch.tensor([3.0, -0.5, 7.0, 11.0, 0.25, -2.0], dtype=torch.float64)[: len(losses)]
    (grad,) = torch.autograd.grad(losses, logits, weights.to(device))

    leaf = logits.detach().cpu().requires_grad_()
    exact = reference_loss(leaf, labels, REWARDS, groups, reduction="none", tau=0.3).loss
    assert max_error(grad, torch.autograd.grad(exact, leaf, weights)[0]) <= 1e-13


def test_an_explicit_implementation_runs_or_raises() -> None:  # TRL#7253
    """Nothing falls back in silence: Triton on the CPU raises without its interpreter, in a process of its own."""
    program = (
        "import torch; from conspo_kernels import token_logprobs\n"
        "try: token_logprobs(torch.randn(1, 2, 5), torch.zeros(1, 2, dtype=torch.long), implementation='triton')\n"
        "except ValueError as error: print(error)"
    )
    assert "implementation='triton' cannot run here: Triton runs on CUDA tensors" in python("-c", program)


def test_auto_says_once_what_it_chose(caplog: pytest.LogCaptureFixture) -> None:  # TRL#7253
    registry.forget_choices()
    with caplog.at_level(logging.INFO, logger="conspo_kernels"):
        for _ in range(3):
            token_logprobs(torch.randn(2, 3, 5), torch.ones(2, 3, dtype=torch.long))
    chosen = "'native'" if native.OBSTACLE is None else f"'torch', not 'native': {native.OBSTACLE}"
    assert [record.message for record in caplog.records] == [f"on cpu: implementation={chosen}"]


def test_compiles_with_python_floats(implementation: str, device: torch.device) -> None:  # Liger#1366
    """Before torch 2.15 dynamo hands floats to Triton as fp64: kernels in fp32 must take them, and stay fp32."""
    torch._dynamo.reset()
    logits, labels = batch(device, torch.float32)
    labels = labels.to(device)

    def step(logits: Tensor, tau: float, margin: float, temperature: float, softcap: float) -> Tensor:
        return conspo_loss(
            logits, labels, REWARDS, 2, tau=tau, margin=margin, temperature=temperature, softcap=softcap,
            logit_scale=temperature / 2, reward_threshold=margin, implementation=implementation,
        )  # fmt: skip

    compiled = torch.compile(step, fullgraph=True)
    for numbers in ((0.3, 0.2, 0.7, 5.0), (0.4, 0.1, 0.9, 6.0)):
        loss, expected = compiled(logits, *numbers), step(logits, *numbers)
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(torch.autograd.grad(loss, logits), torch.autograd.grad(expected, logits))


def test_a_second_backward_on_overwritten_logits_raises(implementation: str, device: torch.device) -> None:  # quack#209
    logits, labels = batch(device)
    loss = conspo_loss(logits * 1, labels.to(device), REWARDS, 2, inplace_backward=True, implementation=implementation)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_batches_that_are_no_multiple_of_the_generations(
    implementation: str, device: torch.device
) -> None:  # unsloth#4149
    """The last batch of an epoch: an int raises and says why, ids take groups of any sizes."""
    logits, labels = batch(device)
    logits, labels = logits[:5], labels[:5]
    with pytest.raises(ValueError, match="groups=2 rollouts per prompt must divide the number of rollouts, got 5"):
        conspo_loss(logits, labels.to(device), REWARDS[:5], 2, implementation=implementation)
    ids = torch.tensor([0, 0, 0, 1, 0])
    loss = conspo_loss(logits, labels.to(device), REWARDS[:5], ids, implementation=implementation)
    assert max_error(loss, reference_loss(logits.detach().cpu(), labels, REWARDS[:5], ids).loss) <= 1e-14


def test_fp32_logits_of_a_bf16_model_stay_fp32(implementation: str, device: torch.device) -> None:  # TRL#4303
    """An fp32 head: neither values nor gradients pass through bf16, which would be off by 1e-2."""
    hidden = torch.randn(6, 3, 16, device=device).bfloat16()
    weight = torch.randn(97, 16, device=device).bfloat16()
    logits = (hidden.float() @ weight.float().T).requires_grad_()
    labels = (torch.arange(18).view(6, 3) % 97).to(device)
    output = conspo_loss(logits, labels, REWARDS, 2, return_metrics=True, implementation=implementation)
    (grad,) = torch.autograd.grad(output.loss, logits)

    leaf = logits.detach().cpu().double().requires_grad_()
    exact = reference_loss(leaf, labels.cpu(), REWARDS, 2)
    (exact_grad,) = torch.autograd.grad(exact.loss, leaf)
    assert output.logprobs.dtype == grad.dtype == torch.float32
    assert max_error(output.logprobs, exact.logprobs) <= 1e-5
    assert max_error(grad, exact_grad) <= 1e-5 * exact_grad.abs().max().item()
    rounded = gather(logits.detach().bfloat16(), labels)
    assert max_error(rounded, exact.logprobs) > 1e-3


@pytest.mark.parametrize("entropy", [False, True])
def test_a_row_does_not_depend_on_its_batch(
    entropy: bool, implementation: str, device: torch.device
) -> None:  # RL-Kernel#96
    """Bitwise, values and gradients, alone, in a batch and in another run, where rows are 16-byte aligned."""
    logits = torch.randn(7, 3, 5000, device=device).bfloat16()
    labels = torch.randint(0, 5000, (7, 3), device=device)

    def bits(rows: slice) -> tuple[Tensor, ...]:
        leaf = logits[rows].clone().requires_grad_()
        returned = token_logprobs(leaf, labels[rows], return_entropy=entropy, implementation=implementation)
        values = returned if isinstance(returned, tuple) else (returned,)
        return *values, torch.autograd.grad(sum(value.sum() for value in values), leaf)[0]

    whole = bits(slice(None))
    for a, b in zip(whole, bits(slice(None)), strict=True):
        assert torch.equal(a, b)
    for row in (0, 3, 6):
        for alone, among_others in zip(bits(slice(row, row + 1)), whole, strict=True):
            assert torch.equal(alone[0], among_others[row])


def test_an_empty_vocabulary_raises(implementation: str, device: torch.device) -> None:  # TRL#3368, of logits
    """What a head gives whose weight is an empty shard: [B, T, 0] is an error, not a loss of zero."""
    logits = torch.nn.functional.linear(torch.randn(2, 3, 16, device=device), torch.empty(0, 16, device=device))
    labels = torch.zeros(2, 3, dtype=torch.long, device=device)
    with pytest.raises(ValueError, match=r"logits must have a vocabulary of at least one entry, got \[2, 3, 0\]"):
        conspo_loss(logits, labels, REWARDS[:2], 2, implementation=implementation)


def test_lora_on_the_head_is_not_ignored(implementation: str, device: torch.device) -> None:  # TRL#4612
    """The weight is whatever the caller says, an expression too: its parts get their gradients."""
    torch.manual_seed(0)
    hidden, labels = torch.randn(6, 5, dtype=torch.float64, device=device), torch.arange(6, device=device)
    base = torch.randn(11, 5, dtype=torch.float64, device=device)
    a = torch.randn(2, 5, dtype=torch.float64, device=device, requires_grad=True)
    b = torch.randn(11, 2, dtype=torch.float64, device=device, requires_grad=True)
    result = linear_token_logprobs(hidden, base + b @ a, labels, implementation=implementation)
    logits = hidden @ (base + b @ a).T
    expected = logits.log_softmax(-1)[torch.arange(6), labels]
    assert max_error(result.detach(), expected.detach()) <= 1e-12  # type: ignore[union-attr]
    for ours, exact in zip(*(torch.autograd.grad(x.sum(), (a, b)) for x in (result, expected)), strict=True):  # type: ignore[union-attr]
        assert max_error(ours, exact) <= 1e-12


# The interpreter's bf16 is not a GPU's.
@pytest.mark.leave_out(where=lambda p: p["implementation"] == "triton" and not torch.cuda.is_available())
def test_the_gradient_of_the_head_is_summed_in_fp32(implementation: str, device: torch.device) -> None:  # cce#14
    """64 tiles of tokens, each adding 1/64 of dW: summed in bf16 the later ones would be rounded away."""
    torch.manual_seed(0)
    num_tokens, hidden_size, vocab_size = 1024, 32, 64
    hidden = (torch.randn(num_tokens, hidden_size, device=device) + 1).bfloat16()
    weight = (torch.randn(vocab_size, hidden_size, device=device) / 8).bfloat16().requires_grad_()
    labels = torch.zeros(num_tokens, dtype=torch.long, device=device)

    def error(mib: float) -> float:
        logprobs = linear_token_logprobs(hidden, weight, labels, workspace_mib=mib, implementation=implementation)
        (grad,) = torch.autograd.grad(logprobs.sum(), weight)  # type: ignore[union-attr]
        exact = weight.detach().double().requires_grad_()
        truth = (hidden.double() @ exact.T).log_softmax(-1)[:, 0].sum()
        (expected,) = torch.autograd.grad(truth, exact)
        return ((grad.double() - expected).norm() / expected.norm()).item()

    tile = 16 * vocab_size * 2 / 2**20
    assert error(tile) <= 1.2 * error(512)
