"""Where log-probabilities come from: logits, or hidden states and the weight of the head.

Both sources offer the same, for tokens [B, T]:

    logprobs           log-probabilities and entropies (empty unless asked for), with a graph where grad mode is on
    forward_backward   the gradient for known coefficients [B, T]; None: it cannot be computed before the backward
    skips_tokens       whether dropping tokens saves work

`inputs/sources.py` makes them of arguments; nothing is checked here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from .ops.devices import true_indices
from .ops.forward_backward import linear_logprob_forward_backward, token_logprob_forward_backward
from .ops.linear_logprob import linear_logprob
from .ops.ranks import name_of
from .ops.token_logprob import token_logprob
from .ops.workspace import logits_fit
from .parallel import Parallel
from .values import Tokens


@dataclass(kw_only=True)
class LabelledRows:
    """The public argument that labels belong to, row by row.

    shape: of its tokens, as the user passed them.  dtype: of log-probabilities.  vocab_size: labels are smaller; or
    NOT_CHECKED, or ON_ALL_RANKS.
    """

    name: str
    shape: tuple[int, ...]
    device: torch.device
    dtype: torch.dtype
    vocab_size: int
    parallel: Parallel
    implementation: str


class KnownGradients(NamedTuple):
    """Arguments of `weighted_sum`: logits or hidden states x, the head's weight and bias, and their gradients or None.

    weight_grad: a buffer to which the gradient of weight is added, or None.
    """

    x: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    grad_x: Tensor | None = None
    grad_weight: Tensor | None = None
    grad_bias: Tensor | None = None
    weight_grad: Tensor | None = None


@dataclass(kw_only=True)
class UserValues(LabelledRows):
    """Log-probabilities or scores that the user passed, in fp32 or fp64, in place of a source."""

    values: Tensor


@dataclass(kw_only=True)
class LogitsSource(LabelledRows):
    """logits: [B, T, V], of packed tokens [1, N, V].  user_logits: as the user passed them, perhaps a DTensor.

    transform, vocab_start, vocab_group: as of `token_logprob`.  inplace: the gradient is written over the logits.
    """

    user_logits: Tensor
    logits: Tensor
    transform: list[float]
    vocab_start: int
    vocab_group: str
    inplace: bool
    skips_tokens: ClassVar[bool] = False

    def logprobs(self, tokens: Tokens, with_entropy: bool = False) -> tuple[Tensor, Tensor]:
        logprobs, entropy, _row_max, _log_sum = token_logprob(
            logits=self.logits,
            labels=tokens.labels,
            transform=self.transform,
            with_entropy=with_entropy,
            inplace_backward=self.inplace and self.logits.requires_grad and torch.is_grad_enabled(),
            implementation=self.implementation,
            vocab_start=self.vocab_start,
            vocab_group=self.vocab_group,
        )
        return logprobs, entropy

    def forward_backward(self, tokens: Tokens, coefficients: Tensor) -> tuple[Tensor, KnownGradients] | None:
        if not (torch.is_grad_enabled() and self.logits.requires_grad) or self.vocab_group:
            return None  # with a split vocabulary the gradient needs the statistics of all ranks first
        if torch.compiler.is_compiling():
            return None  # compiled, its product with what comes in would be one more pass over all logits
        z = self.logits.detach()
        logprobs, gradient = token_logprob_forward_backward(
            logits=z,
            labels=tokens.labels,
            coefficients=coefficients,
            grad_logits=z if self.inplace else None,
            transform=self.transform,
            implementation=self.implementation,
        )
        gradient = (z if self.inplace else gradient).view(self.user_logits.shape)
        return logprobs, KnownGradients(x=self.user_logits, grad_x=gradient)


@dataclass(kw_only=True)
class HiddenSource(LabelledRows):
    """Hidden states [N, H] and the head's weight [V, H] and bias [V], in the dtype of the GEMMs.

    transform: as of `token_logprob`.  workspace: bytes for tiles of logits.  synchronize: wait for the device once, to
    learn which tokens take part.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    transform: list[float]
    workspace: int
    logits_dtype: torch.dtype
    weight_grad: Tensor | None
    batch_invariant: bool
    synchronize: bool
    skips_tokens: ClassVar[bool] = True

    @property
    def needs(self) -> list[bool]:
        """Whether hidden, weight and bias need a gradient."""
        grad_mode = torch.is_grad_enabled()
        return [grad_mode and x is not None and x.requires_grad for x in (self.hidden, self.weight, self.bias)]

    def mode(self, with_entropy: bool) -> str:
        """The mode of `linear/modes.py` with the fewest GEMMs."""
        needs = self.needs
        if not any(needs):
            return "none"
        if not any(needs[1:]) and not with_entropy:
            return "frozen"
        if self.weight_grad is not None or self.batch_invariant:
            return "recompute"
        fits = logits_fit(self.hidden, self.weight, self.bias, self.logits_dtype, self.workspace)
        return "store" if fits else "recompute"

    def _indices(self, tokens: Tokens) -> Tensor | None:
        """[n] int64 indices of the tokens to compute. None: all of them, or the op looks at labels on the CPU."""
        if self.device.type == "cpu":
            return None  # the op can look at the labels
        mask = tokens.mask
        if self.synchronize:
            active = tokens.active.cpu()
            mask = active if mask is None else active & mask
        return None if mask is None else true_indices(mask=mask.flatten(), device=self.device)

    def logprobs(self, tokens: Tokens, with_entropy: bool = False) -> tuple[Tensor, Tensor]:
        logprobs, entropy, *_ = linear_logprob(
            hidden=self.hidden,
            weight=self.weight,
            bias=self.bias,
            labels=tokens.labels.flatten(),
            indices=self._indices(tokens),
            weight_grad=self.weight_grad,
            logits_dtype=self.logits_dtype,
            transform=self.transform,
            with_entropy=with_entropy,
            mode=self.mode(with_entropy),
            workspace=self.workspace,
            implementation=self.implementation,
            vocab_start=self.parallel.vocab_start,
            vocab_group=name_of(self.parallel.vocab),
            batch_invariant=self.batch_invariant,
        )
        return logprobs.view(tokens.labels.shape), entropy

    def forward_backward(self, tokens: Tokens, coefficients: Tensor) -> tuple[Tensor, KnownGradients] | None:
        needs = self.needs
        if not any(needs) or self.parallel.vocab is not None:
            return None
        logprobs, *gradients = linear_logprob_forward_backward(
            hidden=self.hidden.detach(),
            weight=self.weight.detach(),
            bias=None if self.bias is None else self.bias.detach(),
            labels=tokens.labels.flatten(),
            indices=self._indices(tokens),
            coefficients=coefficients.flatten(),
            needs=needs,
            wide_weight_grad=self.weight_grad is not None,
            logits_dtype=self.logits_dtype,
            transform=self.transform,
            workspace=self.workspace,
            implementation=self.implementation,
        )
        grad_x, grad_weight, grad_bias = (x if need else None for x, need in zip(gradients, needs, strict=True))
        known = KnownGradients(self.hidden, self.weight, self.bias, grad_x, grad_weight, grad_bias, self.weight_grad)
        return logprobs.view(tokens.labels.shape), known


Source = LogitsSource | HiddenSource
