"""The fused-linear path against the logits path: every mode, every implementation, both layouts; and its tiles."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from cases import CASES, Case, Inputs, build
from tolerance import max_error
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from conspo_kernels import (
    ConSPOOutput,
    LinearConSPOLoss,
    conspo_loss,
    conspo_scores,
    conspo_weights,
    linear_conspo_loss,
    linear_conspo_scores,
    linear_token_logprobs,
    linear_weighted_score_loss,
    token_logprobs,
    weighted_score_loss,
)
from conspo_kernels.backends import eager
from conspo_kernels.linear import gemm, modes
from conspo_kernels.linear.tiles import Head as LinearHead
from conspo_kernels.linear.tiles import RowSelection
from conspo_kernels.linear.tiling import ALIGNMENT, Problem, Tile, accumulator_bytes, backward_tile, row_tile
from conspo_kernels.ops.label_alignment import NOT_CHECKED, aligned_labels
from conspo_kernels.values import IGNORED, LogitTransform

LAYOUTS = pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
HIDDEN = 7
# Of a logits matrix of N * V elements: whether it fits, is cut into a few tiles, or into rows of one token.
WORKSPACES = {"everything": 2.0**20, "a third": 1 / 3, "one row": 0.0}
# Those that can be had by a product: no -inf, and what a head of rank 7 can be.
LINEAR_CASES = [case for case in CASES if not case.masked_columns and case.vocab_size < 5000]

# The loop over tiles is one for all implementations, and the kernels run every case from logits: some will do.
INTERPRETED = {"two groups", "ragged groups in any order", "logit scale and softcap", "an empty rollout"}


def interpreted(parameters: dict[str, Any]) -> bool:
    return parameters["implementation"] == "triton" and not torch.cuda.is_available()


def not_interpreted(parameters: dict[str, Any]) -> bool:
    """Cases that the interpreter is too slow for; of one row per tile, as many launches as tokens, it runs one."""
    names = {"two groups"} if parameters.get("workspace") == "one row" else INTERPRETED
    return interpreted(parameters) and parameters["case"].name not in names


class Head:
    """Hidden states and a head whose logits are as large as the case's."""

    def __init__(self, case: Case, inputs: Inputs, dtype: torch.dtype, *, bias: bool = True) -> None:
        generator = torch.Generator().manual_seed(1)
        shape, device = inputs.logits.shape, inputs.logits.device

        def draw(*size: int) -> Tensor:
            return torch.randn(size, generator=generator, dtype=torch.float64).to(device, dtype).requires_grad_()

        self.hidden = draw(*shape[:-1], HIDDEN)
        self.weight = draw(shape[-1], HIDDEN)
        self.bias = draw(shape[-1]) if bias else None
        with torch.no_grad():
            self.weight.mul_(min(case.scale, 20.0) / math.sqrt(HIDDEN))

    @property
    def logits(self) -> Tensor:
        return torch.nn.functional.linear(self.hidden, self.weight, self.bias)

    @property
    def leaves(self) -> list[Tensor]:
        return [x for x in (self.hidden, self.weight, self.bias) if x is not None and x.requires_grad]

    def workspace_mib(self, share: float) -> float:
        """A share of the logits' size."""
        elements = self.hidden[..., 0].numel() * self.weight.shape[0]
        return max(share * elements * self.hidden.element_size(), 1.0) / 2**20


def gradients(loss: Tensor, leaves: list[Tensor]) -> tuple[Tensor, ...]:
    weighting = torch.linspace(1, 2, loss.numel(), dtype=loss.dtype, device=loss.device).view(loss.shape)
    return torch.autograd.grad((loss * weighting).sum(), leaves)


@pytest.mark.leave_out(where=not_interpreted)
@pytest.mark.parametrize("case", LINEAR_CASES, ids=str)
@pytest.mark.parametrize("workspace", WORKSPACES)
@LAYOUTS
def test_the_loss_is_that_of_the_logits(
    case: Case, packed: bool, workspace: str, implementation: str, device: torch.device
) -> None:
    inputs = build(case, torch.float64, packed=packed, device=device)
    head = Head(case, inputs, torch.float64)
    mib = head.workspace_mib(WORKSPACES[workspace])
    arguments = (inputs.labels, inputs.rewards, inputs.groups)
    output = linear_conspo_loss(
        head.hidden, head.weight, *arguments, bias=head.bias, workspace_mib=mib, implementation=implementation,
        return_metrics=True, **inputs.kwargs,
    )  # fmt: skip
    expected = conspo_loss(head.logits, *arguments, implementation="torch", return_metrics=True, **inputs.kwargs)
    assert isinstance(output, ConSPOOutput)
    assert isinstance(expected, ConSPOOutput)
    assert max_error(output.loss, expected.loss) <= 1e-12 * max(1.0, case.scale)
    computed = ~output.scores.isnan()
    assert max_error(output.scores[computed], expected.scores[computed]) <= 1e-12 * max(1.0, case.scale)
    for name, value in expected.metrics.items():
        assert max_error(output.metrics[name], value) <= 1e-11 * max(1.0, case.scale), name
    pairs = zip(gradients(output.loss, head.leaves), gradients(expected.loss, head.leaves), strict=True)
    for name, (actual, exact) in zip(("hidden", "weight", "bias"), pairs, strict=False):
        assert max_error(actual, exact) <= 1e-12 * max(1.0, case.scale), name


MODES = {"recompute": 0.3, "store": 2.0}


def one(case_name: str, dtype: torch.dtype, device: torch.device, packed: bool = False) -> tuple[Case, Inputs, Head]:
    case = next(case for case in CASES if case.name == case_name)
    inputs = build(case, dtype, packed=packed, device=device)
    return case, inputs, Head(case, inputs, dtype)


@pytest.mark.parametrize("needs", [n for n in itertools.product([False, True], repeat=3) if any(n)], ids=str)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("entropy", [False, True])
def test_only_what_is_needed(
    needs: tuple[bool, bool, bool], mode: str, entropy: bool, implementation: str, device: torch.device
) -> None:
    """The gradients of hidden, weight and bias, of log-probabilities and entropy, each alone and together."""
    _case, inputs, head = one("logit scale and softcap", torch.float64, device)
    for x, needed in zip((head.hidden, head.weight, head.bias), needs, strict=True):
        assert x is not None
        x.requires_grad_(needed)
    options = {"return_entropy": entropy, "temperature": 0.8, "softcap": 2.0}
    result = linear_token_logprobs(
        head.hidden, head.weight, inputs.labels, bias=head.bias, workspace_mib=head.workspace_mib(MODES[mode]),
        implementation=implementation, **options,
    )  # fmt: skip
    expected = token_logprobs(head.logits, inputs.labels, implementation="torch", **options)
    outputs = [(x if isinstance(x, tuple) else (x,)) for x in (result, expected)]
    for actual, exact in zip(*outputs, strict=True):
        assert max_error(actual, exact) <= 1e-12
    graded = [
        torch.autograd.grad(sum((x * (i + 1)).sum() for i, x in enumerate(output)), head.leaves) for output in outputs
    ]
    for actual, exact in zip(*graded, strict=True):
        assert max_error(actual, exact) <= 1e-12


def gemms(monkeypatch: pytest.MonkeyPatch, operations: float) -> Iterator[float]:
    """Yields a list of the operations of every GEMM from now on, in units of `operations`."""
    counted: list[float] = []

    def counting(name: str) -> None:
        original = getattr(gemm, name)

        def call(*arguments: Tensor, **more: Tensor) -> Tensor:
            a, b = arguments[-2:] if name == "add_gemm" else arguments[:2]
            counted.append(2 * a.shape[0] * a.shape[1] * b.shape[1] / operations)
            return original(*arguments, **more)

        monkeypatch.setattr(gemm, name, call)

    for name in ("gemm", "add_gemm"):
        counting(name)
    return counted


@pytest.mark.parametrize(
    ("mode", "expected"),
    [("none", 1), ("recompute", 4), ("store", 3), ("frozen", 2), ("known", 3), ("known frozen", 2)],
)
def test_gemms(mode: str, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    _case, inputs, head = one("ragged groups in any order", torch.float32, torch.device("cpu"))
    num_tokens = int((inputs.labels != -100).sum())
    counted = gemms(monkeypatch, 2 * num_tokens * HIDDEN * head.weight.shape[0])
    if mode in ("none", "frozen", "known frozen"):
        assert head.bias is not None
        head.weight.requires_grad_(False)
        head.bias.requires_grad_(False)
    if mode == "none":
        head.hidden.requires_grad_(False)
    mib = head.workspace_mib(2.0 if mode == "store" else 0.3)
    if mode.startswith("known"):
        weights = torch.randn(len(inputs.rewards))
        loss = linear_weighted_score_loss(
            head.hidden, head.weight, inputs.labels, weights, bias=head.bias, workspace_mib=mib
        )
    else:
        loss = linear_token_logprobs(head.hidden, head.weight, inputs.labels, bias=head.bias, workspace_mib=mib).sum()
    if mode != "none":
        loss.backward()
    assert sum(counted) == pytest.approx(expected)


@pytest.mark.parametrize("synchronize", [False, True])
def test_rollouts_without_gradient_cost_nothing(synchronize: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups that are not valid, unscorable rollouts, ignored tokens: a third of the GEMMs here, the same gradients."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(6, 4, HIDDEN, requires_grad=True), torch.randn(50, HIDDEN, requires_grad=True)
    labels = torch.randint(50, (6, 4))
    rewards = torch.tensor([1.0, 1.0, 0.0, 0.0, 1.0, 0.0])  # two groups of one kind, one of both
    counted = gemms(monkeypatch, 2 * 24 * HIDDEN * 50)
    output = linear_conspo_loss(hidden, weight, labels, rewards, 2, return_metrics=True, synchronize=synchronize)
    assert isinstance(output, ConSPOOutput)
    result = torch.autograd.grad(output.loss, (hidden, weight))
    assert sum(counted) == pytest.approx(3 / 3)
    assert output.metrics["conspo/uncomputed_rollouts"] == 4
    assert output.metrics["conspo/response_tokens"] == 24
    assert output.metrics["conspo/skipped_rollouts"] == 0
    assert output.scores.isnan().tolist() == [True] * 4 + [False] * 2
    expected = torch.autograd.grad(conspo_loss(hidden @ weight.T, labels, rewards, 2), (hidden, weight))  # type: ignore[arg-type]
    for actual, exact in zip(result, expected, strict=True):
        torch.testing.assert_close(actual, exact)


@LAYOUTS
@pytest.mark.parametrize("options", [{}, {"softcap": 3.0, "temperature": 0.7}], ids=["plain", "softcap"])
def test_gradcheck(packed: bool, options: dict[str, float], implementation: str, device: torch.device) -> None:
    torch.use_deterministic_algorithms(False)
    sizes = (5,) if packed else (2, 3)
    hidden = torch.randn(*sizes, 3, dtype=torch.float64, device=device, requires_grad=True)
    weight = torch.randn(6, 3, dtype=torch.float64, device=device, requires_grad=True)
    bias = torch.randn(6, dtype=torch.float64, device=device, requires_grad=True)
    labels = torch.randint(6, sizes, device=device)
    where = {"cu_seqlens": torch.tensor([0, 2, 5])} if packed else {}

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return linear_conspo_loss(
            hidden, weight, labels, torch.tensor([1.0, 0.0]), 2, bias=bias, tau=0.5, margin=0.2, workspace_mib=1e-4,
            implementation=implementation, **where, **options,
        )  # type: ignore[arg-type, return-value]  # fmt: skip

    assert torch.autograd.gradcheck(loss, (hidden, weight, bias), fast_mode=implementation == "triton")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("mode", [*MODES, "frozen", "known"])
def test_as_accurate_as_eager(dtype: torch.dtype, mode: str) -> None:
    """Gradients of narrow types against fp64: no worse than F.linear and log_softmax in that type, sums in fp32."""
    torch.manual_seed(0)
    num_tokens, hidden_size, vocab_size = 96, 64, 1000
    hidden = torch.randn(num_tokens, hidden_size).to(dtype).requires_grad_()
    weight = (torch.randn(vocab_size, hidden_size) / 8).to(dtype).requires_grad_(mode != "frozen")
    labels = torch.randint(vocab_size, (num_tokens,))
    coefficients = torch.rand(num_tokens) + 0.5
    leaves = [x for x in (hidden, weight) if x.requires_grad]
    mib = num_tokens * vocab_size * 2 / 2**20 * (2 if mode == "store" else 0.2)
    if mode == "known":
        offsets = torch.arange(num_tokens + 1)
        loss = linear_weighted_score_loss(hidden, weight, labels, coefficients, cu_seqlens=offsets, workspace_mib=mib)
    else:
        logprobs = linear_token_logprobs(hidden, weight, labels, workspace_mib=mib)
        loss = (logprobs * coefficients).sum()  # type: ignore[operator]
    result = torch.autograd.grad(loss, leaves)

    def reference(*tensors: Tensor) -> tuple[Tensor, ...]:
        copies = [x.detach().requires_grad_() for x in tensors]
        rows = torch.nn.functional.linear(*copies).log_softmax(-1).gather(-1, labels[:, None])[:, 0]
        return torch.autograd.grad((rows * coefficients.to(rows.dtype)).sum(), copies)

    exact = reference(hidden.double(), weight.double())
    eager = reference(hidden, weight)
    for ours, theirs, true in zip(result, eager, exact, strict=False):
        assert (ours.double() - true).norm() <= 1.1 * (theirs.double() - true).norm()


# The interpreter is slow, and its bf16 is not a GPU's.
@pytest.mark.leave_out(where=lambda p: p["implementation"] == "triton" and torch.bfloat16 == p["dtype"])
@pytest.mark.leave_out(where=lambda p: p["implementation"] == "triton" and p["workspace"] == "one row")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("workspace", WORKSPACES)
def test_the_gradient_of_weight_into_a_buffer(dtype: torch.dtype, workspace: str, implementation: str) -> None:
    """Two micro-batches, both forwards first: their gradients summed onto what was there, and none for weight."""
    torch.manual_seed(0)
    hidden = [torch.randn(2, 4, HIDDEN).to(dtype).requires_grad_() for _ in range(2)]
    weight = torch.randn(50, HIDDEN).to(dtype).requires_grad_()
    labels, rewards = torch.randint(50, (2, 4)), torch.tensor([1.0, 0.0])
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    buffer = torch.randn(50, HIDDEN, dtype=acc)
    before = buffer.clone()
    mib = max(1.0, WORKSPACES[workspace] * 8 * 50 * weight.element_size()) / 2**20

    def loss(x: Tensor, w: Tensor, into: Tensor | None) -> Tensor:
        return linear_conspo_loss(
            x, w, labels, rewards, 2, workspace_mib=mib, weight_grad=into, implementation=implementation
        )  # type: ignore[return-value]

    losses = [loss(x, weight, buffer) for x in hidden]
    for part in losses:
        part.backward()
    assert weight.grad is None
    exact_leaves = [x.detach().double().requires_grad_() for x in (*hidden, weight)]
    exact = sum(loss(x, exact_leaves[-1], None) for x in exact_leaves[:-1])
    *grad_hidden, grad_weight = torch.autograd.grad(exact, exact_leaves)  # type: ignore[arg-type]
    tolerance = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 2e-2}[dtype]
    assert max_error(buffer - before, grad_weight) <= tolerance
    for x, expected in zip(hidden, grad_hidden, strict=True):
        assert x.grad is not None
        assert max_error(x.grad, expected) <= tolerance


@pytest.mark.parametrize("known", [False, True], ids=["recompute", "known"])
def test_a_gradient_that_is_not_asked_for_is_not_added(known: bool) -> None:
    """Of two leaves, of tensors with a history, and through the dispatcher, which modes see."""
    leaf, head = torch.randn(2, 4, HIDDEN, requires_grad=True), torch.randn(50, HIDDEN, requires_grad=True)
    labels, rewards, buffer = torch.randint(50, (2, 4)), torch.tensor([1.0, 0.0]), torch.zeros(50, HIDDEN)

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        if known:
            return linear_weighted_score_loss(hidden, weight, labels, rewards - 0.5, weight_grad=buffer)  # type: ignore[return-value]
        return linear_conspo_loss(hidden, weight, labels, rewards, 2, weight_grad=buffer)  # type: ignore[return-value]

    for history in (False, True):
        hidden, weight = (leaf * 1, head * 1) if history else (leaf, head)
        expected = torch.autograd.grad(loss(hidden, weight), hidden)
        assert not buffer.any()
        loss(hidden, weight).backward(inputs=[leaf], retain_graph=True)
        with FlopCounterMode(display=False):
            torch.autograd.grad(loss(hidden, weight), hidden, retain_graph=True)
        assert not buffer.any()
        loss(hidden, weight).backward(inputs=[head], retain_graph=True)
        assert buffer.any()
        assert head.grad is None
        torch.testing.assert_close(
            torch.autograd.grad(loss(hidden, weight), (hidden, weight), allow_unused=True)[0], *expected
        )
        buffer.zero_()


def losses_of_hidden(labels: Tensor) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    return {
        "store": lambda x, w: linear_token_logprobs(x, w, labels).sum(),  # type: ignore[union-attr]
        "recompute": lambda x, w: linear_token_logprobs(x, w, labels, workspace_mib=2.0**-12).sum(),  # type: ignore[union-attr]
        "frozen": lambda x, w: linear_token_logprobs(x, w.detach(), labels).sum(),  # type: ignore[union-attr]
        "known": lambda x, w: linear_weighted_score_loss(x, w, labels, torch.ones(2)),  # type: ignore[return-value]
        "known, logits": lambda x, w: weighted_score_loss(x @ w.T, labels, torch.ones(2)),  # type: ignore[return-value]
        "known, in place": lambda x, w: weighted_score_loss(x @ w.T, labels, torch.ones(2), inplace=True),  # type: ignore[return-value]
    }


LOSSES_OF_HIDDEN = pytest.mark.parametrize("function", losses_of_hidden(torch.empty(0)))


@LOSSES_OF_HIDDEN
def test_no_second_derivative(function: str) -> None:
    hidden, weight = torch.randn(2, 3, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    loss = losses_of_hidden(torch.zeros(2, 3, dtype=torch.long))[function](hidden, weight)
    (grad,) = torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        (hidden.sum() + grad.pow(2).sum()).backward()


@pytest.mark.parametrize("function", ["store", "recompute"])
def test_no_second_derivative_by_one_input(function: str) -> None:
    """The path from the gradient to the inputs is there: without it autograd would take it for a constant."""
    hidden, weight = torch.randn(2, 3, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    loss = losses_of_hidden(torch.zeros(2, 3, dtype=torch.long))[function](hidden, weight)
    (grad,) = torch.autograd.grad(loss, hidden, create_graph=True)
    for leaf in (hidden, weight):
        with pytest.raises(NotImplementedError, match="no second derivative"):
            torch.autograd.grad(hidden.sum() + weight.sum() + grad.sum(), leaf, retain_graph=True)


def test_a_frozen_head_under_create_graph() -> None:
    """What comes in has a graph then; the gradient is that of a head that is trained."""
    hidden, weight = torch.randn(4, 3, 4, requires_grad=True), torch.randn(9, 4)
    arguments = (torch.zeros(4, 3, dtype=torch.long), torch.tensor([1.0, 0.0, 0.0, 1.0]), 2)
    frozen = linear_conspo_loss(hidden, weight, *arguments)
    trained = linear_conspo_loss(hidden, weight.requires_grad_(), *arguments)
    (grad,) = torch.autograd.grad(frozen, hidden, create_graph=True)  # type: ignore[arg-type]
    (expected,) = torch.autograd.grad(trained, hidden)  # type: ignore[arg-type]
    torch.testing.assert_close(grad, expected)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        torch.autograd.grad(grad.sum(), hidden)


@LOSSES_OF_HIDDEN
def test_saved_tensor_hooks(function: str) -> None:
    """A second backward is right or raises, and never changes what the first has given."""
    hidden, weight = torch.randn(2, 3, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    loss_of = losses_of_hidden(torch.zeros(2, 3, dtype=torch.long))[function]
    leaves = [hidden] if function == "frozen" else [hidden, weight]
    expected = torch.autograd.grad(3 * loss_of(hidden, weight), leaves)
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x)
    if function == "known, in place":
        with hooks, pytest.raises(ValueError, match="saved-tensor hooks"):
            loss_of(hidden, weight)
        return
    with hooks:
        loss = loss_of(hidden, weight)
    first = second = torch.autograd.grad(3 * loss, leaves, retain_graph=True)
    if function.startswith("known"):
        with pytest.raises(RuntimeError, match="second backward"):
            torch.autograd.grad(3 * loss, leaves)
    else:
        second = torch.autograd.grad(3 * loss, leaves)
    for a, b, exact in zip(first, second, expected, strict=True):
        torch.testing.assert_close(a, exact)
        torch.testing.assert_close(b, exact)


def test_no_label_is_taken_for_an_ignored_one() -> None:
    """On a GPU, where labels are not looked at: each outside of the vocabulary gives NaN, and -2 is no exception."""
    hidden, weight = torch.randn(4, 3), torch.randn(5, 3)
    labels = torch.tensor([-2, -1, 5, -100])
    aligned = aligned_labels(labels, None, None, False, -100, NOT_CHECKED, "torch")[0]
    tokens, head = RowSelection(hidden, aligned, None), LinearHead(weight, None, hidden.dtype)
    result = modes.forward_none(modes.Run(eager, tokens, head, LogitTransform(), 2**20), False)
    assert result.logprobs.isnan().tolist() == [True, True, True, False]


def test_loss_scaling_of_fp16_goes_into_the_weights() -> None:
    """The known gradient is rounded when it is computed: scaled before that, it is as good as eager's."""
    torch.manual_seed(0)
    length, vocab_size, scale = 512, 4000, 2.0**16
    hidden = torch.randn(2, length, 32).half().requires_grad_()
    weight = (torch.randn(vocab_size, 32) / 8).half()
    labels, weights = torch.randint(vocab_size, (2, length)), torch.tensor([0.05, -0.05])
    loss = linear_weighted_score_loss(hidden, weight, labels, weights * scale)
    (grad,) = torch.autograd.grad(loss, hidden)  # type: ignore[arg-type]
    exact = hidden.detach().double().requires_grad_()
    scores = token_logprobs(exact @ weight.double().T, labels).mean(1)  # type: ignore[union-attr]
    (expected,) = torch.autograd.grad((scores * weights).sum(), exact)
    assert (grad.double() / scale - expected).norm() <= 1e-3 * expected.norm()


@pytest.mark.parametrize("share", [0.3, 2.0], ids=["recompute", "store"])
def test_second_backward(share: float) -> None:
    """The same bits where the logits are computed again; where they were stored, the first has overwritten them."""
    _case, inputs, head = one("two groups", torch.float64, torch.device("cpu"))
    loss = linear_conspo_loss(
        head.hidden, head.weight, inputs.labels, inputs.rewards, inputs.groups, bias=head.bias,
        workspace_mib=head.workspace_mib(share), **inputs.kwargs,
    )  # fmt: skip
    assert isinstance(loss, Tensor)
    first, second, third = (torch.autograd.grad(loss, head.leaves, retain_graph=True) for _ in range(3))
    for a, b, c in zip(first, second, third, strict=True):
        assert max_error(a, b) <= 1e-15
        assert torch.equal(b, c)


@pytest.mark.gpu
@pytest.mark.leave_out(where=interpreted)  # which is slow, and the GEMMs are the same
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_batch_invariance(dtype: torch.dtype, implementation: str, device: torch.device) -> None:
    """Bit for bit, whatever stands beside a token; also where the workspace holds fewer than 256 rows."""
    torch.manual_seed(0)
    hidden = torch.randn(300, 64, device=device).to(dtype)
    weight = (torch.randn(1000, 64, device=device) / 4).to(dtype)
    labels = torch.randint(1000, (300,), device=device)
    for mib in (512, 0.1):
        options = {"workspace_mib": mib, "batch_invariant": True, "implementation": implementation}
        whole = linear_token_logprobs(hidden, weight, labels, **options)
        for chosen in (slice(0, 1), slice(7, 40), slice(1, 300, 3), slice(255, 258)):
            part = linear_token_logprobs(hidden[chosen], weight, labels[chosen], **options)
            assert torch.equal(part, whole[chosen]), (mib, chosen)  # type: ignore[call-overload, index, arg-type]
    sparse = torch.where(torch.arange(300, device=device) % 2 == 0, labels, -100)
    result = linear_token_logprobs(hidden, weight, sparse, batch_invariant=True, implementation=implementation)
    whole = linear_token_logprobs(hidden, weight, labels, batch_invariant=True, implementation=implementation)
    assert torch.equal(result[::2], whole[::2])  # type: ignore[call-overload, index, arg-type]


@pytest.mark.parametrize("gathered", [False, True])
@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True)], ids=str)
def test_the_tile_moves_the_fewest_bytes(needs: tuple[bool, bool], gathered: bool) -> None:
    """Against every tile there is, over shapes where slices of the vocabulary, of the tokens, or of both win."""
    for n, v, h, itemsize, workspace in itertools.product(
        (1, 64, 300), (130, 1000, 3000), (8, 64), (2, 4), (2**14, 2**18, 2**30)
    ):
        problem = Problem(n, v, h, itemsize, gathered)
        tile = backward_tile(problem, workspace, *needs)
        assert problem.tile_bytes(tile.rows, tile.columns) <= max(workspace, problem.tile_bytes(1, v))
        best = accumulator_bytes(problem, row_tile(problem, workspace), *needs)
        for row_tiles in range(1, n + 1):
            rows = math.ceil(n / row_tiles)
            columns = [v, *range(ALIGNMENT, v, ALIGNMENT)]
            fitting = [c for c in columns if problem.tile_bytes(rows, c) <= workspace]
            best = min([best, *(accumulator_bytes(problem, Tile(rows, c), *needs) for c in fitting)])
        assert accumulator_bytes(problem, tile, *needs) == best, (problem, workspace, tile)


def test_tiles_of_a_model() -> None:
    """8192 tokens of a 152k vocabulary in 512 MiB: five slices of the vocabulary, no accumulator for dW."""
    problem = Problem(8192, 151_936, 4096, 2)
    tile = backward_tile(problem, 512 * 2**20, True, True)
    assert tile.rows == 8192
    assert math.ceil(151_936 / tile.columns) == 5
    assert (
        accumulator_bytes(problem, tile, True, True)
        < accumulator_bytes(problem, row_tile(problem, 2**29), True, True) / 4
    )


@pytest.mark.leave_out(where=not_interpreted)
@pytest.mark.leave_out(where=lambda p: p["case"].options.get("reduction") == "none")  # has as many losses as groups
@pytest.mark.parametrize("case", LINEAR_CASES[:20], ids=str)
@LAYOUTS
@pytest.mark.parametrize("linear", [False, True], ids=["logits", "linear"])
def test_two_phases(case: Case, packed: bool, linear: bool, implementation: str, device: torch.device) -> None:
    """Scores, weights, then shuffled micro-batches of single rollouts: the gradient of the whole."""
    inputs = build(case, torch.float64, packed=packed, device=device)
    head = Head(case, inputs, torch.float64)
    contrast_names = {"tau", "margin", "reward_threshold", "reduction", "num_groups"}
    contrast = {k: v for k, v in inputs.kwargs.items() if k in contrast_names}
    tokens = {k: v for k, v in inputs.kwargs.items() if k not in contrast_names} | {"implementation": implementation}
    whole = conspo_loss(head.logits, inputs.labels, inputs.rewards, inputs.groups, **inputs.kwargs)
    expected = torch.autograd.grad(whole, head.leaves)  # type: ignore[arg-type]

    if linear:
        scores = linear_conspo_scores(head.hidden, head.weight, inputs.labels, bias=head.bias, **tokens)
    else:
        scores = conspo_scores(head.logits, inputs.labels, **tokens)
    assert not scores.requires_grad
    result = conspo_weights(scores, inputs.rewards, inputs.groups, implementation=implementation, **contrast)
    assert max_error(result.loss, whole.detach()) <= 1e-12 * max(1.0, case.scale)  # type: ignore[union-attr]
    total = [torch.zeros_like(x) for x in head.leaves]
    offsets = tokens.pop("cu_seqlens", None)
    mask = tokens.pop("response_mask", None)
    for s in torch.randperm(len(scores), generator=torch.Generator().manual_seed(0)).tolist():
        part = slice(s, s + 1) if offsets is None else slice(int(offsets[s]), int(offsets[s + 1]))
        more = dict(tokens) if mask is None else {**tokens, "response_mask": mask[part]}
        if offsets is not None:
            more["cu_seqlens"] = torch.tensor([0, part.stop - part.start])
        weights = result.weights[s : s + 1]
        if linear:
            loss = linear_weighted_score_loss(
                head.hidden[part], head.weight, inputs.labels[part], weights, bias=head.bias, workspace_mib=1e-4, **more
            )
        else:
            loss = weighted_score_loss(head.logits[part] * 1, inputs.labels[part], weights, inplace=s % 2 == 0, **more)
        for sum_, grad in zip(total, torch.autograd.grad(loss, head.leaves, allow_unused=True), strict=True):
            if grad is not None:
                sum_ += grad
    for actual, exact in zip(total, expected, strict=True):
        assert max_error(actual, exact) <= 1e-12 * max(1.0, case.scale)


def test_known_gradients_are_scaled_and_used_once() -> None:
    logits = torch.randn(2, 3, 9, dtype=torch.float64, requires_grad=True)
    labels, weights = torch.zeros(2, 3, dtype=torch.long), torch.tensor([0.5, -2.0], dtype=torch.float64)
    loss = weighted_score_loss(logits, labels, weights)
    (grad,) = torch.autograd.grad(3 * loss, logits, retain_graph=True)
    scores = token_logprobs(logits, labels).mean(1)  # type: ignore[union-attr]
    (expected,) = torch.autograd.grad(3 * (scores * weights).sum(), logits)
    assert max_error(grad, expected) <= 1e-14
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, logits)
    assert not weighted_score_loss(logits.detach(), labels, weights).requires_grad


@pytest.mark.parametrize("linear", [False, True], ids=["logits", "linear"])
def test_score_drift(linear: bool) -> None:
    """The largest change of a score that has a weight; a warning where it is more than rounding."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(3, 4, 5, requires_grad=True), torch.randn(9, 5)
    labels, weights = torch.randint(9, (3, 4)), torch.tensor([0.5, -0.5, 0.0])
    before = conspo_scores(hidden @ weight.T, labels)

    def loss(scores: Tensor | None, **options: float) -> ConSPOOutput:
        more = {"scores": scores, "return_metrics": True, **options}
        if linear:
            output = linear_weighted_score_loss(hidden, weight, labels, weights, **more)  # type: ignore[arg-type]
        else:
            output = weighted_score_loss(hidden @ weight.T, labels, weights, **more)  # type: ignore[arg-type]
        assert isinstance(output, ConSPOOutput)
        return output

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert loss(before).metrics["conspo/score_drift"] <= 1e-6
        assert "conspo/score_drift" not in loss(None).metrics
        assert not loss(before.clone().requires_grad_()).metrics["conspo/score_drift"].requires_grad
        moved = before + torch.tensor([0.0, 0.005, 5.0])  # the last has no weight
        assert loss(moved).metrics["conspo/score_drift"].item() == pytest.approx(0.005, rel=1e-3)
    with pytest.warns(RuntimeWarning, match=r"scores drifted by .* nats per token since phase 1 \(more than 0.01\)"):
        result = loss(before, temperature=0.8)
    assert result.metrics["conspo/response_tokens"] == 12
    assert result.logprobs is not None
    assert result.logprobs.shape == labels.shape
    with pytest.warns(RuntimeWarning, match="scores drifted by nan"):
        loss(before * torch.nan)


def test_module_and_autocast() -> None:
    _case, inputs, head = one("two groups", torch.float32, torch.device("cpu"))
    arguments = (inputs.labels, inputs.rewards, inputs.groups)
    module = LinearConSPOLoss(tau=0.5, margin=0.1)
    loss = module(head.hidden, head.weight, *arguments, bias=head.bias)
    assert torch.equal(
        loss, linear_conspo_loss(head.hidden, head.weight, *arguments, bias=head.bias, tau=0.5, margin=0.1)
    )
    assert repr(module) == "LinearConSPOLoss(tau=0.5, margin=0.1)"
    with torch.autocast("cpu", torch.bfloat16):
        result = linear_conspo_loss(head.hidden, head.weight, *arguments, bias=head.bias)
        expected = conspo_loss(head.logits, *arguments)
        assert head.logits.dtype == torch.bfloat16
    assert isinstance(result, Tensor)
    torch.testing.assert_close(result, expected)
    for ours, other in zip(gradients(result, head.leaves), gradients(expected, head.leaves), strict=True):  # type: ignore[arg-type]
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, other, rtol=2e-2, atol=1e-3)


@pytest.mark.parametrize("mode", ["none", "recompute", "store", "frozen"])
def test_opcheck(mode: str, implementation: str) -> None:
    torch.use_deterministic_algorithms(False)
    hidden, weight, bias = torch.randn(5, 3), torch.randn(11, 3), torch.randn(11)
    if mode != "none":
        hidden.requires_grad_()
    if mode in ("recompute", "store"):
        weight.requires_grad_()
        bias.requires_grad_()
    labels, transform = torch.tensor([0, 3, IGNORED, 10, 2]), LogitTransform(0.7, 1.0, 3.0).to_numbers()
    tests = ["test_schema", "test_autograd_registration", "test_faketensor"]
    if mode != "store":  # whose outputs differ after a backward: eager overwrites the stored logits, a traced graph not
        tests.append("test_aot_dispatch_dynamic")
    settings = (hidden.dtype, transform, mode == "store", mode, 200, implementation, 0, "", False)
    arguments = (hidden, weight, bias, labels, None, None, *settings)
    torch.library.opcheck(torch.ops.conspo.linear_logprob.default, arguments, test_utils=tests)
