"""What is timed of the fused-linear path: each mode beside bare GEMMs, eager PyTorch and its rivals."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.rivals.baselines import IGNORE, log_softmax
from benchmarks.rivals.linear_peers import linear_peers
from benchmarks.timing.measure import Call
from benchmarks.timing.shapes import LinearShape
from conspo_kernels import linear_conspo_loss, linear_weighted_score_loss
from conspo_kernels.linear.tiles import Head
from conspo_kernels.ops.linear_logprob import linear_logprob
from conspo_kernels.ops.workspace import default_workspace
from conspo_kernels.values import IGNORED, LogitTransform

OURS = "conspo_kernels"
OURS_HALF = "conspo_kernels, half of the groups valid"
COEFFICIENT = 0.75  # of every log-probability: one number, as F.linear_cross_entropy sums them
GATE_ROWS = 8  # tokens, and entries of the vocabulary, whose gradients are compared with fp64
EXACT_ROWS = 64  # rows of logits that are in fp64 at a time


class Op(NamedTuple):
    """gemms: of 2 * N * H * V operations that it takes.  mode: of `linear/modes.py`, forced."""

    name: str
    gemms: int
    mode: str


OPS = {
    op.name: op
    for op in (
        Op("linear, no gradient", 1, "none"),
        Op("linear, recompute", 4, "recompute"),
        Op("linear, store", 3, "store"),
        Op("linear, known weights", 3, "known"),
        Op("linear, frozen head", 2, "frozen"),
        Op("linear loss", 4, "loss"),
    )
}


class Inputs(NamedTuple):
    hidden: Tensor  # [rollouts, length, H]
    weight: Tensor  # [V, H]
    labels: Tensor  # [rollouts, length]
    rewards: Tensor  # [rollouts]
    shape: LinearShape

    @staticmethod
    def from_shape(shape: LinearShape, device: torch.device) -> Inputs:
        torch.manual_seed(0)
        size = (shape.rollouts, shape.length)
        hidden = torch.randn(*size, shape.hidden_size, device=device).to(shape.dtype)
        weight = torch.randn(shape.vocab_size, shape.hidden_size, device=device)
        weight = (weight * (3 / math.sqrt(shape.hidden_size))).to(shape.dtype)
        labels = torch.randint(shape.vocab_size, size, device=device)
        rewards = (torch.arange(shape.rollouts) % shape.group_size < shape.group_size // 2).float()
        return Inputs(hidden, weight, labels, rewards, shape)

    def half_valid(self) -> Inputs:
        """The rollouts of every second group all right."""
        group = torch.arange(len(self.rewards)) // self.shape.group_size
        return self._replace(rewards=torch.where(group % 2 == 1, 1.0, self.rewards))

    def leaves(self, op: Op) -> list[Tensor]:
        leaves = [self.hidden.detach()]
        if op.mode != "frozen":
            leaves.append(self.weight.detach())
        return [x.requires_grad_(op.mode != "none") for x in leaves]


Compute = Callable[..., Tensor]  # hidden, weight -> log-probabilities [N], or their sum times COEFFICIENT


class Candidate(NamedTuple):
    """same_value: its value is compared in the gate, not only its gradients.  package: what has to be installed."""

    compute: Compute
    same_value: bool = True
    package: str | None = None


def ours(op: Op, inputs: Inputs, implementation: str) -> Compute:
    """Log-probabilities [N]; for known weights and the loss a scalar."""
    labels, shape = inputs.labels, inputs.shape
    aligned = torch.where(labels == IGNORE, IGNORED, labels).flatten()
    mib = shape.workspace_mib
    workspace = default_workspace(labels.device) if mib is None else mib * 2**20
    transform = LogitTransform(softcap=shape.softcap).to_numbers()
    options: dict[str, Any] = {"softcap": shape.softcap, "implementation": implementation}
    weights = torch.full((shape.rollouts,), COEFFICIENT * shape.length)

    def tokens(hidden: Tensor, weight: Tensor) -> Tensor:
        return linear_logprob(
            hidden=hidden.flatten(0, 1), weight=weight, bias=None, labels=aligned, indices=None, weight_grad=None,
            logits_dtype=hidden.dtype, transform=transform, with_entropy=False, mode=op.mode, workspace=workspace,
            implementation=implementation, vocab_start=0, vocab_group="", batch_invariant=False,
        )[0]  # fmt: skip

    def known(hidden: Tensor, weight: Tensor) -> Tensor:
        options["workspace_mib"] = shape.workspace_mib
        return linear_weighted_score_loss(hidden, weight, labels, weights, **options)  # type: ignore[arg-type]

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        # A third of the logits: the mode that is chosen is "recompute", as for any larger batch.
        mib = shape.tokens * shape.vocab_size * shape.dtype.itemsize / 3 / 2**20
        return linear_conspo_loss(
            hidden, weight, labels, inputs.rewards, shape.group_size, tau=0.5, workspace_mib=mib, **options
        )  # type: ignore[call-overload]

    return {"known": known, "loss": loss}.get(op.mode, tokens)


def eager(inputs: Inputs) -> Compute:
    def tokens(hidden: Tensor, weight: Tensor) -> Tensor:
        logits = F.linear(hidden.flatten(0, 1), weight)
        return log_softmax(logits, inputs.shape.softcap).gather(-1, inputs.labels.flatten()[:, None])[:, 0]

    return tokens


def linear_cross_entropy(inputs: Inputs) -> Compute:
    """In chunks, with the gradients computed in the forward pass: what it is for. (Its default is eager.)"""

    def summed(hidden: Tensor, weight: Tensor) -> Tensor:
        options = torch.nn.LinearCrossEntropyOptions()
        labels = inputs.labels.flatten()
        return -COEFFICIENT * F.linear_cross_entropy(
            hidden.flatten(0, 1), weight, labels, reduction="sum", options=options
        )

    return summed


def candidates(op: Op, inputs: Inputs, implementation: str) -> dict[str, Candidate]:
    providers = {OURS: Candidate(ours(op, inputs, implementation))}
    if op.mode == "loss":
        return {**providers, OURS_HALF: Candidate(ours(op, inputs.half_valid(), implementation))}
    providers["eager"] = Candidate(eager(inputs))
    softcap = inputs.shape.softcap
    if op.mode == "known" and softcap is None and hasattr(F, "linear_cross_entropy"):  # torch >= 2.13
        providers["F.linear_cross_entropy"] = Candidate(linear_cross_entropy(inputs))
    labels = inputs.labels.flatten()
    sizes = (inputs.shape.rollouts, inputs.shape.length)
    for peer in linear_peers(inputs.hidden.device, COEFFICIENT, sizes, softcap):
        if peer.softcap != softcap:
            continue
        if op.mode == "store" or (peer.summed and op.mode != "known"):
            continue  # what it does under "recompute"; its coefficients are known beforehand, ours there are not
        compute = lambda hidden, weight, peer=peer: peer.compute(hidden.flatten(0, 1), weight, labels)  # noqa: E731
        providers[peer.name] = Candidate(compute, peer.same_value, peer.package)
    return providers


def call(op: Op, compute: Compute, inputs: Inputs) -> Call:
    """Forward, and backward with the coefficients where there is one."""
    leaves = inputs.leaves(op)
    operands = [leaves[0], leaves[1] if len(leaves) > 1 else inputs.weight.detach()]
    per_token = torch.full((inputs.labels.numel(),), COEFFICIENT, device=inputs.labels.device)

    def run(_: object) -> tuple[Tensor, tuple[Tensor, ...]]:
        out = compute(*operands)
        if op.mode == "none":
            return out, ()
        return out.detach(), torch.autograd.grad(out, leaves, None if out.dim() == 0 else per_token.to(out.dtype))

    return Call(lambda: None, run)


def bare_gemms(op: Op, inputs: Inputs) -> Call:
    """The GEMMs that the op cannot do without, on one tile of the whole size."""
    hidden, weight = inputs.hidden.flatten(0, 1), inputs.weight
    logits = Head(weight, None, weight.dtype).new_logits(hidden.shape[0], weight.shape[0])  # as fast as they can be
    grad_hidden, grad_weight = torch.empty_like(hidden), torch.empty_like(weight)
    of_logits = {"none": 1, "recompute": 2, "loss": 2}.get(op.mode, 1)

    def run(_: object) -> None:
        for _ in range(of_logits):
            torch.mm(hidden, weight.t(), out=logits)
        if op.mode != "none":
            torch.mm(logits, weight, out=grad_hidden)
        if op.mode not in ("none", "frozen"):
            torch.mm(logits.t(), hidden, out=grad_weight)

    return Call(lambda: None, run)


class Exact(NamedTuple):
    """In fp64: all log-probabilities, and the gradients of some rows of hidden and of weight."""

    logprobs: Tensor
    hidden: Tensor
    weight: Tensor

    @staticmethod
    def from_inputs(inputs: Inputs) -> Exact:
        hidden, weight = inputs.hidden.flatten(0, 1).double(), inputs.weight.double()
        labels, softcap = inputs.labels.flatten(), inputs.shape.softcap
        logprobs, grad_hidden, grad_weight = [], [], hidden.new_zeros(GATE_ROWS, hidden.shape[1])
        for start in range(0, len(hidden), EXACT_ROWS):
            part = slice(start, start + EXACT_ROWS)
            z = hidden[part] @ weight.T
            y = log_softmax(z, softcap)
            logprobs.append(y.gather(1, labels[part, None])[:, 0])
            slope = -y.exp()
            slope.scatter_add_(1, labels[part, None], torch.ones_like(slope[:, :1]))
            slope *= COEFFICIENT
            if softcap is not None:  # d softcap tanh(z / softcap) / dz
                slope *= 1 - torch.tanh(z / softcap) ** 2
            if start == 0:
                grad_hidden.append(slope[:GATE_ROWS] @ weight)
            grad_weight += slope[:, :GATE_ROWS].T @ hidden[part]
        return Exact(torch.cat(logprobs), grad_hidden[0], grad_weight)


class Errors(NamedTuple):
    """Relative to the norm in fp64: that of the values, the worst of the gradients', and what is allowed."""

    value: float
    gradient: float
    allowed: float

    @property
    def ok(self) -> bool:
        return self.value <= self.allowed and self.gradient <= self.allowed


def errors(op: Op, candidate: Candidate, inputs: Inputs, exact: Exact) -> Errors:
    """The correctness gate: against what is wrong, not what is imprecise. The loss itself is gated by the tests."""
    out, grads = call(op, candidate.compute, inputs).run(None)  # type: ignore[misc]
    logprobs = exact.logprobs
    if out.dim() == 0:
        logprobs = COEFFICIENT * logprobs.sum()

    def relative(actual: Tensor, truth: Tensor) -> float:
        return ((actual.double() - truth).norm() / truth.norm()).item()

    value = relative(out, logprobs) if candidate.same_value else 0.0
    expected = (exact.hidden, exact.weight)
    differences = [relative(g.flatten(0, -2)[:GATE_ROWS], e) for g, e in zip(grads, expected, strict=False)]
    return Errors(value, max(differences, default=0.0), 4 * torch.finfo(inputs.shape.dtype).eps + 1e-5)
