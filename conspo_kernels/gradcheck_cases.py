"""The cases of the gradient check: every door with its options, and what the oracle and eager PyTorch make of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from . import (
    ConSPOOutput,
    conspo_loss,
    conspo_loss_from_scores,
    conspo_scores,
    reference,
    sequence_scores,
    token_logprobs,
)

GRADED = {  # the outputs of each door that have a gradient
    "token_logprobs": ("logprobs", "entropy"),
    "sequence_scores": ("scores",),
    "conspo_loss": ("loss",),
    "conspo_loss_from_scores": ("loss",),
    "conspo_scores": (),
}
OWN_OPTIONS = {"inplace_backward", "return_entropy"}  # no business of the oracle's

# Tokens per rollout and vocabulary. Of small, no tile is full; wide has full tiles and a tail; model is Qwen's size.
SHAPES = {
    "small": ((2, 1, 2, 1, 1, 2, 1, 1), 61),
    "wide": ((3, 1, 2, 4, 1, 2, 2, 1), 4099),
    "model": ((1, 1, 2, 1), 151_936),
    "long": ((700, 1, 30, 257), 5),
}
REWARDS = (1.0, 0.0, 1.0, 0.0, 0.0, 1.0, 1.0, 1.0)
PROMPT_IDS = (7, 7, -3, -3, 7, -3, 9, 9)  # 9 has no negative
UNSCORABLE, EMPTY = 2, 4  # the rollouts with a NaN reward, and without a response token


@dataclass(frozen=True)
class Case:
    """A door (`op`) and what it is given.

    groups: their size, or None for prompt ids.  mask: prompts are under a mask rather than at ignore_index.  gaps: a
    NaN reward and an empty rollout.  view: the logits are a slice.  masked: -inf at the head of the vocabulary.
    without: an output left out of the gradient.
    """

    op: str
    name: str
    options: dict[str, Any] = field(default_factory=dict)
    packed: bool = False
    groups: int | None = 4
    mask: bool = False
    gaps: bool = False
    view: bool = False
    masked: bool = False
    without: str | None = None

    @property
    def graded(self) -> list[str]:
        """The outputs that take part in the gradient."""
        absent = {self.without, None if self.options.get("return_entropy") else "entropy"}
        return [name for name in GRADED[self.op] if name not in absent]


CAPPED = {"softcap": 3.0, "logit_scale": 0.6, "temperature": 1.3}
CASES = (
    Case("token_logprobs", "padded, temperature", {"temperature": 0.7}),
    Case("token_logprobs", "packed, shift, mask, softcap", {"shift": True, **CAPPED}, packed=True, mask=True),
    Case("token_logprobs", "a view, -inf entries, logit_scale", {"logit_scale": 0.3}, view=True, masked=True),
    Case("token_logprobs", "in place, softcap", {"inplace_backward": True, **CAPPED}),
    Case("token_logprobs", "entropy, -inf entries, temperature", {"return_entropy": True, "temperature": 0.7},
         masked=True),
    Case("token_logprobs", "entropy, packed, softcap, -inf entries", {"return_entropy": True, **CAPPED},
         packed=True, masked=True),
    Case("token_logprobs", "entropy, in place", {"return_entropy": True, "inplace_backward": True}),
    Case("token_logprobs", "entropy alone", {"return_entropy": True}, without="logprobs"),
    Case("sequence_scores", "padded, an empty rollout", gaps=True),
    Case("sequence_scores", "packed, shift, mask", {"shift": True}, packed=True, mask=True, gaps=True),
    Case("conspo_loss", "padded, temperature, tau, margin", {"temperature": 0.7, "tau": 0.5, "margin": 0.3}),
    Case("conspo_loss", "packed, softcap, ragged ids", {"tau": 2.0, **CAPPED}, packed=True, groups=None, gaps=True),
    Case("conspo_loss", "padded, shift, mask, in place",
         {"shift": True, "inplace_backward": True, "temperature": 0.7}, mask=True, gaps=True),
    Case("conspo_loss", "packed, shift, mask, in place, softcap",
         {"shift": True, "inplace_backward": True, **CAPPED}, packed=True, mask=True),
    Case("conspo_loss", "a view, reduction none, ragged ids",
         {"reduction": "none", "logit_scale": 1.5}, groups=None, view=True),
    Case("conspo_loss", "num_groups, -inf entries, a group not valid", {"num_groups": 7}, groups=2, masked=True),
    Case("conspo_loss_from_scores", "tau, margin", {"tau": 0.5, "margin": 0.3}),
    Case("conspo_loss_from_scores", "ragged ids, reduction none", {"reduction": "none"}, groups=None, gaps=True),
    Case("conspo_loss_from_scores", "sum, a group not valid", {"reduction": "sum", "tau": 2.0}, groups=2),
    Case("conspo_scores", "padded, temperature", {"temperature": 0.7}, gaps=True),
    Case("conspo_scores", "packed, shift, mask, softcap", {"shift": True, **CAPPED}, packed=True, mask=True),
)  # fmt: skip


@dataclass(frozen=True)
class Inputs:
    """leaf: what is differentiated by, the logits, log-probabilities or scores (of a view its base)."""

    leaf: Tensor
    labels: Tensor
    rewards: Tensor
    groups: int | Tensor
    options: dict[str, Any]

    def rollouts(self) -> list[list[tuple[int, int]]]:
        """Row and label of each rollout's response tokens."""
        options = self.options
        return reference.response_tokens(
            self.labels, options.get("mask"), options.get("cu_seqlens"), options.get("shift", False), -100
        )


def build(case: Case, shape: tuple[tuple[int, ...], int], dtype: torch.dtype, device: torch.device) -> Inputs:
    """The inputs of a case, the same for every implementation."""
    lengths, vocab_size = shape
    generator = torch.Generator().manual_seed(sum(map(ord, case.name)))
    shift = case.options.get("shift", False)
    lengths = tuple(n + shift for n in lengths)  # shifted, the first of a sequence has no prediction
    num_rollouts, longest = len(lengths), max(lengths)
    prompts = [n if case.gaps and s == EMPTY else min(s % 3, n - 1 - shift) for s, n in enumerate(lengths)]
    first = 1 if case.masked else 0
    keep = torch.zeros(num_rollouts, longest, dtype=torch.bool)
    for s, (prompt, n) in enumerate(zip(prompts, lengths, strict=True)):
        keep[s, prompt:n] = True
    labels = torch.randint(first, vocab_size, keep.shape, generator=generator)
    labels[~keep] = 10**6 if case.mask else -100  # labels under a mask are never looked at

    options = dict(case.options)
    if case.packed:
        inside = torch.arange(longest) < torch.tensor(lengths)[:, None]
        labels, keep = (torch.cat([x[inside], x.new_ones(2)]) for x in (labels, keep))  # past the last offset: nonsense
        options["cu_seqlens"] = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    if case.mask:
        options["mask"] = keep.to(device)
    rewards = torch.tensor(REWARDS[:num_rollouts])
    if case.gaps:
        rewards[UNSCORABLE : UNSCORABLE + 1] = torch.nan
    groups = torch.tensor(PROMPT_IDS[:num_rollouts]) if case.groups is None else min(case.groups, num_rollouts)

    if case.op == "conspo_loss_from_scores":
        leaf = torch.randn(num_rollouts, generator=generator, dtype=torch.float64) - 3
        if case.gaps:
            leaf[EMPTY : EMPTY + 1] = torch.nan
        options = {k: v for k, v in options.items() if k not in ("mask", "cu_seqlens")}
    elif case.op == "sequence_scores":
        leaf = -3 * torch.rand(labels.shape, generator=generator, dtype=torch.float64)
    else:
        sizes = [n + case.view for n in labels.shape]
        leaf = 3 * torch.randn(*sizes, vocab_size + 3 * case.view, generator=generator, dtype=torch.float64)
        leaf[..., :first] = -torch.inf
    return Inputs(leaf.to(device, dtype).requires_grad_(), labels.to(device), rewards, groups, options)


def logits_of(case: Case, leaf: Tensor) -> Tensor:
    return leaf[:-1, :-1, :-3] if case.view else leaf


def call(case: Case, inputs: Inputs, leaf: Tensor, implementation: str) -> dict[str, Tensor]:
    """The outputs of the door."""
    options = {**inputs.options, "implementation": implementation}
    labels, rewards, groups = inputs.labels, inputs.rewards, inputs.groups
    if case.op == "conspo_loss_from_scores":
        loss = conspo_loss_from_scores(leaf, rewards, groups, **options)
        assert isinstance(loss, Tensor)
        return {"loss": loss}
    if case.op == "sequence_scores":
        return {"scores": sequence_scores(leaf, labels, **options)}
    logits = logits_of(case, leaf.clone())  # in-place gradients overwrite the clone
    if case.op == "conspo_scores":
        return {"scores": conspo_scores(logits, labels, **options)}
    if case.op == "conspo_loss":
        output = conspo_loss(logits, labels, rewards, groups, **options, return_metrics=True)
        assert isinstance(output, ConSPOOutput)
        assert output.logprobs is not None
        return {"loss": output.loss, "scores": output.scores, "logprobs": output.logprobs}
    tokens = token_logprobs(logits, labels, **options)
    return {"logprobs": tokens} if isinstance(tokens, Tensor) else dict(zip(GRADED[case.op], tokens, strict=True))


def exact(case: Case, inputs: Inputs, leaf: Tensor) -> dict[str, Tensor]:
    """The same from the oracle, for a leaf in fp64."""
    if case.op in ("conspo_loss_from_scores", "sequence_scores"):
        return eager(case, inputs, leaf)  # which takes the oracle's own parts, in the dtype of the leaf
    options = {k: v for k, v in inputs.options.items() if k not in OWN_OPTIONS}
    output = reference.reference_loss(logits_of(case, leaf), inputs.labels, inputs.rewards, inputs.groups, **options)
    return output._asdict()


def eager(case: Case, inputs: Inputs, leaf: Tensor) -> dict[str, Tensor]:
    """The same as plain PyTorch gives it: the log-softmax in the dtype of the logits, what follows in fp32."""
    options = inputs.options
    if case.op == "conspo_loss_from_scores":
        return {"loss": _loss(leaf, inputs)}
    rollouts = inputs.rollouts()
    if case.op == "sequence_scores":
        return {"scores": _scores(leaf.flatten(), rollouts)}
    logits = logits_of(case, leaf)
    y = logits.reshape(-1, logits.shape[-1]) * options.get("logit_scale", 1.0)
    if (softcap := options.get("softcap")) is not None:
        y = torch.where(y == -torch.inf, y, softcap * torch.tanh(y / softcap))
    full = torch.log_softmax(y / options.get("temperature", 1.0), dim=-1)
    rows, labels = torch.tensor([token for tokens in rollouts for token in tokens], device=leaf.device).unbind(1)
    nothing = full.new_zeros(len(full))
    logprobs = nothing.index_put((rows,), full[rows, labels])
    possible = full[rows][:, 1 if case.masked else 0 :]
    entropy = nothing.index_put((rows,), -(possible.exp() * possible).sum(-1))
    scores = _scores(logprobs.float(), rollouts)
    shape = inputs.labels.shape
    outputs = {"logprobs": logprobs.view(shape), "entropy": entropy.view(shape), "scores": scores}
    return {**outputs, "loss": _loss(scores, inputs)} if case.op == "conspo_loss" else outputs


def _scores(logprobs: Tensor, rollouts: Sequence[Sequence[tuple[int, int]]]) -> Tensor:
    scores = [reference.sequence_score([logprobs[row] for row, _ in tokens]) if tokens else None for tokens in rollouts]
    return torch.stack([logprobs.new_tensor(torch.nan) if score is None else score for score in scores])


def _loss(scores: Tensor, inputs: Inputs) -> Tensor:
    """The losses of the oracle's groups, reduced; a NaN score is that of an empty rollout."""
    options = inputs.options
    parts = reference.prompt_groups(inputs.groups, inputs.rewards, (~scores.isnan()).int().tolist(), 0.5)
    rows = list(scores.unbind())
    losses = reference.group_losses(rows, parts, options.get("tau", 1.0), options.get("margin", 0.0))
    if options.get("reduction") == "none":
        places = [g.members[0] for g in parts] if isinstance(inputs.groups, int) else range(len(rows))
        return torch.stack([losses.get(place, scores.new_zeros(())) for place in places])
    total = torch.stack(list(losses.values())).sum()
    return total if options.get("reduction") == "sum" else total / options.get("num_groups", len(losses))
