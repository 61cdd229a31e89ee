"""What is timed of the logits path: ops, the bytes that they have to move, providers, and the correctness gate."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.rivals.baselines import IGNORE, conspo_loss_of, eager_entropy, infonce, masked, rivals, scores_of
from benchmarks.rivals.peers import advantages_of, group_losses, peers
from benchmarks.timing.measure import Call
from benchmarks.timing.shapes import SCORES, Shape
from conspo_kernels import conspo_loss, conspo_loss_from_scores, token_logprobs
from conspo_kernels.backends.registry import backend_for
from conspo_kernels.values import IGNORED, LogitRows, LogitTransform, accumulated

OURS = "conspo_kernels"
THREE_LAUNCHES = "conspo_kernels, three launches"
TAU, MARGIN = 0.5, 0.25
ENTROPY_SHARE = 0.25
GATE = 1e-4  # nats: ten times what the library promises
GATE_ROWS = 8  # rows of the gradient that are compared with fp64
EXACT_ROWS = 64  # rows of logits that are in fp64 at a time


class Op(NamedTuple):
    """What is timed.

    alone: only the backward, after a forward that is not timed.  known: the coefficients are, so that forward computes
    the gradient too.  entropy: of each distribution, and its gradient.
    """

    name: str
    backward: bool = False
    inplace: bool = False
    loss: bool = False
    known: bool = False
    alone: bool = False
    entropy: bool = False

    def bytes(self, shape: Shape) -> int:
        """What has to be read and written: ignored rows and those without a gradient are written only."""
        forward = shape.response_tokens
        used = shape.contrasted_tokens if self.loss else shape.response_tokens
        rows = used + shape.tokens if self.backward else 0
        if not self.known and not self.alone:  # known: R W, if the caches hold a row
            rows += forward
        return rows * shape.row_bytes

    def operations(self, shape: Shape) -> int:
        """Four per logit in forward (maximum, difference, exponential, sum), and in backward; two more for entropy."""
        forward = 0 if self.alone else shape.response_tokens
        used = shape.contrasted_tokens if self.loss else shape.response_tokens
        return (6 if self.entropy else 4) * (forward + (used if self.backward else 0)) * shape.vocab_size


OPS = {
    op.name: op
    for op in (
        Op("forward"),
        Op("forward + backward", backward=True),
        Op("forward + in-place backward", backward=True, inplace=True),
        Op("in-place backward", backward=True, inplace=True, alone=True),
        Op("known coefficients, in place", backward=True, inplace=True, known=True),
        Op("loss + backward", backward=True, inplace=True, loss=True),
        Op("forward with entropy", entropy=True),
        Op("in-place backward with entropy", backward=True, inplace=True, alone=True, entropy=True),
    )
}


class Inputs(NamedTuple):
    """labels: IGNORE where no response token is.  mask: where they are, None if everywhere.

    grad: of the log-probabilities; that of the entropies is `ENTROPY_SHARE` of it.
    """

    logits: Tensor
    labels: Tensor
    rewards: Tensor
    grad: Tensor
    group_size: int
    mask: Tensor | None
    softcap: float | None = None

    @staticmethod
    def from_shape(shape: Shape, device: torch.device) -> Inputs:
        torch.manual_seed(0)
        size = (shape.rollouts, shape.length)
        logits = torch.randn(*size, shape.vocab_size, dtype=shape.dtype, device=device).mul_(3)
        labels = torch.randint(shape.vocab_size, size, device=device)
        if shape.peaked:  # at the label, but for every eighth position: policies mostly sample their own mode
            position = torch.arange(shape.length, device=device)
            peak = torch.where(position % 8 == 7, (labels + 1) % shape.vocab_size, labels)
            logits.scatter_(-1, peak[..., None], 30.0)
        grad = torch.rand(size, device=device) + 0.5
        mask = None
        if shape.skewed:
            mask = torch.arange(shape.length, device=device) < torch.tensor(shape.lengths, device=device)[:, None]
            labels, grad = labels.masked_fill(~mask, IGNORE), grad * mask
        rewards = torch.tensor(shape.rights, device=device).float()
        return Inputs(logits, labels, rewards, grad, shape.group_size, mask, shape.softcap)

    def upstream(self, op: Op) -> Tensor:
        """The gradient that comes in: [B, T], or with entropies [2, B, T]."""
        return torch.stack([self.grad, ENTROPY_SHARE * self.grad]) if op.entropy else self.grad


class Candidate(NamedTuple):
    """compute: logits to log-probabilities or to the loss; with known coefficients, to the gradient as well.

    rounds_to: the precision that its softmax is kept in.
    objective: of log-probabilities [B, T], what its loss is where it is not ConSPO's.
    package: what has to be installed.
    """

    compute: Callable[[Tensor], Tensor | tuple[Tensor, Tensor]]
    rounds_to: torch.dtype
    objective: Callable[[Tensor], Tensor] | None = None
    package: str | None = None


def candidates(op: Op, inputs: Inputs, implementation: str) -> dict[str, Candidate]:
    """Who computes an op: the library, then its rivals."""
    if op.known:  # which no rival has
        return _known(inputs, implementation)
    logits, labels, rewards, _grad, group_size, mask, softcap = inputs
    options = {"softcap": softcap, "inplace_backward": op.inplace, "implementation": implementation}

    def ours(logits: Tensor) -> Tensor:
        if op.loss:
            numbers = {"tau": TAU, "margin": MARGIN}
            return conspo_loss(logits, labels, rewards, group_size, **numbers, **options)  # type: ignore[arg-type, return-value]
        if op.entropy:
            return torch.stack(token_logprobs(logits, labels, return_entropy=True, **options))  # type: ignore[call-overload]
        return token_logprobs(logits, labels, **options)  # type: ignore[call-overload]

    providers = {OURS: Candidate(ours, torch.float32)}
    readable = labels.clamp(min=0)
    for rival in (*rivals(logits.dtype, softcap), *peers(logits.device, op.inplace, softcap)):
        logprobs = rival.with_entropy if op.entropy else rival.token_logprobs
        if logprobs is None or rival.softcap != softcap or (op.alone and rival.in_forward):
            continue
        function = (conspo_loss_of if op.loss else masked)(logprobs)
        function = torch.compile(function) if rival.compiled else function
        arguments = (labels if rival.ignores else readable, mask)
        arguments += (rewards, group_size, TAU, MARGIN) if op.loss else ()
        compute = lambda logits, function=function, arguments=arguments: function(logits, *arguments)  # noqa: E731
        providers[rival.name] = Candidate(compute, rival.rounds_to or logits.dtype, package=rival.package)
    advantages = advantages_of(rewards, group_size)
    for peer in group_losses(logits.device) if op.loss and softcap is None else ():
        compute = lambda logits, peer=peer: peer.loss(logits, readable, advantages, mask)  # noqa: E731
        objective = lambda logprobs, peer=peer: peer.of_logprobs(logprobs, advantages, mask)  # noqa: E731
        providers[peer.name] = Candidate(compute, torch.float32, objective, peer.package)
    return providers


def _known(inputs: Inputs, implementation: str) -> dict[str, Candidate]:
    logits, labels = inputs.logits, inputs.labels
    backend = backend_for(implementation, logits.device)
    aligned = torch.where(labels == IGNORE, IGNORED, labels)
    coefficients = inputs.grad.to(accumulated(logits.dtype))
    transform = LogitTransform(softcap=inputs.softcap)

    def known(logits: Tensor) -> tuple[Tensor, Tensor]:
        return backend.token_logprob_forward_backward(
            logits, LogitRows(logits, aligned, transform), coefficients
        ), logits

    def three_launches(logits: Tensor) -> tuple[Tensor, Tensor]:
        """What `known` does where no cache holds a row: statistics, their sum, and the gradient."""
        rows = LogitRows(logits, aligned, transform)
        statistics = backend.token_logprob_forward(rows, False)
        backend.token_logprob_backward(logits, rows, statistics.incoming(coefficients))
        return statistics.logprobs, logits

    return {OURS: Candidate(known, torch.float32), THREE_LAUNCHES: Candidate(three_launches, torch.float32)}


def call(op: Op, candidate: Candidate, inputs: Inputs) -> Call:
    """What is timed. Each repeat of a backward gets a fresh copy of the logits, as some write over them."""
    if not op.backward:
        return Call(lambda: inputs.logits, torch.no_grad()(candidate.compute))
    base = inputs.logits.detach().requires_grad_(not op.known)
    if op.known:
        return Call(lambda: base * 1, candidate.compute)

    def forward() -> tuple[Tensor, Tensor]:
        logits = base * 1
        return logits, candidate.compute(logits)  # type: ignore[return-value]

    def backward(state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        logits, out = state
        (grad,) = torch.autograd.grad(out, logits, None if op.loss else inputs.upstream(op).to(out.dtype))
        return out.detach(), grad

    if op.alone:
        return Call(forward, backward)
    return Call(lambda: base * 1, lambda logits: backward((logits, candidate.compute(logits))))  # type: ignore[arg-type]


class Exact(NamedTuple):
    """In fp64: all log-probabilities and entropies, and of the first rows their slopes by the logits."""

    logprobs: Tensor
    entropies: Tensor
    slopes: Tensor
    entropy_slopes: Tensor
    inputs: Inputs

    @staticmethod
    def from_inputs(inputs: Inputs) -> Exact:
        rows = inputs.logits.detach().flatten(0, 1)
        labels = inputs.labels.flatten().clamp(min=0)
        parts = [
            eager_entropy(part.double(), label, inputs.softcap)
            for part, label in zip(rows.split(EXACT_ROWS), labels.split(EXACT_ROWS), strict=True)
        ]
        logprobs, entropies = torch.cat(parts, dim=1).view(2, *inputs.labels.shape)
        if inputs.mask is not None:
            logprobs, entropies = logprobs * inputs.mask, entropies * inputs.mask
        first = rows[:GATE_ROWS].double().requires_grad_()
        values = eager_entropy(first, labels[:GATE_ROWS], inputs.softcap)
        slopes, entropy_slopes = (
            torch.autograd.grad(value.sum(), first, retain_graph=True)[0] for value in values
        )  # a row's values depend on no other row
        return Exact(logprobs, entropies, slopes, entropy_slopes, inputs)

    def loss(self, objective: Callable[[Tensor], Tensor] | None) -> tuple[Tensor, Tensor]:
        """An objective, None for ConSPO's, and its derivatives by the log-probabilities."""
        logprobs = self.logprobs.clone().requires_grad_()
        if objective is None:
            scores = scores_of(logprobs, self.inputs.mask)
            loss = infonce(scores, self.inputs.rewards, self.inputs.group_size, TAU, MARGIN)
        else:
            loss = objective(logprobs)
        return loss.detach(), torch.autograd.grad(loss, logprobs)[0]


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
    output = timed.run(timed.prepare())
    value, grad = output if op.backward else (output, None)  # type: ignore[misc]
    expected, coefficients = exact.loss(candidate.objective) if op.loss else (exact.logprobs, inputs.grad)
    if op.entropy:
        expected = torch.stack([expected, exact.entropies])
    allowed = GATE + torch.finfo(candidate.rounds_to).eps * exact.logprobs.abs().max().item()
    value_error = (value.double() - expected).abs().max().item()
    if grad is None:
        return Errors(value_error, allowed, None, None)
    rows = grad.flatten(0, 1)[:GATE_ROWS].double()
    slopes = exact.slopes + ENTROPY_SHARE * exact.entropy_slopes if op.entropy else exact.slopes
    expected_rows = slopes * coefficients.flatten()[:GATE_ROWS, None]
    largest = max(coefficients.abs().max().item(), expected_rows.abs().max().item())
    allowed_gradient = (torch.finfo(inputs.logits.dtype).eps + allowed) * largest
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
