"""The ops of the logits path as things to time: what they have to move, who computes them, and whether it is right."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from conspo_kernels import conspo_loss, conspo_loss_from_scores, token_logprobs
from conspo_kernels.kernels.transform import LogitTransform
from conspo_kernels.ops.implementation import twin

from .baselines import conspo_loss_of, infonce, rivals
from .measure import Call
from .shapes import SCORES, Shape

OURS = "conspo_kernels"
TAU, MARGIN = 0.5, 0.25
GATE = 1e-4  # nats: ten times what the library promises
GATE_ROWS = 8  # rows of the gradient that are compared with fp64
EXACT_ROWS = 64  # rows of logits that are in fp64 at a time


class Op(NamedTuple):
    """passes: what has to be read and written, in units of the logits' bytes."""

    name: str
    passes: int
    backward: bool = False
    inplace: bool = False
    loss: bool = False
    known: bool = False  # the coefficients, so that forward computes the gradient too


OPS = {
    op.name: op
    for op in (
        Op("forward", 1),
        Op("forward + backward", 3, backward=True),
        Op("forward + in-place backward", 3, backward=True, inplace=True),
        Op("known coefficients, in place", 2, backward=True, inplace=True, known=True),  # R W, if the caches hold a row
        Op("loss + backward", 3, backward=True, inplace=True, loss=True),
    )
}


class Inputs(NamedTuple):
    logits: Tensor
    labels: Tensor
    rewards: Tensor
    grad: Tensor  # of the log-probabilities
    group_size: int

    @staticmethod
    def of(shape: Shape, device: torch.device) -> Inputs:
        torch.manual_seed(0)
        size = (shape.rollouts, shape.length)
        logits = torch.randn(*size, shape.vocab_size, dtype=shape.dtype, device=device).mul_(3)
        labels = torch.randint(shape.vocab_size, size, device=device)
        rewards = (torch.arange(shape.rollouts, device=device) % shape.group_size < shape.group_size // 2).float()
        return Inputs(logits, labels, rewards, torch.rand(size, device=device) + 0.5, shape.group_size)


class Candidate(NamedTuple):
    """compute: logits to log-probabilities or to the loss; with known coefficients, to the gradient as well.

    rounds_to: the precision that its softmax is kept in.
    """

    compute: Callable[[Tensor], Tensor | tuple[Tensor, Tensor]]
    rounds_to: torch.dtype


def candidates(op: Op, inputs: Inputs, implementation: str) -> dict[str, Candidate]:
    """Who computes an op: the library, then its rivals."""
    logits, labels, rewards, _grad, group_size = inputs

    def ours(logits: Tensor) -> Tensor:
        if op.loss:
            return conspo_loss(
                logits, labels, rewards, group_size, tau=TAU, margin=MARGIN, inplace_backward=op.inplace,
                implementation=implementation,
            )  # type: ignore[return-value]  # fmt: skip
        return token_logprobs(logits, labels, inplace_backward=op.inplace, implementation=implementation)  # type: ignore[return-value]

    if op.known:  # which no rival has
        kernels = twin("token_logprob", implementation, logits.device)
        coefficients = inputs.grad.to(torch.float64 if logits.dtype == torch.float64 else torch.float32)

        def known(logits: Tensor) -> tuple[Tensor, Tensor]:
            return kernels.forward_backward(logits, logits, labels, coefficients, -100, LogitTransform()), logits

        return {OURS: Candidate(known, torch.float32)} if hasattr(kernels, "forward_backward") else {}
    found = {OURS: Candidate(ours, torch.float32)}
    for rival in rivals(inputs.logits.dtype):
        function = conspo_loss_of(rival.token_logprobs) if op.loss else rival.token_logprobs
        function = torch.compile(function) if rival.compiled else function
        others = (labels, rewards, group_size, TAU, MARGIN) if op.loss else (labels,)
        compute = lambda logits, function=function, others=others: function(logits, *others)  # noqa: E731
        found[rival.name] = Candidate(compute, rival.rounds_to or inputs.logits.dtype)
    return found


def call(op: Op, candidate: Candidate, inputs: Inputs) -> Call:
    """What is timed. Each repeat of a backward gets a fresh copy of the logits, as some write over them."""
    if not op.backward:
        return Call(lambda: inputs.logits, torch.no_grad()(candidate.compute))
    base = inputs.logits.detach().requires_grad_(not op.known)
    if op.known:
        return Call(lambda: base * 1, candidate.compute)

    def run(logits: Tensor) -> tuple[Tensor, Tensor]:
        out = candidate.compute(logits)
        (grad,) = torch.autograd.grad(out, logits, None if op.loss else inputs.grad.to(out.dtype))
        return out.detach(), grad

    return Call(lambda: base * 1, run)


class Exact(NamedTuple):
    """In fp64: all log-probabilities, the loss, and the gradients of the first rows for either op."""

    logprobs: Tensor
    loss: Tensor
    grad_logprobs: Tensor
    grad_loss: Tensor
    coefficients: Tensor  # of the loss, per token

    @staticmethod
    def of(inputs: Inputs) -> Exact:
        rows = inputs.logits.flatten(0, 1)
        labels = inputs.labels.flatten()
        parts = [
            part.double().log_softmax(-1).gather(1, label[:, None])[:, 0]
            for part, label in zip(rows.split(EXACT_ROWS), labels.split(EXACT_ROWS), strict=True)
        ]
        logprobs = torch.cat(parts).view(inputs.labels.shape).requires_grad_()
        loss = infonce(logprobs.mean(1), inputs.rewards, inputs.group_size, TAU, MARGIN)
        (coefficients,) = torch.autograd.grad(loss, logprobs)
        slope = -rows[:GATE_ROWS].double().softmax(-1)
        slope[torch.arange(len(slope)), labels[:GATE_ROWS]] += 1

        def scaled(c: Tensor) -> Tensor:
            return slope * c.flatten()[:GATE_ROWS, None]

        return Exact(logprobs.detach(), loss.detach(), scaled(inputs.grad), scaled(coefficients), coefficients)


class Errors(NamedTuple):
    """Largest errors against fp64, and what the precision of the softmax and of the gradient allows."""

    value: float
    value_allowed: float
    gradient: float | None
    gradient_allowed: float | None

    @property
    def ok(self) -> bool:
        """NaN compares as false."""
        gradient = self.gradient is None or self.gradient <= self.gradient_allowed  # type: ignore[operator]
        return self.value <= self.value_allowed and gradient


def errors(op: Op, candidate: Candidate, inputs: Inputs, exact: Exact) -> Errors:
    """The correctness gate that a candidate passes before it is timed: against what is wrong, not what is imprecise.

    F.cross_entropy in fp32, for one, is off by 2e-5 at 150,000 logits.
    """
    timed = call(op, candidate, inputs)
    found = timed.run(timed.prepare())
    value, grad = found if op.backward else (found, None)  # type: ignore[misc]
    expected = exact.loss if op.loss else exact.logprobs
    allowed = GATE + torch.finfo(candidate.rounds_to).eps * exact.logprobs.abs().max().item()
    value_error = (value.double() - expected).abs().max().item()
    if grad is None:
        return Errors(value_error, allowed, None, None)
    rows = grad.flatten(0, 1)[:GATE_ROWS].double()
    expected_rows, coefficients = (
        (exact.grad_loss, exact.coefficients) if op.loss else (exact.grad_logprobs, inputs.grad)
    )
    allowed_gradient = (torch.finfo(inputs.logits.dtype).eps + allowed) * coefficients.abs().max().item()
    return Errors(value_error, allowed, (rows - expected_rows).abs().max().item(), allowed_gradient)


def _scores(device: torch.device) -> tuple[Tensor, Tensor]:
    num_groups, group_size = SCORES
    torch.manual_seed(0)
    scores = torch.randn(num_groups * group_size, device=device).requires_grad_()
    return scores, (torch.arange(len(scores), device=device) % group_size < group_size // 2).float()


def score_calls(device: torch.device, implementation: str) -> dict[str, Call]:
    """The objective alone, scores [groups * rollouts] to loss and gradient."""
    scores, rewards = _scores(device)
    group_size = SCORES[1]
    compiled = torch.compile(infonce)

    def timed(loss: Callable[[], Tensor]) -> Call:
        return Call(lambda: None, lambda _: torch.autograd.grad(loss(), scores))

    return {
        OURS: timed(
            lambda: conspo_loss_from_scores(
                scores, rewards, group_size, tau=TAU, margin=MARGIN, implementation=implementation
            )  # type: ignore[arg-type, return-value]
        ),
        "eager": timed(lambda: infonce(scores, rewards, group_size, TAU, MARGIN)),
        "torch.compile": timed(lambda: compiled(scores, rewards, group_size, TAU, MARGIN)),
    }


def exact_weights(device: torch.device) -> Tensor:
    """The gradient of `score_calls` in fp64."""
    scores, rewards = _scores(device)
    exact = scores.detach().double().requires_grad_()
    return torch.autograd.grad(infonce(exact, rewards, SCORES[1], TAU, MARGIN), exact)[0]
