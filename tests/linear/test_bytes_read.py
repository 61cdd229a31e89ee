"""What known weights read: rows of weight zero only where somebody asks for their scores."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import conspo_kernels as ck
from benchmarks.simulation.simulated_gpu import simulated

ROLLOUTS, LENGTH, VOCAB = 8, 4, 1000
AS: dict[str, Any] = {"implementation": "triton"}
LABELS = torch.arange(ROLLOUTS * LENGTH).view(ROLLOUTS, LENGTH) * 7
ALL = torch.tensor([0.5, -0.5, 0.25, -0.25] * 2)
HALF = torch.tensor([0.5, -0.5, 0, 0, 0, 0, 0.25, -0.25])


def of_tokens(logits: Tensor, labels: Tensor, weights: Tensor, **options: Any) -> Tensor:
    coefficients = (weights[:, None] / LENGTH).expand(ROLLOUTS, LENGTH)
    return ck.weighted_logprob_loss(logits, labels, coefficients, **options)


CALLS: dict[str, Callable[..., Any]] = {
    "scores": ck.weighted_score_loss,
    "scores, packed": lambda logits, labels, weights, **options: ck.weighted_score_loss(
        logits.flatten(0, 1), labels.flatten(), weights,
        cu_seqlens=torch.arange(ROLLOUTS + 1, device=labels.device) * LENGTH, **options,
    ),
    "log-probabilities": of_tokens,
}  # fmt: skip


def read(call: Callable[..., Any], weights: Tensor, **options: Any) -> tuple[int, Tensor, Tensor]:
    """Bytes that kernels load, forward and backward; the value, and the gradient."""
    with simulated() as memory:
        generator = torch.Generator().manual_seed(0)
        logits = torch.randn(ROLLOUTS, LENGTH, VOCAB, generator=generator).bfloat16().to("cuda").requires_grad_()
        result = call(logits, LABELS.to("cuda"), weights.to("cuda"), **AS, **options)
        value = result if isinstance(result, Tensor) else result.loss
        value.backward()
        return memory.bytes_read, value.detach(), logits.grad  # type: ignore[return-value]


@pytest.mark.parametrize("name", CALLS)
def test_half_of_the_weights_zero(name: str) -> None:
    whole, _, _ = read(CALLS[name], ALL)
    half, value, grad = read(CALLS[name], HALF)
    assert whole >= 2 * ROLLOUTS * LENGTH * VOCAB * 2  # rows are looked at twice
    assert half <= 0.51 * whole  # numbers of tokens are read for all
    assert value.isfinite()
    used = (HALF != 0).nonzero()[:, 0]
    assert grad[HALF == 0].abs().max() == 0
    assert grad[used].abs().amax((1, 2)).min() > 0


def test_the_second_look_begins_where_the_first_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row of three tiles and a part of one: what was read last is read again first, from the L1."""
    from triton.runtime.interpreter import InterpreterBuilder

    load, starts = InterpreterBuilder.create_masked_load, []

    def recorded(self: Any, pointers: Any, mask: Any, *args: Any) -> Any:
        if pointers.data.ndim == 2 and pointers.data.shape[0] > 16:
            starts.append(int(pointers.data.min()))
        return load(self, pointers, mask, *args)

    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", recorded)
    with simulated():
        logits = torch.randn(1, 1, 110_000).bfloat16().to("cuda").requires_grad_()
        label = torch.tensor([[7]], device="cuda")
        ck.weighted_score_loss(logits, label, torch.ones(1, device="cuda"), **AS)  # type: ignore[call-overload]
    assert len(starts) == 8
    assert starts[:4] == sorted(starts)[::2]
    assert starts[4:] == starts[3::-1]


@pytest.mark.parametrize("options", [{"return_metrics": True}, {"scores": torch.zeros(ROLLOUTS)}], ids=str)
def test_scores_that_are_asked_for_are_read(options: dict[str, Any]) -> None:
    options = {name: x.to("cpu") if isinstance(x, Tensor) else x for name, x in options.items()}
    whole, _, _ = read(CALLS["scores"], ALL, **options)
    half, value, _ = read(CALLS["scores"], HALF, **options)
    assert half > 0.6 * whole
    assert torch.equal(value, read(CALLS["scores"], HALF)[1])


@pytest.mark.parametrize("implementation", ["native", "torch"])
@pytest.mark.parametrize("inplace", [False, True])
def test_the_gradient_of_what_is_not_read_is_zero(inplace: bool, implementation: str) -> None:
    """Also where it is written over the logits."""
    leaf = torch.randn(ROLLOUTS, LENGTH, VOCAB).requires_grad_()
    logits = leaf * 1
    ck.weighted_score_loss(logits, LABELS, HALF, inplace=inplace, implementation=implementation).backward()  # type: ignore[call-overload]
    assert leaf.grad is not None
    assert leaf.grad[HALF == 0].abs().max() == 0
    assert leaf.grad[HALF != 0].abs().amax((1, 2)).min() > 0
