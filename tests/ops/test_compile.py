"""torch.compile takes every public function whole, and neither lengths, rollouts nor margins make it compile anew."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import conspo_kernels as ck

VOCAB = 997  # prime: who loops over it has a bound that it divides
TILES = {"workspace_mib": 2.0**-12}  # 256 bytes: fewer than three rows


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> None:
    torch._dynamo.reset()


def batch(num_rollouts: int, length: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    hidden = torch.randn(num_rollouts, length, 6, device=device)
    labels = torch.randint(0, 17, (num_rollouts, length), device=device)
    rewards = torch.arange(num_rollouts, device=device) % 2
    return hidden, labels, rewards, torch.randint(0, 3, (num_rollouts,), device=device)


FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "conspo_loss": lambda z, y, r, g, i: ck.conspo_loss(z, y, r, 2, implementation=i),
    "ids, shift, mask, metrics": lambda z, y, r, g, i: ck.conspo_loss(
        z, y, r, g, shift=True, response_mask=y > 3, return_metrics=True, implementation=i
    ).loss,
    "none": lambda z, y, r, g, i: ck.conspo_loss(z, y, r, g, reduction="none", num_groups=None, implementation=i),
    "in place": lambda z, y, r, g, i: ck.conspo_loss(z, y, r, 2, inplace_backward=True, implementation=i),
    "packed": lambda z, y, r, g, i: ck.conspo_loss(
        z.flatten(0, 1), y.flatten(), r, 2, shift=True, implementation=i,
        cu_seqlens=torch.arange(len(r) + 1) * z.shape[1],
    ),
    "labels by columns": lambda z, y, r, g, i: ck.conspo_loss(z, y.T.contiguous().T, r, 2, implementation=i),
    "token_logprobs": lambda z, y, r, g, i: torch.stack(
        ck.token_logprobs(z, y, temperature=0.7, softcap=3.0, return_entropy=True, implementation=i)
    ),
    "sequence_scores": lambda z, y, r, g, i: ck.sequence_scores(z[..., 0], y, implementation=i),
    "conspo_scores": lambda z, y, r, g, i: ck.conspo_scores(z, y, implementation=i) + z.sum() * 0,
    "conspo_loss_from_scores": lambda z, y, r, g, i: ck.conspo_loss_from_scores(z.sum((1, 2)), r, g, implementation=i),
    "ConSPOLoss": lambda z, y, r, g, i: ck.ConSPOLoss(tau=0.5, num_groups=3, implementation=i)(z, y, r, 2),
    "weighted_score_loss": lambda z, y, r, g, i: ck.weighted_score_loss(z, y, r - 0.5, implementation=i),
    "in place, known": lambda z, y, r, g, i: ck.weighted_score_loss(z, y, r - 0.5, inplace=True, implementation=i),
    "conspo_weights": lambda z, y, r, g, i: ck.conspo_weights(z[:, 0, 0], r, g, implementation=i).loss + z.sum() * 0,
}  # fmt: skip
LINEAR_FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "linear_token_logprobs, stored": lambda x, w, y, r, g, i: ck.linear_token_logprobs(x, w, y, implementation=i),
    "linear_token_logprobs, tiles": lambda x, w, y, r, g, i: torch.stack(
        ck.linear_token_logprobs(x, w, y, return_entropy=True, implementation=i, **TILES)
    ),
    "linear_conspo_loss": lambda x, w, y, r, g, i: ck.linear_conspo_loss(
        x, w, y, r, g, shift=True, response_mask=y > 3, return_metrics=True, implementation=i
    ).loss,
    "frozen": lambda x, w, y, r, g, i: ck.linear_conspo_loss(x, w.detach(), y, r, 2, implementation=i) + w.sum() * 0,
    "packed": lambda x, w, y, r, g, i: ck.linear_conspo_loss(
        x.flatten(0, 1), w, y.flatten(), r, 2, shift=True, implementation=i,
        cu_seqlens=torch.arange(len(r) + 1) * x.shape[1], **TILES,
    ),
    "linear_conspo_scores": lambda x, w, y, r, g, i: (
        ck.linear_conspo_scores(x, w, y, implementation=i) + (x.sum() + w.sum()) * 0
    ),
    "linear_weighted_score_loss": lambda x, w, y, r, g, i: ck.linear_weighted_score_loss(
        x, w, y, r - 0.5, implementation=i, **TILES
    ),
}  # fmt: skip


@pytest.mark.parametrize("function", FUNCTIONS)
def test_fullgraph(function: str, implementation: str, device: torch.device) -> None:
    hidden, labels, rewards, ids = batch(4, 5, device)
    weight = torch.randn(6, 17, device=device, requires_grad=True)

    def step(hidden: Tensor, weight: Tensor, labels: Tensor, rewards: Tensor, ids: Tensor) -> Tensor:
        return FUNCTIONS[function](hidden @ weight, labels, rewards, ids, implementation)

    results = []
    for run in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        loss = run(hidden, weight, labels, rewards, ids)
        (grad,) = torch.autograd.grad(loss.sum(), weight)
        results.append((loss, grad))
    torch.testing.assert_close(results[0], results[1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("function", LINEAR_FUNCTIONS)
def test_fullgraph_of_linear_functions(function: str, implementation: str, device: torch.device) -> None:
    hidden, labels, rewards, ids = batch(4, 5, device)
    hidden.requires_grad_()
    weight = torch.randn(17, 6, device=device, requires_grad=True)

    def step(hidden: Tensor, weight: Tensor, labels: Tensor, rewards: Tensor, ids: Tensor) -> Tensor:
        return LINEAR_FUNCTIONS[function](hidden * 1, weight * 1, labels, rewards, ids, implementation)

    results = []
    for run in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        loss = run(hidden, weight, labels, rewards, ids)
        results.append((loss, *torch.autograd.grad(loss.sum(), (hidden, weight))))
    torch.testing.assert_close(results[0], results[1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("share", [1.0, 2.0**-20], ids=["stored", "tiles"])
def test_linear_inductor(share: float, implementation: str, device: torch.device) -> None:
    hidden, labels, rewards, _ids = batch(4, 5, device)
    hidden.requires_grad_()
    weight = torch.randn(17, 6, device=device, requires_grad=True)

    def step(hidden: Tensor, weight: Tensor, labels: Tensor, rewards: Tensor) -> Tensor:
        return ck.linear_conspo_loss(
            hidden, weight, labels, rewards, 2, workspace_mib=512 * share, implementation=implementation
        )

    grads = [
        torch.autograd.grad(function(hidden, weight, labels, rewards), (hidden, weight))
        for function in (step, torch.compile(step, fullgraph=True))
    ]
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("inplace", [False, True])
def test_inductor(inplace: bool, implementation: str, device: torch.device) -> None:
    hidden, labels, rewards, _ids = batch(4, 5, device)
    weight = torch.randn(6, 17, device=device, requires_grad=True)

    def step(hidden: Tensor, weight: Tensor, labels: Tensor, rewards: Tensor) -> Tensor:
        return ck.conspo_loss(
            hidden @ weight, labels, rewards, 2, inplace_backward=inplace, implementation=implementation
        )

    grads = [
        torch.autograd.grad(function(hidden, weight, labels, rewards), weight)[0]
        for function in (step, torch.compile(step, fullgraph=True))
    ]
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-5, atol=1e-6)


# Loops over the vocabulary in what inductor generates: none over logits, none over the head's gradient. Known gradients
# of a head are multiplied once by what comes in.
PASSES: dict[str, tuple[int, Callable[..., Tensor]]] = {
    "conspo_loss": (0, lambda x, w, y, r: ck.conspo_loss(x @ w.t(), y, r, 2)),
    "in place": (0, lambda x, w, y, r: ck.conspo_loss(x @ w.t(), y, r, 2, inplace_backward=True)),
    "weighted_score_loss": (0, lambda x, w, y, r: ck.weighted_score_loss(x @ w.t(), y, r - 0.5)),
    "weighted_score_loss in place": (0, lambda x, w, y, r: ck.weighted_score_loss(x @ w.t(), y, r - 0.5, inplace=True)),
    "weighted_logprob_loss in place": (
        0, lambda x, w, y, r: ck.weighted_logprob_loss(x @ w.t(), y, (r[:, None] - 0.5).expand(4, 5), inplace=True)
    ),
    "linear_conspo_loss, stored": (0, lambda x, w, y, r: ck.linear_conspo_loss(x, w, y, r, 2)),
    "linear_conspo_loss, tiles": (0, lambda x, w, y, r: ck.linear_conspo_loss(x, w, y, r, 2, workspace_mib=2.0**-6)),
    "linear_conspo_loss, frozen": (0, lambda x, w, y, r: ck.linear_conspo_loss(x, w.detach(), y, r, 2)),
    "linear_weighted_score_loss": (1, lambda x, w, y, r: ck.linear_weighted_score_loss(x, w, y, r - 0.5)),
}  # fmt: skip


@pytest.mark.parametrize("function", PASSES)
def test_inductor_makes_no_pass_over_the_vocabulary(function: str) -> None:
    """It copies a saved tensor that backward overwrites, as it cannot prove it to be its own."""
    from torch._inductor.utils import run_and_get_code

    expected, step = PASSES[function]
    hidden, weight = torch.randn(4, 5, 13, requires_grad=True), torch.randn(VOCAB, 13, requires_grad=True)
    labels, rewards = torch.randint(VOCAB, (4, 5)), torch.tensor([1.0, 0.0, 0.0, 1.0])
    compiled = torch.compile(step, fullgraph=True)
    grads, codes = run_and_get_code(lambda: gradients(compiled, hidden, weight, labels, rewards))
    torch.testing.assert_close(grads, gradients(step, hidden, weight, labels, rewards), rtol=1e-5, atol=1e-6)
    assert len(codes) == 2  # forward and backward
    assert not re.search(r"conspo\.\w+_\.default", codes[1])  # an op that overwrites
    kernels = [kernel for code in codes for kernel in re.findall(r"cpp_pybinding\(.*?'''(.*?)'''", code, re.DOTALL)]
    bounds = [int(it) for kernel in kernels for it in re.findall(r"<static_cast<int64_t>\((\d+)L\)", kernel)]
    assert sum(it % VOCAB == 0 for it in bounds) == expected, kernels


def gradients(step: Callable[..., Tensor], *tensors: Tensor) -> tuple[Tensor | None, ...]:
    inputs = [x for x in tensors if x.requires_grad]
    return torch.autograd.grad(step(*tensors), inputs, allow_unused=True)


def test_schedules_of_the_other_numbers_compile(implementation: str, device: torch.device) -> None:
    """tau and the threshold are settings: another value may compile anew, but must compile."""
    scores, rewards = torch.randn(4, device=device), torch.tensor([1.0, 0.0, 0.0, 1.0], device=device)

    def step(scores: Tensor, value: float) -> Tensor:
        return ck.conspo_loss_from_scores(
            scores, rewards, 2, tau=value, reward_threshold=value / 4, implementation=implementation
        )

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for value in (1.0, 0.9, 0.8):
        torch.testing.assert_close(compiled(scores, value), step(scores, value))


@pytest.fixture
def _rows_unread(monkeypatch: pytest.MonkeyPatch) -> None:
    """For who looks at what is compiled, not at values: the interpreter, slow on logits, leaves them alone."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        return
    from triton.runtime.interpreter import GridExecutor

    launch = GridExecutor.__call__

    def launch_others(self: Any, *arguments: Any, **options: Any) -> None:
        if self.fn.__name__ not in ("_statistics_kernel", "_combine_kernel", "_backward_kernel"):
            launch(self, *arguments, **options)

    monkeypatch.setattr(GridExecutor, "__call__", launch_others)


@pytest.mark.usefixtures("_rows_unread")
@pytest.mark.parametrize("as_tensor", [False, True], ids=["float margin", "tensor margin"])
def test_steps_that_differ_recompile_nothing(as_tensor: bool, implementation: str, device: torch.device) -> None:
    """Lengths, rollouts and margins of 20 steps; the first few teach dynamo which sizes change."""
    counter = CompileCounterWithBackend("aot_eager")
    schedule = ck.CosineMargin(20, 0.5, 0.9)
    weight = torch.randn(6, 17, device=device, requires_grad=True)

    @torch.compile(fullgraph=True, backend=counter)
    def step(hidden: Tensor, labels: Tensor, rewards: Tensor, ids: Tensor, margin: float | Tensor) -> Tensor:
        return ck.conspo_loss(hidden @ weight, labels, rewards, ids, margin=margin, implementation=implementation)

    frames = []
    for i in range(20):
        margin = schedule(i + 1)
        hidden, labels, rewards, ids = batch(2 + i // 4, 3 + i, device)
        step(hidden, labels, rewards, ids, torch.tensor(margin) if as_tensor else margin).backward()
        frames.append(counter.frame_count)
    assert frames[4] == frames[-1], frames  # by then all have changed once
