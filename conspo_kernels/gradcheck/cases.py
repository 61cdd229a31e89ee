"""The cases of the gradient check: every public function with its options, and the inputs of each."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .. import reference

GRADED = {  # the outputs of each public function that have a gradient
    "token_logprobs": ("logprobs", "entropy"),
    "sequence_scores": ("scores",),
    "conspo_loss": ("loss",),
    "conspo_loss_from_scores": ("loss",),
    "conspo_scores": (),
    "conspo_weights": (),
    "weighted_score_loss": ("loss",),
    "weighted_logprob_loss": ("loss",),
    "linear_token_logprobs": ("logprobs", "entropy"),
    "linear_conspo_loss": ("loss",),
    "linear_conspo_scores": (),
    "linear_weighted_score_loss": ("loss",),
    "linear_weighted_logprob_loss": ("loss",),
}
FROM_SCORES = ("conspo_loss_from_scores", "conspo_weights")
HIDDEN_SIZE = 6  # of the linear functions

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
    """A public function (`op`) and what it is given.

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
    def linear(self) -> bool:
        return self.op.startswith("linear_")

    @property
    def known(self) -> bool:
        """Whether the gradient is computed with the value, and a second backward raises."""
        return self.op.removeprefix("linear_").startswith("weighted_")

    @property
    def graded(self) -> list[str]:
        """The outputs that take part in the gradient."""
        absent = {self.without, None if self.options.get("return_entropy") else "entropy"}
        return [name for name in GRADED[self.op] if name not in absent]


TILES = {"workspace_mib": 1e-3}  # 1 KiB: backward computes the logits again, tile by tile
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
    Case("conspo_weights", "ragged ids, tau, margin", {"tau": 0.5, "margin": 0.3}, groups=None, gaps=True),
    Case("weighted_score_loss", "padded, temperature", {"temperature": 0.7}, gaps=True),
    Case("weighted_score_loss", "packed, shift, mask, softcap, in place", {"shift": True, "inplace": True, **CAPPED},
         packed=True, mask=True),
    Case("weighted_logprob_loss", "padded, temperature", {"temperature": 0.7}),
    Case("weighted_logprob_loss", "packed, shift, mask, softcap, in place", {"shift": True, "inplace": True, **CAPPED},
         packed=True, mask=True),
    Case("linear_token_logprobs", "padded, logits stored, temperature", {"temperature": 0.7}),
    Case("linear_token_logprobs", "packed, shift, mask, softcap, tiles", {"shift": True, **CAPPED, **TILES},
         packed=True, mask=True),
    Case("linear_token_logprobs", "entropy, softcap, tiles", {"return_entropy": True, **CAPPED, **TILES}),
    Case("linear_conspo_loss", "padded, shift, mask, tau, margin", {"shift": True, "tau": 0.5, "margin": 0.3},
         mask=True, gaps=True),
    Case("linear_conspo_loss", "packed, ragged ids, softcap, tiles", {"tau": 2.0, **CAPPED, **TILES}, packed=True,
         groups=None, gaps=True),
    Case("linear_conspo_scores", "padded, temperature, tiles", {"temperature": 0.7, **TILES}, gaps=True),
    Case("linear_weighted_score_loss", "padded, softcap", {**CAPPED}, gaps=True),
    Case("linear_weighted_score_loss", "packed, shift, mask, tiles", {"shift": True, **TILES}, packed=True, mask=True),
    Case("linear_weighted_logprob_loss", "padded, softcap", {**CAPPED}),
    Case("linear_weighted_logprob_loss", "packed, shift, mask, tiles", {"shift": True, **TILES}, packed=True,
         mask=True),
)  # fmt: skip


@dataclass(frozen=True)
class Inputs:
    """leaf: what is differentiated by, the logits (of a view its base), log-probabilities or scores; of a linear
    function hidden, weight and bias in one row.  known: the weights of rollouts, or coefficients shaped like labels,
    where the loss is a sum of these.
    """

    leaf: Tensor
    labels: Tensor
    rewards: Tensor
    groups: int | Tensor
    options: dict[str, Any]
    vocab_size: int
    known: Tensor

    def rollouts(self) -> list[list[tuple[int, int]]]:
        """Row and label of each rollout's response tokens."""
        options = self.options
        return reference.response_tokens(
            self.labels, options.get("response_mask"), options.get("cu_seqlens"), options.get("shift", False), -100
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
        options["response_mask"] = keep.to(device)
    rewards = torch.tensor(REWARDS[:num_rollouts])
    if case.gaps:
        rewards[UNSCORABLE : UNSCORABLE + 1] = torch.nan
    groups = torch.tensor(PROMPT_IDS[:num_rollouts]) if case.groups is None else min(case.groups, num_rollouts)

    if case.op in FROM_SCORES:
        leaf = torch.randn(num_rollouts, generator=generator, dtype=torch.float64) - 3
        if case.gaps:
            leaf[EMPTY : EMPTY + 1] = torch.nan
        options = {k: v for k, v in options.items() if k not in ("response_mask", "cu_seqlens")}
    elif case.op == "sequence_scores":
        leaf = -3 * torch.rand(labels.shape, generator=generator, dtype=torch.float64)
    elif case.linear:
        size = labels.numel() * HIDDEN_SIZE, vocab_size * HIDDEN_SIZE, vocab_size
        leaf = torch.randn(sum(size), generator=generator, dtype=torch.float64)
        leaf[size[0] : -vocab_size] *= 3 / math.sqrt(HIDDEN_SIZE)
    else:
        sizes = [n + case.view for n in labels.shape]
        leaf = 3 * torch.randn(*sizes, vocab_size + 3 * case.view, generator=generator, dtype=torch.float64)
        leaf[..., :first] = -torch.inf
    known = torch.linspace(-1, 1, num_rollouts) / num_rollouts
    if case.op.endswith("weighted_logprob_loss"):
        known = (torch.linspace(-1, 1, labels.numel()) / labels.numel()).view(labels.shape)
    leaf = leaf.to(device, dtype).requires_grad_()
    return Inputs(leaf, labels.to(device), rewards, groups, options, vocab_size, known)
