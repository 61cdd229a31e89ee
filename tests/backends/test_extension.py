"""What it takes to add something: a backend is one folder and one line, an objective is one file."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator

import pytest
import torch
from cases import CASES, Case, build
from torch import Tensor

from conspo_kernels import conspo_loss, linear_conspo_loss, sequence_scores, token_logprobs, weighted_score_loss
from conspo_kernels.backends import eager, registry, triton
from conspo_kernels.objective import Objective, Rollouts
from conspo_kernels.reference import reference_loss
from conspo_kernels.values import IGNORED, Incoming, LogitRows, LogitTransform, Statistics

CALLS: list[str] = []


# As plain as can be: whole rows in fp64.


def _log_p(logits: Tensor, transform: LogitTransform) -> tuple[Tensor, Tensor]:
    u = logits.double() if transform.softcap is None else torch.tanh(logits.double() * transform.inner)
    u = torch.where(logits == -torch.inf, -torch.inf, u)
    return u, torch.log_softmax(u * transform.scale, -1)


def toy_forward(rows: LogitRows, with_entropy: bool, out: Statistics | None = None) -> Statistics:
    CALLS.append("forward")
    logits, labels, transform, _start = rows
    acc = torch.float64 if logits.dtype == torch.float64 else torch.float32
    u, log_p = _log_p(logits, transform)
    inside = (labels >= 0) & (labels < logits.shape[-1])
    logprobs = log_p.gather(-1, labels.clamp(0, logits.shape[-1] - 1)[..., None])[..., 0]
    row_max = u.amax(-1)
    values = [
        torch.where(inside, logprobs, torch.nan),
        -torch.where(log_p > -torch.inf, log_p.exp() * log_p, 0).sum(-1),
        row_max,
        torch.logsumexp((u - row_max[..., None]) * transform.scale, -1),
    ]
    logprobs, entropy, row_max, log_sum = (torch.where(labels == IGNORED, 0, x).to(acc) for x in values)
    statistics = Statistics(logprobs, entropy if with_entropy else None, row_max, log_sum)
    return statistics if out is None else statistics.copied_to(out)


def toy_backward(grad_logits: Tensor, rows: LogitRows, incoming: Incoming) -> None:
    CALLS.append("backward")
    assert incoming.grad_entropy is None, "the toy knows no entropy"
    logits, labels, transform = rows.logits, rows.labels_in_slice(), rows.transform
    u, _ = _log_p(logits, transform)
    row_max, log_sum = incoming.row_max.double()[..., None], incoming.log_sum.double()[..., None]
    c = torch.where(labels == IGNORED, 0, incoming.grad_logprobs).double()[..., None]
    g = -c * torch.exp((u - row_max) * transform.scale - log_sum)
    inside = ((labels >= 0) & (labels < logits.shape[-1]))[..., None]
    g.scatter_add_(-1, labels.clamp(0, logits.shape[-1] - 1)[..., None], torch.where(inside, c, 0))
    slope = 1 if transform.softcap is None else (1 - u * u) * transform.inner
    g = torch.where(logits == -torch.inf, 0, g * transform.scale * slope)
    grad_logits.copy_(torch.where(c == 0, 0, g))


def toy_forward_backward(
    grad_logits: Tensor, rows: LogitRows, coefficients: Tensor, out: Tensor | None = None
) -> Tensor:
    statistics = toy_forward(rows, with_entropy=False)
    toy_backward(grad_logits, rows, statistics.incoming(coefficients))
    return statistics.logprobs if out is None else out.copy_(statistics.logprobs)


def toy_infonce(scores: Tensor, counts: Tensor, rollouts: Rollouts, objective: Objective) -> tuple[Tensor, Tensor]:
    CALLS.append("infonce")
    return eager.infonce(scores, counts, rollouts, objective)


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A backend that is a folder elsewhere, and one line."""
    package = types.ModuleType("toy_backend")
    functions = {
        "obstacle": lambda device: None,
        "token_logprob_forward": toy_forward,
        "token_logprob_backward": toy_backward,
        "token_logprob_forward_backward": toy_forward_backward,
        "infonce": toy_infonce,
    }
    of_pytorch = (
        "align", "sequence_score_forward", "sequence_score_backward", "token_coefficients", "masked_coefficients",
        "weighted_sum", "scale_",
    )  # fmt: skip
    vars(package).update({name: getattr(eager, name) for name in of_pytorch}, **functions)
    monkeypatch.setitem(sys.modules, "toy_backend", package)
    monkeypatch.setitem(registry.BACKENDS, "toy", "toy_backend")
    registry.forget_choices()  # a page has a backend of this name too
    CALLS.clear()
    yield "toy"
    registry.forget_choices()


def test_a_backend_without_a_function_of_the_contract_says_which(monkeypatch: pytest.MonkeyPatch) -> None:
    half = types.ModuleType("half")
    half.obstacle, half.align = eager.obstacle, eager.align  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "half", half)
    monkeypatch.setitem(registry.BACKENDS, "half", "half")
    with pytest.raises(
        TypeError, match=r"backend 'half' lacks functions .*: \['token_logprob_forward', .*, 'scale_'\]$"
    ):
        sequence_scores(torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.int64), implementation="half")
    del half.obstacle
    registry.forget_choices()
    with pytest.raises(TypeError, match=r"lacks functions .*: \['obstacle'\]$"):
        sequence_scores(torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.int64), implementation="half")
    registry.forget_choices()


def test_kernels_that_cannot_be_imported_are_not_missing_functions(monkeypatch: pytest.MonkeyPatch) -> None:
    registry.forget_choices()
    monkeypatch.delitem(vars(triton), "align", raising=False)
    monkeypatch.setitem(vars(triton), "functions", types.ModuleType("broken"))
    with pytest.raises(ImportError, match=r"Triton's kernels cannot be imported: .*align"):
        registry.backend_for("triton", torch.device("cuda"))


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_shared_cases_on_a_toy_backend(case: Case, packed: bool, toy: str) -> None:
    inputs = build(case, torch.float64, packed=packed)
    arguments = (inputs.labels, inputs.rewards, inputs.groups)
    loss = conspo_loss(inputs.logits, *arguments, **inputs.kwargs, implementation=toy)
    leaf = inputs.logits.detach().requires_grad_()
    exact = reference_loss(leaf, *arguments, **inputs.kwargs).loss
    torch.testing.assert_close(loss, exact, rtol=1e-12, atol=1e-12 * max(1.0, case.scale))
    weights = torch.linspace(1, 2, loss.numel(), dtype=loss.dtype).view(loss.shape)
    (grad,) = torch.autograd.grad((loss * weights).sum(), inputs.logits)
    (exact_grad,) = torch.autograd.grad((exact * weights).sum(), leaf)
    torch.testing.assert_close(grad, exact_grad, rtol=0, atol=1e-13)
    assert {"forward", "infonce", "backward"} <= set(CALLS)


def test_the_linear_path_and_phase_two_run_on_a_toy_backend(toy: str) -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(4, 3, 5, requires_grad=True), torch.randn(11, 5, requires_grad=True)
    labels, rewards = torch.randint(11, (4, 3)), torch.tensor([1.0, 0, 0, 1])
    for mib in (512, 2.0**-12):
        results = [
            linear_conspo_loss(hidden, weight, labels, rewards, 2, workspace_mib=mib, implementation=name)
            for name in (toy, "torch")
        ]
        grads = [torch.autograd.grad(loss, (hidden, weight)) for loss in results]
        torch.testing.assert_close(results[0], results[1])
        torch.testing.assert_close(grads[0], grads[1])
    logits, weights = hidden @ weight.T, torch.tensor([0.5, -0.5, 0.1, -0.1])
    losses = [weighted_score_loss(logits, labels, weights, implementation=name) for name in (toy, "torch")]
    torch.testing.assert_close(losses[0], losses[1])


def test_an_unknown_implementation_names_the_known_ones(toy: str) -> None:
    with pytest.raises(ValueError, match="'auto', 'triton', 'native', 'torch', 'toy', got 'toys'"):
        token_logprobs(torch.zeros(1, 1, 2), torch.zeros(1, 1, dtype=torch.long), implementation="toys")


# An objective on scores: the mean score of the negatives less that of the positives, group by group.


def score_gap(scores: Tensor, rewards: Tensor, ids: Tensor, reduction: str = "mean") -> Tensor:
    _, group = ids.unique(return_inverse=True)
    members = group == torch.arange(int(group.max()) + 1)[:, None]
    kinds = (members & (rewards > 0), members & (rewards <= 0))
    right, wrong = (torch.where(kind, scores, 0).sum(1) / kind.sum(1).clamp(min=1) for kind in kinds)
    valid = kinds[0].any(1) & kinds[1].any(1)
    losses = torch.where(valid, wrong - right, 0)
    return losses if reduction == "none" else losses.sum() / (valid.sum() if reduction == "mean" else 1)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("ids", [[0, 0, 0, 1, 1, 1], [4, 1, 4, 1, 1, 9]], ids=["equal", "ids"])
def test_a_toy_objective_is_differentiated(ids: list[int], reduction: str) -> None:
    logits = torch.randn(6, 2, 3, dtype=torch.float64, requires_grad=True)
    labels, rewards = torch.randint(3, (6, 2)), torch.tensor([1.0, 0, 0, 1, 1, 0])

    def loss(logits: Tensor) -> Tensor:
        scores = sequence_scores(token_logprobs(logits, labels), labels)
        return score_gap(scores, rewards, torch.tensor(ids), reduction)

    assert torch.autograd.gradcheck(loss, logits)


def test_a_toy_objective_trains() -> None:
    torch.manual_seed(0)
    table = torch.zeros(4, 3, 7, requires_grad=True)
    labels, rewards = torch.randint(7, (4, 3)), torch.tensor([1.0, 0, 0, 1])
    optimizer = torch.optim.SGD([table], lr=1.0)
    losses = []
    for _ in range(20):
        loss = score_gap(sequence_scores(token_logprobs(table, labels), labels), rewards, torch.tensor([0, 0, 1, 1]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 1
