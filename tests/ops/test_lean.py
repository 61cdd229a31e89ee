"""Kernels that save launches and bytes, against PyTorch: labels, known coefficients, groups, scaling; and precision."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import conspo_kernels as ck
from conspo_kernels.backends import eager, triton
from conspo_kernels.linear.tiling import Problem, workspace_of
from conspo_kernels.objective import Groups, Objective, Rollouts
from conspo_kernels.values import IGNORED, LogitRows, LogitTransform, Statistics

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("mask", [None, torch.bool, torch.uint8, torch.float32, torch.float8_e5m2], ids=str)
@pytest.mark.parametrize("offsets", [None, [0, 3, 3, 9], [2, 5, 12], [0], [0, 17]], ids=str)
def test_labels(shift: bool, mask: torch.dtype | None, offsets: list[int] | None) -> None:
    from conspo_kernels.backends.triton import label_alignment

    for dtype, absent in ((torch.int64, -100), (torch.uint8, -100), (torch.int32, 3)):
        labels = torch.randint(0, 5, (1 if offsets else 3, 17), device=DEVICE).to(dtype)
        if dtype != torch.uint8:
            labels[:, ::4], labels[:, 5] = absent, -7
        response_mask = None if mask is None else (torch.rand(labels.shape, device=DEVICE) < 0.6).to(mask)
        cut = None if offsets is None else torch.tensor(offsets, dtype=torch.int32, device=DEVICE)
        for given in (labels, labels.t().contiguous().t(), labels[:, 1:]):
            entries = None if response_mask is None else response_mask[:, -given.shape[1] :]
            arguments = (given, entries, cut, shift, absent)
            assert torch.equal(label_alignment.align(*arguments), eager.align(*arguments))


@pytest.mark.parametrize("vocab_size", [37, 9001])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("where", ["new", "in place", "view", "view in place", "three launches"])
def test_known_coefficients(
    vocab_size: int, softcap: float | None, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of one program, with edges, ignored ones and ones without a coefficient."""
    from conspo_kernels.backends.triton import token_logprob

    if where == "three launches":
        monkeypatch.setattr(token_logprob, "row_fits_cache", lambda _: False)
    logits = torch.randn(2, 3, vocab_size, device=DEVICE)
    if "view" in where:
        logits = torch.randn(2, 4, vocab_size + 5, device=DEVICE)[:, :-1, 3:-2]
    labels = torch.randint(vocab_size, (2, 3), device=DEVICE)
    labels[0, 1], coefficients = IGNORED, torch.randn(2, 3, device=DEVICE)
    coefficients[1, 1] = 0
    rows = LogitRows(logits, labels, LogitTransform(0.7, 1.3, softcap))
    expected_grad = torch.empty_like(logits)
    expected = eager.token_logprob_forward_backward(expected_grad, rows, coefficients)
    grad = logits if "in place" in where else torch.empty(2, 3, vocab_size, device=DEVICE)
    result = token_logprob.forward_backward(grad, rows, coefficients)
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-4, atol=1e-6)


def test_slices_of_the_vocabulary_and_narrow_gradients() -> None:
    """A tile of columns knows where it begins; of fp32 logits the gradient may be in bf16."""
    logits = torch.randn(1, 5, 300, device=DEVICE)
    labels = torch.tensor([[0, 150, 299, IGNORED, 130]], device=DEVICE)
    rows = LogitRows(logits, labels, LogitTransform())
    statistics = eager.token_logprob_forward(rows, True)
    incoming = statistics.incoming(torch.randn(1, 5, device=DEVICE), torch.randn(1, 5, device=DEVICE))
    whole = torch.empty_like(logits)
    eager.token_logprob_backward(whole, rows, incoming)
    for backend, dtype in itertools.product((triton, eager), (torch.float32, torch.bfloat16)):
        for columns in (slice(0, 128), slice(128, 299), slice(299, 300)):
            tile = logits[..., columns].contiguous()
            grad = torch.empty_like(tile, dtype=dtype)
            backend.token_logprob_backward(grad, LogitRows(tile, labels, LogitTransform(), columns.start), incoming)
            atol = 1e-6 if dtype == torch.float32 else 2e-2  # the interpreter truncates
            torch.testing.assert_close(grad.float(), whole[..., columns], rtol=2e-2, atol=atol)
    into = Statistics(*torch.empty(4, 1, 5, device=DEVICE))
    assert triton.token_logprob_forward(rows, True, into) is into
    torch.testing.assert_close(torch.stack(list(into)), torch.stack(list(statistics)), rtol=1e-5, atol=1e-5)  # type: ignore[arg-type]


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("on_device", [False, True], ids=["numbers", "pointers"])
def test_many_groups(reduction: str, ragged: bool, on_device: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two launches give what one does, and both what PyTorch gives; margin and denominator known to the host or not."""
    from conspo_kernels.backends.triton import group_infonce

    if on_device:
        monkeypatch.setattr(group_infonce, "_pointer_or_number", lambda x: (x, 0.0))
    number, size = 120, 3
    scores = torch.randn(number, device=DEVICE)
    rewards = torch.randint(0, 2, (number,), device=DEVICE).float()
    rewards[5] = torch.nan
    counts = torch.arange(number, device=DEVICE).remainder(7).int()  # a rollout in seven has no response token
    groups = Groups(size)
    if ragged:
        ids = torch.empty(number, dtype=torch.int64)
        ids[torch.randperm(number)] = torch.arange(number) // size
        groups = Groups.of_ids(ids.to(DEVICE))
    for denominator in (None, 7.0):
        if denominator is not None and reduction != "mean":
            continue
        objective = Objective(
            0.5, torch.tensor(0.2, device=DEVICE), 0.5, reduction,
            None if denominator is None else torch.tensor(denominator, device=DEVICE),
        )  # fmt: skip
        rollouts = Rollouts(rewards, groups)
        expected = eager.infonce(scores, counts, rollouts, objective)
        results = []
        for few in (1024, 16):
            monkeypatch.setattr(group_infonce, "FEW", few)
            results.append(group_infonce.infonce(scores, counts, rollouts, objective))
            (loss, weights), (expected_loss, expected_weights) = results[-1], expected
            torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(weights, expected_weights, rtol=1e-5, atol=1e-7)
        assert torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize("offsets", [None, [0, 3, 3, 9], [2, 5, 12]], ids=str)
def test_coefficients(offsets: list[int] | None) -> None:
    labels = torch.randint(IGNORED, 3, (1 if offsets else 3, 13), device=DEVICE)
    cut = None if offsets is None else torch.tensor(offsets, device=DEVICE)
    labels[:, : 0 if offsets is None else offsets[0]] = IGNORED  # as aligned labels are
    weights = torch.tensor([0.5, 0.0, -2.0], device=DEVICE)[: 3 if offsets is None else len(offsets) - 1]
    result, expected = (x.token_coefficients(weights, labels, cut) for x in (triton, eager))
    for ours, other in zip(result, expected, strict=True):
        torch.testing.assert_close(ours, other)
    factor = torch.tensor(torch.inf, device=DEVICE)
    graded = [x.sequence_score_backward(weights, expected[1], labels, cut, factor) for x in (triton, eager)]
    assert torch.equal(*graded)
    assert not graded[0].isnan().any()  # a weight of zero takes no part
    values = torch.where(labels == IGNORED, torch.nan, 1.5)
    masked = [x.masked_coefficients(values, labels) for x in (triton, eager)]
    for ours, other in zip(*masked, strict=True):
        assert torch.equal(ours, other)
    logprobs = torch.where(masked[0][0] == 0, -torch.inf, -1.0)
    sums = [x.weighted_sum(logprobs, masked[0][0], None) for x in (triton, eager)]
    torch.testing.assert_close(*sums)


def test_tokens_that_take_part_are_gathered_and_put_back() -> None:
    from conspo_kernels.linear.tiles import RowSelection

    for total, places in ((9, [0, 3, 8]), (2000, list(range(1, 2000, 3))), (5, []), (4, [3])):
        where = torch.tensor(places, dtype=torch.int64, device=DEVICE)
        hidden = torch.randn(total, 3, device=DEVICE)
        tensors = [torch.randn(total, device=DEVICE), torch.arange(total, device=DEVICE)]
        tokens = RowSelection(hidden, tensors[1][places], where)
        for x, gathered in zip((hidden, *tensors), (tokens.hidden_rows(), *map(tokens.gather, tensors)), strict=True):
            assert torch.equal(gathered, x[places])
            expected = torch.zeros_like(x)
            expected[places] = x[places]
            assert torch.equal(tokens.scatter(gathered), expected)


@pytest.mark.parametrize("layout", ["contiguous", "rows", "columns", "empty"])
def test_scaling(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over its own elements alone, by a grid that does not grow with it."""
    from conspo_kernels.backends.triton import scale
    from conspo_kernels.ops.weighted_sum import add_scaled_

    monkeypatch.setattr(scale, "MULTIPROCESSORS", 1)
    monkeypatch.setattr(scale, "PROGRAMS", 2)
    monkeypatch.setattr(scale, "BLOCK", 16)
    scale.num_programs.cache_clear()
    whole = torch.randn(3, 5, 70, device=DEVICE)
    pick = {
        "contiguous": lambda x: x, "rows": lambda x: x[:, 1:4, 3:], "columns": lambda x: x.mT, "empty": lambda x: x[:0]
    }[layout]  # fmt: skip
    expected = whole.clone()
    pick(expected).mul_(-2.5)
    for factor in (1.0, -2.5):
        scale.scale_(pick(whole), torch.tensor(factor, device=DEVICE))
    assert torch.equal(whole, expected)
    target = torch.randn(3, 5, 70, device=DEVICE)
    total = target + 0.5 * whole
    add_scaled_(target, whole, torch.tensor(0.5, device=DEVICE))
    torch.testing.assert_close(target, total)
    scale.num_programs.cache_clear()


def test_the_grid_of_scaling_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A gradient of 4,096 x 151,936 that is not multiplied starts a few programs per multiprocessor."""
    from launches import DEVICE as META
    from triton.runtime.interpreter import GridExecutor

    from conspo_kernels.backends.triton import scale

    grids: list[tuple[int, ...]] = []
    monkeypatch.setattr(GridExecutor, "__call__", lambda self, *_, **__: grids.append(self.grid))
    for gradient in (torch.empty(4096, 151_936, device=META), torch.empty(1, 4097, 151_936, device=META)[:, 1:]):
        scale.scale_(gradient, torch.empty((), device=META))
    assert grids == [(scale.MULTIPROCESSORS * scale.PROGRAMS,)] * 2


def test_bytes_of_known_weights() -> None:
    """At the default workspace of an H100 (79.2 GiB) they take at most 8 % of the GEMMs' time, by the model."""
    from benchmarks.costs import GEMMS, gemm_operations, moved_bytes

    problem, bandwidth, flops = Problem(8192, 151_936, 4096, 2), 3.0e12, 798e12
    share = {
        workspace: moved_bytes(problem, "known", workspace).total / bandwidth
        / (gemm_operations(problem, "known") / flops)
        for workspace in (2**29, workspace_of(int(79.2 * 2**30)))
    }  # fmt: skip
    before, now = share.values()
    assert now <= 0.08 < 0.25 < before
    gathered = moved_bytes(problem._replace(gathered=True), "known", workspace_of(int(79.2 * 2**30)))
    assert gathered.total / bandwidth <= 0.08 * gemm_operations(problem, "known") / flops
    # By hand: two looks at bf16 logits and one write; dW of five tiles of rows in fp32, written and read five times.
    assert moved_bytes(problem, "known", 2**29).logits == 3 * 2 * 8192 * 151_936
    assert moved_bytes(problem, "known", 2**29).sums == 10 * 4 * 151_936 * 4096
    assert set(GEMMS) == {"none", "recompute", "store", "frozen", "known"}


@pytest.mark.parametrize("factor", [1.0, 0.5])
@pytest.mark.parametrize("mib", [512, 0.01])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_weight_grad_in_phase_two(factor: float, mib: float, dtype: torch.dtype) -> None:
    """Micro-batches add to the buffer what comes in times their gradient, unrounded; weight itself gets none."""
    hidden = [torch.randn(2, 4, 8).to(dtype).requires_grad_() for _ in range(2)]
    weight, labels = torch.randn(50, 8).to(dtype).requires_grad_(), torch.randint(50, (2, 4))
    weights = torch.tensor([0.3, -0.7])
    buffer = torch.zeros(50, 8)
    options = {"workspace_mib": mib, "weight_grad": buffer}
    losses = [ck.linear_weighted_score_loss(x, weight, labels, weights, **options) for x in hidden]  # type: ignore[call-overload]
    coefficients = (weights[:, None] / 4).expand(2, 4)
    losses.append(ck.linear_weighted_logprob_loss(hidden[0], weight, labels, coefficients, **options))  # type: ignore[arg-type]
    assert not buffer.any()
    for loss in losses:
        (factor * loss).backward()
    assert weight.grad is None
    assert hidden[0].grad is not None
    exact_weight = weight.detach().double().requires_grad_()
    for x in (*hidden, hidden[0]):
        logprobs = ck.token_logprobs(x.detach().double() @ exact_weight.T, labels)
        (factor * (logprobs.mean(1) * weights).sum()).backward()  # type: ignore[union-attr]
    error = (buffer - exact_weight.grad).abs().max()  # type: ignore[operator]
    assert error <= (1e-6 if dtype == torch.float32 else 1e-2) * factor  # of bf16 logits
    before = buffer.clone()
    with torch.no_grad():
        ck.linear_weighted_score_loss(hidden[0], weight, labels, weights, **options)  # type: ignore[call-overload]
    assert torch.equal(buffer, before)


@pytest.mark.parametrize("mib", [512, 1e-3])
@pytest.mark.parametrize("known", [False, True])
def test_weight_grad_is_not_rounded(known: bool, mib: float) -> None:
    """Logits and their gradients are in bf16; what is summed of them is nowhere rounded to it."""
    hidden, labels = torch.randn(1, 64, 16).bfloat16(), torch.randint(50, (1, 64))
    weight, buffer = torch.randn(50, 16).bfloat16().requires_grad_(), torch.zeros(50, 16)
    options: Any = {"workspace_mib": mib, "implementation": "torch", "logits_dtype": torch.float32}
    if known:
        loss = ck.linear_weighted_logprob_loss(hidden, weight, labels, torch.ones(1, 64), weight_grad=buffer, **options)
    else:
        loss = ck.linear_token_logprobs(hidden, weight, labels, weight_grad=buffer, **options).sum()  # type: ignore[union-attr]
    loss.backward()
    z = torch.nn.functional.linear(hidden[0].float(), weight.detach().float())
    dz = torch.nn.functional.one_hot(labels[0], 50) - z.softmax(-1)
    expected = dz.bfloat16().double().T @ hidden[0].double()
    # A gradient that is rounded the other way is off by a bf16 digit; most are not.
    torch.testing.assert_close(buffer.double(), expected, rtol=0, atol=1e-2)
    assert (buffer.bfloat16() != buffer).float().mean() > 0.9
    assert (buffer - expected).abs().median() <= 1e-6


def test_fp64_stays_under_autocast_beside_a_head_in_fp32() -> None:
    hidden, weight = torch.randn(1, 2, 4).double(), torch.randn(9, 4)
    labels = torch.zeros(1, 2, dtype=torch.int64)
    with torch.autocast("cpu", torch.bfloat16):
        ck.linear_token_logprobs(hidden.float(), weight.bfloat16(), labels)
        with pytest.raises(ValueError, match=r"weight must have the dtype of hidden, torch.float64, got torch.float32"):
            ck.linear_token_logprobs(hidden, weight, labels)


def test_autocast_with_and_without_a_graph() -> None:
    """Scores without a graph and two losses in one context: the gradient of the fp32 head is whole."""
    hidden, labels = torch.randn(2, 4, 8, requires_grad=True), torch.randint(50, (2, 4))
    weight, weights = torch.randn(50, 8, requires_grad=True), torch.tensor([0.3, -0.7])
    with torch.autocast("cpu", torch.bfloat16):
        ck.linear_conspo_scores(hidden, weight, labels)
        for _ in range(2):
            ck.linear_weighted_score_loss(hidden, weight, labels, weights).backward()  # type: ignore[union-attr]
        assert torch.nn.functional.linear(hidden, weight).dtype == torch.bfloat16
    assert weight.grad is not None
    result, weight.grad = weight.grad, None
    scores = ck.token_logprobs(hidden @ weight.T, labels).mean(1)  # type: ignore[union-attr]
    (2 * (scores * weights).sum()).backward()
    torch.testing.assert_close(result, weight.grad, rtol=5e-2, atol=5e-3)


@pytest.mark.parametrize("mode", ["recompute", "store", "known", "frozen"])
def test_fp32_logits(mode: str) -> None:
    """Log-probabilities of bf16 operands as fp64 has them, to 1e-5; gradients no worse than with bf16 logits."""
    num_tokens, hidden_size, vocab_size = 96, 64, 1000
    hidden = torch.randn(num_tokens, hidden_size).bfloat16().requires_grad_()
    weight = (torch.randn(vocab_size, hidden_size) / 2).bfloat16().requires_grad_(mode != "frozen")
    labels, coefficients = torch.randint(vocab_size, (num_tokens,)), torch.rand(num_tokens) + 0.5
    exact_hidden, exact_weight = (x.detach().double().requires_grad_() for x in (hidden, weight))
    exact = (exact_hidden @ exact_weight.T).log_softmax(-1).gather(-1, labels[:, None])[:, 0]
    leaves = [x for x in (hidden, weight) if x.requires_grad]
    expected = torch.autograd.grad((exact * coefficients).sum(), (exact_hidden, exact_weight))[: len(leaves)]
    errors: dict[torch.dtype | None, list[Tensor]] = {}
    for dtype in (torch.float32, None):
        options = {"logits_dtype": dtype, "workspace_mib": 2 if mode == "store" else 0.1}
        logprobs = ck.linear_token_logprobs(hidden, weight, labels, **options)  # type: ignore[call-overload]
        if dtype is not None:
            assert (logprobs - exact).abs().max() <= 1e-5
        loss = (logprobs * coefficients).sum()
        if mode == "known":
            loss = ck.linear_weighted_logprob_loss(hidden, weight, labels, coefficients, **options)
        result = torch.autograd.grad(loss, leaves)
        errors[dtype] = [(ours.double() - true).norm() for ours, true in zip(result, expected, strict=True)]
    for wide, narrow in zip(errors[torch.float32], errors[None], strict=True):
        assert wide <= 1.02 * narrow


def test_stored_logits_are_not_cloned_under_compile() -> None:
    """Traced, their gradient is written beside them: one pass of reading and one of writing, as in place."""
    torch._dynamo.reset()
    hidden, weight = torch.randn(2, 4, 8, requires_grad=True), torch.randn(50, 8, requires_grad=True)
    labels, rewards = torch.randint(50, (2, 4)), torch.tensor([1.0, 0.0])
    graphs: list[str] = []

    def backend(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        graphs.append(graph.code)
        return graph

    def step(hidden: Tensor, weight: Tensor) -> Tensor:
        return ck.linear_conspo_loss(hidden, weight, labels, rewards, 2)  # type: ignore[return-value]

    from torch._dynamo.backends.common import aot_autograd

    compiled = torch.compile(step, fullgraph=True, backend=aot_autograd(fw_compiler=backend))
    grads = [torch.autograd.grad(f(hidden, weight), (hidden, weight)) for f in (step, compiled)]
    torch.testing.assert_close(*grads)
    assert any("linear_logprob_backward" in code for code in graphs)
    assert not any("clone" in code for code in graphs)


def test_the_page_of_costs() -> None:
    """It is what the command prints; an H100's known weights by hand."""
    from benchmarks.costs import cost, page

    path = Path(__file__).resolve().parents[2] / "docs" / "costs.md"
    assert path.read_text(encoding="utf-8") == page()
    result = cost(Problem(8192, 151_936, 4096, 2), "known", workspace_of(int(79.2 * 2**30)), "H100")
    assert result.gemms == pytest.approx(6 * 8192 * 4096 * 151_936 / 798e12)
    assert result.moved == pytest.approx(2 * 2 * 8192 * 151_936 / 3.0e12)  # one look from memory, one write
    assert result.share <= 0.08
