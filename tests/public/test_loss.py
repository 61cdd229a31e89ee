"""conspo_loss against the oracle: every case, every implementation, padded and packed, every dtype."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import pytest
import torch
from cases import CASES, MANY_ROLLOUTS, Case, Inputs, build, eager_logprobs
from tolerance import assert_accurate, grad_floor, max_error, value_floor
from torch import Tensor

from conspo_kernels import ConSPOLoss, ConSPOOutput, conspo_loss, conspo_loss_from_scores, conspo_scores
from conspo_kernels.reference import ReferenceOutput, reference_loss

LAYOUTS = pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
CONTRAST = {"tau", "margin", "reward_threshold", "reduction", "num_groups"}  # what conspo_loss_from_scores takes
EVERY_CASE = pytest.mark.parametrize("case", CASES, ids=str)


def run(inputs: Inputs, implementation: str, logits: Tensor | None = None, **more: object) -> ConSPOOutput:
    logits = inputs.logits if logits is None else logits
    return conspo_loss(
        logits, inputs.labels, inputs.rewards, inputs.groups, implementation=implementation, return_metrics=True,
        **inputs.kwargs, **more,
    )  # fmt: skip


def gradient(loss: Tensor, logits: Tensor) -> Tensor:
    """Of a fixed weighting of the losses, so that "none" has a gradient worth comparing."""
    weighting = torch.linspace(1, 2, loss.numel(), dtype=loss.dtype, device=loss.device).view(loss.shape)
    (grad,) = torch.autograd.grad((loss * weighting).sum(), logits)
    return grad


def oracle(inputs: Inputs) -> tuple[ReferenceOutput, Tensor]:
    logits = inputs.logits.detach().cpu().double().requires_grad_(True)
    kwargs = {k: v.cpu() if isinstance(v, Tensor) else v for k, v in inputs.kwargs.items()}
    output = reference_loss(logits, inputs.labels.cpu(), inputs.rewards, inputs.groups, **kwargs)
    return output, gradient(output.loss, logits)


class Computed(NamedTuple):
    inputs: Inputs
    output: ConSPOOutput
    gradient: Tensor


@functools.cache
def computed(case: Case, dtype: torch.dtype, packed: bool, implementation: str, device: torch.device) -> Computed:
    """A case, run once for all tests that look at it: they must not write to what they get."""
    inputs = build(case, dtype, packed=packed, device=device)
    output = run(inputs, implementation)
    return Computed(inputs, output, gradient(output.loss, inputs.logits))


@functools.cache
def exactly(case: Case, packed: bool) -> tuple[ReferenceOutput, Tensor]:
    return oracle(build(case, torch.float64, packed=packed))


@pytest.mark.parametrize("case", CASES + MANY_ROLLOUTS, ids=str)
@LAYOUTS
def test_fp64_equals_the_oracle(case: Case, packed: bool, implementation: str, device: torch.device) -> None:
    exact, exact_grad = exactly(case, packed)
    _, output, grad = computed(case, torch.float64, packed, implementation, device)
    assert max_error(output.loss, exact.loss) <= 1e-12 * max(1.0, case.scale)
    assert max_error(output.scores, exact.scores) <= 1e-12 * max(1.0, case.scale)
    assert output.logprobs is not None
    assert max_error(output.logprobs, exact.logprobs) <= 1e-12 * max(1.0, case.scale)
    assert max_error(grad, exact_grad) <= 1e-13


@EVERY_CASE
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_as_accurate_as_eager(case: Case, dtype: torch.dtype, implementation: str, device: torch.device) -> None:
    inputs, output, grad = computed(case, dtype, False, implementation, device)
    assert inputs.logits.isfinite().logical_or(inputs.logits == -torch.inf).all()  # within the range of fp16
    exact, exact_grad = oracle(inputs)

    # Eager: the log-softmax in the dtype of the logits, what follows in fp32.
    eager_inputs = build(case, dtype, packed=False)
    full = eager_logprobs(eager_inputs).float()
    counted = exact.logprobs != 0
    labels = eager_inputs.labels
    if case.shift:
        labels = torch.cat([labels[:, 1:], labels[:, :1]], 1)
    eager_token = full.gather(-1, torch.where(counted, labels, 0)[..., None])[..., 0] * counted
    eager_scores = eager_token.sum(-1) / torch.where(counted.any(-1), counted.sum(-1), torch.nan)
    objective = {k: v for k, v in inputs.kwargs.items() if k in CONTRAST}
    eager_loss = conspo_loss_from_scores(
        eager_scores, inputs.rewards, inputs.groups, implementation="torch", **objective
    )
    eager_grad = gradient(eager_loss, eager_inputs.logits)

    assert output.logprobs is not None
    pairs = [
        ("logprobs", output.logprobs, eager_token, exact.logprobs),
        ("scores", output.scores, eager_scores, exact.scores),
        ("loss", output.loss, eager_loss, exact.loss),
    ]
    for what, actual, eager, truth in pairs:
        # The scores' own size bounds the rounding of a loss that is a difference of them.
        floor = max(value_floor(truth, torch.float32), value_floor(exact.scores, torch.float32))
        assert_accurate(actual, eager, truth, floor, what)
    assert grad.dtype == dtype
    floor = grad_floor(exact_grad, dtype, exact.scores, inputs.kwargs["tau"])
    assert_accurate(grad, eager_grad, exact_grad, floor, "gradient")


@pytest.mark.parametrize("case", CASES + MANY_ROLLOUTS, ids=str)
@LAYOUTS
def test_metrics(case: Case, packed: bool, implementation: str, device: torch.device) -> None:
    exact, _ = exactly(case, packed)
    metrics = computed(case, torch.float64, packed, implementation, device).output.metrics
    assert metrics.keys() == exact.metrics.keys()
    for name, value in exact.metrics.items():
        actual = metrics[name]
        assert actual.dim() == 0
        assert not actual.requires_grad
        if math.isnan(value):
            assert actual.isnan(), name
        else:
            assert actual.item() == pytest.approx(value, rel=1e-9, abs=1e-12 * max(1.0, case.scale)), name


@EVERY_CASE
def test_padded_equals_packed(case: Case, implementation: str, device: torch.device) -> None:
    _, a, grad_a = computed(case, torch.float64, False, implementation, device)
    _, b, grad_b = computed(case, torch.float64, True, implementation, device)
    assert max_error(a.loss, b.loss) <= 1e-13 * max(1.0, case.scale)
    assert max_error(a.scores, b.scores) <= 1e-13 * max(1.0, case.scale)
    start = 0
    for row, n in enumerate(case.lengths):
        assert max_error(grad_a[row, :n], grad_b[start : start + n]) <= 1e-14
        assert not grad_a[row, n:].any()
        start += n
    assert not grad_b[start:].any()


@EVERY_CASE
@LAYOUTS
def test_inplace_backward_gives_the_same_bits(
    case: Case, packed: bool, implementation: str, device: torch.device
) -> None:
    inputs, _, expected = computed(case, torch.float32, packed, implementation, device)
    logits = inputs.logits * 1
    storage = logits.data_ptr()
    grad = gradient(run(inputs, implementation, logits, inplace_backward=True).loss, logits)
    assert grad.data_ptr() == storage
    assert torch.equal(grad, expected)


@EVERY_CASE
def test_strided_equals_contiguous(case: Case, implementation: str, device: torch.device) -> None:
    """Rows that are views: of a longer sequence, of a wider vocabulary, transposed, and off a 16-byte boundary."""
    inputs, expected, expected_grad = computed(case, torch.float32, False, implementation, device)
    b, t, v = inputs.logits.shape
    views = {
        "longer": torch.full((b, t + 2, v), torch.nan, device=device)[:, :-2],
        "later": torch.full((b, t + 1, v), torch.nan, device=device)[:, 1:],
        "wider": torch.full((b, t, v + 5), torch.nan, device=device)[..., :v],
        "transposed": torch.full((t, b, v), torch.nan, device=device).transpose(0, 1),
        "unaligned": torch.full((b * t * v + 3,), torch.nan, device=device)[3:].view(b, t, v),
    }
    for name, view in views.items():
        logits = view.copy_(inputs.logits.detach()).detach().requires_grad_(True)
        output = run(inputs, implementation, logits)
        # Where rows lie differently against 16-byte boundaries, sums are cut differently.
        assert max_error(output.loss, expected.loss) <= 1e-5 * max(1.0, case.scale), name
        assert max_error(gradient(output.loss, logits), expected_grad) <= 1e-5, name


@EVERY_CASE
def test_same_inputs_same_bits(case: Case, implementation: str, device: torch.device) -> None:
    results = []
    for _ in range(2):
        inputs = build(case, torch.bfloat16, packed=True, device=device)
        output = run(inputs, implementation)
        results.append((output.loss, output.scores, gradient(output.loss, inputs.logits)))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a.nan_to_num(nan=7.0), b.nan_to_num(nan=7.0))


@EVERY_CASE
@LAYOUTS
def test_scores_then_loss_is_the_loss(case: Case, packed: bool, implementation: str, device: torch.device) -> None:
    inputs, whole, _ = computed(case, torch.float64, packed, implementation, device)
    contrast = {k: v for k, v in inputs.kwargs.items() if k in CONTRAST}
    others = {k: v for k, v in inputs.kwargs.items() if k not in CONTRAST}
    scores = conspo_scores(inputs.logits, inputs.labels, implementation=implementation, **others)
    assert not scores.requires_grad
    assert torch.equal(scores.nan_to_num(nan=7.0), whole.scores.nan_to_num(nan=7.0))
    loss = conspo_loss_from_scores(scores, inputs.rewards, inputs.groups, implementation=implementation, **contrast)
    assert torch.equal(loss, whole.loss)


@pytest.mark.parametrize("case", CASES[:2], ids=str)
def test_module_form(case: Case, implementation: str, device: torch.device) -> None:
    inputs = build(case, torch.float32, packed=False, device=device)
    module = ConSPOLoss(tau=9.0, implementation=implementation)
    kwargs = dict(inputs.kwargs)
    loss = module(inputs.logits, inputs.labels, inputs.rewards, inputs.groups, **kwargs)
    assert torch.equal(loss, run(inputs, implementation).loss)
    assert "tau=9.0" in repr(module)
    with pytest.raises(TypeError, match="unexpected keyword argument 'taux'"):
        ConSPOLoss(taux=1.0)  # type: ignore[call-arg]


def test_a_module_takes_no_tensor_of_a_step() -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'response_mask'"):
        ConSPOLoss(response_mask=torch.ones(2, 3))


def test_nothing_at_all(implementation: str, device: torch.device) -> None:
    """No rollouts, or rollouts of no tokens: an exact zero with a graph."""
    for logits, labels in ((torch.empty(0, 4, 9), torch.empty(0, 4)), (torch.empty(2, 0, 9), torch.empty(2, 0))):
        leaf = logits.to(device).requires_grad_(True)
        rewards = torch.arange(len(labels))
        loss = conspo_loss(leaf, labels.long().to(device), rewards, 2, implementation=implementation)
        loss.backward()
        assert loss.item() == 0.0
        assert leaf.grad is not None
        assert leaf.grad.shape == leaf.shape


def test_no_valid_group_is_a_zero_with_a_graph(implementation: str, device: torch.device) -> None:
    logits = torch.randn(2, 3, 9, device=device, requires_grad=True)
    labels = torch.randint(0, 9, (2, 3), device=device)
    loss = conspo_loss(logits, labels, torch.tensor([1.0, 1.0]), 2, implementation=implementation)
    assert loss.item() == 0.0
    assert loss.requires_grad
    loss.backward()
    assert logits.grad is not None
    assert not logits.grad.any()


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_nan_logits(poison: float, implementation: str, device: torch.device) -> None:
    """They make the loss NaN where their rollout takes part, and are not even seen where it does not."""
    labels = torch.randint(0, 9, (6, 2), device=device)
    rewards = torch.tensor([1.0, 0.0, 1.0, 1.0, math.nan, 0.0])
    for row, takes_part in ((0, True), (1, True), (2, False), (3, False), (4, False)):
        logits = torch.randn(6, 2, 9, device=device)
        logits[row, 1, 5] = poison
        logits.requires_grad_(True)
        loss = conspo_loss(logits, labels, rewards, 2, implementation=implementation)
        (grad,) = torch.autograd.grad(loss, logits)
        assert loss.isnan().item() == takes_part
        if not takes_part:
            assert grad.isfinite().all()
            assert not grad[row].any()


def test_fp64_rewards_keep_their_digits(implementation: str, device: torch.device) -> None:
    """A reward is compared with the threshold in its own dtype, as `rewards > threshold` does it."""
    scores = torch.tensor([-1.0, -2.0], device=device)
    near = torch.tensor([0.1, math.nextafter(0.1, 1.0)], dtype=torch.float64)
    kwargs = {"reward_threshold": 0.1, "implementation": implementation}
    assert conspo_loss_from_scores(scores, near, 2, **kwargs).item() > 0
    assert conspo_loss_from_scores(scores, near.float(), 2, **kwargs).item() == 0


@pytest.mark.parametrize("dtype", [torch.bool, torch.int8, torch.int64, torch.bfloat16, torch.float64], ids=str)
def test_rewards_of_any_dtype(dtype: torch.dtype, implementation: str, device: torch.device) -> None:
    scores = torch.tensor([-1.0, -2.0, -1.5], device=device)
    expected = conspo_loss_from_scores(scores, torch.tensor([1.0, 0.0, 1.0]), 3, implementation=implementation)
    loss = conspo_loss_from_scores(scores, torch.tensor([1, 0, 1]).to(dtype), 3, implementation=implementation)
    assert torch.equal(loss, expected)
