"""token_logprobs and sequence_scores: extremes, entropy, what is read and what is not."""

from __future__ import annotations

import math

import pytest
import torch
from tolerance import max_error

from conspo_kernels import conspo_loss, sequence_scores, token_logprobs
from conspo_kernels.reference import token_entropy, token_logprob


def test_within_1e_5_at_50(implementation: str, device: torch.device) -> None:
    """|logits| <= 50 and the largest vocabulary of `benchmarks/timing/shapes.py`."""
    for dtype in (torch.float32, torch.bfloat16):
        logits = (torch.rand(1, 1, 262_144) * 100 - 50).to(device, dtype)
        labels = torch.randint(0, 262_144, (1, 1), device=device)
        actual = token_logprobs(logits, labels, implementation=implementation)
        exact = logits.double().log_softmax(-1).gather(-1, labels[..., None])[..., 0]
        assert max_error(actual, exact) <= 1e-5


def test_peaked_logits_keep_their_digits(implementation: str, device: torch.device) -> None:
    """logp = (z - max) - log_sum: at 1e4, z - logsumexp in fp32 would be off by 1e-3."""
    logits = torch.tensor([[[1e4, 1e4 - 2.0, -1e4, 1e4 - 0.5]]], device=device)
    labels = torch.tensor([[3]], device=device)
    exact = logits.double().log_softmax(-1)[..., 3]
    assert max_error(token_logprobs(logits, labels, implementation=implementation), exact) <= 1e-6


@pytest.mark.parametrize("softcap", [None, 4.0])
def test_first_chunk_all_masked(softcap: float | None, implementation: str, device: torch.device) -> None:
    """-inf - -inf must not become NaN, in the first tile, a whole first chunk, or an edge."""
    vocab_size = 16384 + 40 + 3
    for masked in (1, 2048, 16384 + 8):
        logits = torch.randn(1, 2, vocab_size, device=device)
        logits[..., :masked] = -math.inf
        logits.requires_grad_(True)
        labels = torch.full((1, 2), vocab_size - 1, device=device)
        logprobs, entropy = token_logprobs(
            logits, labels, softcap=softcap, return_entropy=True, implementation=implementation
        )
        (grad,) = torch.autograd.grad(logprobs.sum() + entropy.sum(), logits)
        exact = [token_logprob(row.double(), vocab_size - 1, softcap=softcap) for row in logits[0].detach().cpu()]
        assert max_error(logprobs[0], torch.stack(exact)) <= 1e-5
        assert grad.isfinite().all()
        assert not grad[..., :masked].any()


@pytest.mark.parametrize("kwargs", [{}, {"temperature": 0.5}, {"softcap": 3.0, "logit_scale": 0.7}], ids=str)
def test_entropy_and_its_gradient(kwargs: dict[str, float], implementation: str, device: torch.device) -> None:
    logits = torch.randn(2, 3, 300, dtype=torch.float64, device=device) * 3
    logits[0, 0, :5] = -math.inf
    logits.requires_grad_(True)
    labels = torch.randint(5, 300, (2, 3), device=device)
    labels[1, 2] = -100
    logprobs, entropy = token_logprobs(logits, labels, return_entropy=True, implementation=implementation, **kwargs)
    weights = torch.randn(2, 2, 3, dtype=torch.float64)

    exact_leaf = logits.detach().cpu().requires_grad_(True)
    exact_logprobs, exact_entropy = (torch.zeros(2, 3, dtype=torch.float64) for _ in range(2))
    for b in range(2):
        for t in range(3):
            if labels[b, t] != -100:
                exact_logprobs[b, t] = token_logprob(exact_leaf[b, t], int(labels[b, t]), **kwargs)
                exact_entropy[b, t] = token_entropy(exact_leaf[b, t], **kwargs)
    assert max_error(logprobs, exact_logprobs) <= 1e-12
    assert max_error(entropy, exact_entropy) <= 1e-12

    w = weights.to(device)
    for i, (a, b) in enumerate(((1, 1), (1, 0), (0, 1))):
        (grad,) = torch.autograd.grad(
            (a * w[0] * logprobs).sum() + (b * w[1] * entropy).sum(), logits, retain_graph=True
        )
        (exact,) = torch.autograd.grad(
            (a * weights[0] * exact_logprobs).sum() + (b * weights[1] * exact_entropy).sum(),
            exact_leaf,
            retain_graph=True,
        )
        assert max_error(grad, exact) <= 1e-12, i


def test_entropy_alone_has_a_gradient(implementation: str, device: torch.device) -> None:
    logits = torch.randn(1, 2, 7, device=device, requires_grad=True)
    _, entropy = token_logprobs(
        logits, torch.zeros(1, 2, dtype=torch.long, device=device), return_entropy=True, implementation=implementation
    )
    entropy.sum().backward()
    assert logits.grad is not None
    assert logits.grad.abs().sum() > 0


def test_labels_outside_the_vocabulary(implementation: str, device: torch.device) -> None:
    logits = torch.randn(1, 3, 7, device=device)
    for bad in (7, -1, -101, 2**40):
        labels = torch.tensor([[1, bad, -100]], device=device)
        if device.type == "cpu":
            with pytest.raises(ValueError, match=r"labels must lie in \[0, 7\).*got .* at token \(0, 1\)"):
                token_logprobs(logits, labels, implementation=implementation)
        else:
            logprobs = token_logprobs(logits, labels, implementation=implementation)
            assert logprobs.isnan().tolist() == [[False, True, False]]


def test_labels_under_the_mask_are_not_looked_at(implementation: str, device: torch.device) -> None:
    logits = torch.randn(1, 3, 7, device=device)
    labels = torch.tensor([[1, 10**9, 2]], device=device)
    for mask in (torch.tensor([[1.0, 0.0, -2.0]]), torch.tensor([[True, False, True]]), torch.tensor([[3, 0, 1]])):
        logprobs = token_logprobs(logits, labels, response_mask=mask.to(device), implementation=implementation)
        assert logprobs.isfinite().all()
        assert (logprobs != 0).tolist() == [[True, False, True]]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.uint8, torch.int8, torch.int16], ids=str)
@pytest.mark.parametrize("shift", [False, True])
def test_labels_of_any_integer_type(dtype: torch.dtype, shift: bool, implementation: str, device: torch.device) -> None:
    """-100, or 2**40, is no label of a narrow type: 156, which uint8 takes for -100, is one like others."""
    logits = torch.randn(2, 3, 200, device=device)
    labels = torch.randint(0, 100, (2, 3), device=device)
    if dtype == torch.uint8:
        labels[0, 1] = 156
    strided = torch.stack([labels, labels], -1).to(dtype)[..., 0]
    mask = torch.tensor([[True, True, False], [True, True, True]], device=device)
    for ignore_index in (-100, 2**40):
        kwargs = {"response_mask": mask, "shift": shift, "implementation": implementation, "ignore_index": ignore_index}
        a = token_logprobs(logits, labels, **kwargs)
        assert torch.equal(token_logprobs(logits, strided, **kwargs), a)
        assert (a != 0).sum() == (3 if shift else 5)


@pytest.mark.parametrize("inplace", [False, True])
def test_rows_without_gradient_are_not_read(inplace: bool, implementation: str, device: torch.device) -> None:
    """After forward, rows that backward must not read become NaN: their gradient is zero all the same."""
    vocab_size = 300
    logits = torch.randn(6, 2, vocab_size, device=device)
    labels = torch.randint(0, vocab_size, (6, 2), device=device)
    labels[0, 1] = -100
    rewards = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0, math.nan])  # the second and the third group are not valid
    leaf = logits.requires_grad_(True)
    work = leaf * 1
    loss = conspo_loss(work, labels, rewards, 2, inplace_backward=inplace, implementation=implementation)
    with torch.no_grad():
        work.data[0, 1] = math.nan
        work.data[2:] = math.nan
    (grad,) = torch.autograd.grad(loss, leaf)
    assert grad.isfinite().all()
    assert grad[0, 0].any()
    assert grad[1].any()
    assert not grad[0, 1].any()
    assert not grad[2:].any()


def test_sequence_scores_of_any_layout(implementation: str, device: torch.device) -> None:
    logprobs = -torch.rand(3, 5, dtype=torch.float64, device=device)
    labels = torch.randint(0, 9, (3, 5), device=device)
    labels[1] = -100
    labels[2, 3:] = -100
    expected = torch.stack([logprobs[0].mean(), torch.tensor(torch.nan, dtype=torch.float64), logprobs[2, :3].mean()])
    assert max_error(sequence_scores(logprobs, labels, implementation=implementation), expected) <= 1e-15
    cu_seqlens = torch.tensor([0, 5, 10, 15])
    for shape in ((15,), (1, 15)):
        packed = sequence_scores(
            logprobs.view(shape), labels.view(shape), cu_seqlens=cu_seqlens, implementation=implementation
        )
        assert max_error(packed, expected) <= 1e-15


def test_long_rollouts_take_several_blocks(implementation: str, device: torch.device) -> None:
    logprobs = -torch.rand(2, 9000, device=device, dtype=torch.float64).requires_grad_(True)
    labels = torch.zeros(2, 9000, dtype=torch.long, device=device)
    labels[:, ::3] = -100
    scores = sequence_scores(logprobs, labels, implementation=implementation)
    kept = labels != -100
    assert max_error(scores, (logprobs * kept).sum(1) / kept.sum(1)) <= 1e-13
    (grad,) = torch.autograd.grad(scores.sum(), logprobs)
    assert max_error(grad, kept.double() / 6000) <= 1e-18


def test_long_rollouts_of_equal_logprobs(implementation: str, device: torch.device) -> None:
    """What a confident policy gives: summed one after another in fp32, the mean would be off by 3e-4 of itself."""
    scores = sequence_scores(
        torch.full((1, 32768), -7.3, device=device), torch.zeros(1, 32768, dtype=torch.long, device=device),
        implementation=implementation,
    )  # fmt: skip
    assert scores.item() == pytest.approx(-7.3, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_softcaps_far_above_the_logits(dtype: torch.dtype, implementation: str, device: torch.device) -> None:
    """tanh near 0, times a large cap, must not multiply a rounding."""
    logits = (torch.randn(1, 4, 97) * 3).to(device, dtype).requires_grad_(True)
    labels = torch.randint(0, 97, (1, 4), device=device)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    for softcap in (10.0, 30.0, 100.0, 1e3, 1e4, 1e6, 1e9):
        logprobs = token_logprobs(logits, labels, softcap=softcap, implementation=implementation)
        exact_leaf = logits.detach().double().requires_grad_(True)
        exact = (softcap * torch.tanh(exact_leaf / softcap)).log_softmax(-1).gather(-1, labels[..., None])[..., 0]
        assert max_error(logprobs, exact) <= tolerance, softcap
        grads = [torch.autograd.grad(x.sum(), leaf)[0] for x, leaf in ((logprobs, logits), (exact, exact_leaf))]
        assert max_error(*grads) <= tolerance, softcap


def test_empty_sequences_between_others(implementation: str, device: torch.device) -> None:
    """Packed, shifted: the label of a position never comes from the next sequence, empty ones around or not."""
    logits = torch.randn(5, 7, device=device)
    ids = torch.tensor([1, 2, 3, 4, 5], device=device)
    cu_seqlens = torch.tensor([0, 0, 2, 2, 5, 5], dtype=torch.int32)
    logprobs = token_logprobs(logits, ids, cu_seqlens=cu_seqlens, shift=True, implementation=implementation)
    full = logits.log_softmax(-1)
    expected = torch.tensor([full[0, 2], 0, full[2, 4], full[3, 5], 0])
    assert max_error(logprobs, expected.double()) <= 1e-6
    scores = sequence_scores(logprobs, ids, cu_seqlens=cu_seqlens, shift=True, implementation=implementation)
    assert scores.isnan().tolist() == [True, False, True, False, True]


@pytest.mark.slow
def test_more_than_2_31_logits(implementation: str, device: torch.device) -> None:
    """The last rows lie past what 32 bits reach; only they are read, so only they cost memory."""
    torch.utils.deterministic.fill_uninitialized_memory = False
    vocab_size, num_tokens = 151_936, 14_200
    assert vocab_size * num_tokens > 2**31
    logits = torch.empty(1, num_tokens, vocab_size, dtype=torch.bfloat16, device=device)
    logits[0, -2:] = torch.randn(2, vocab_size)
    labels = torch.full((1, num_tokens), -100, device=device)
    labels[0, -2:] = torch.tensor([3, vocab_size - 1])
    logprobs = token_logprobs(logits, labels, implementation=implementation)
    exact = logits[0, -2:].double().log_softmax(-1).gather(-1, labels[0, -2:, None])[:, 0]
    assert max_error(logprobs[0, -2:], exact) <= 1e-5
    assert not logprobs[0, :-2].any()
