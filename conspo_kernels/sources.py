"""Where log-probabilities come from: logits, or hidden states and the head that would make logits of them.

Both sources offer the same: log-probabilities with a graph (without one where grad mode is off), and the gradient for
known coefficients. Every public function builds a source and hands it on.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from .inputs import check
from .inputs.autocast import autocast_dtype, cast, cast_weight
from .inputs.parallel import Parallel, VocabShard, parallel_from, shard_of
from .inputs.tokens import ON_ALL_RANKS, Predictions, TokenLayout
from .ops import check_implementation
from .ops.known_gradient import linear_logprob_known, token_logprob_known, token_logprob_known_
from .ops.linear_logprob import default_workspace, linear_logprob
from .ops.placement import token_places
from .ops.ranks import name_of
from .ops.token_logprob import token_logprob
from .values import LogitTransform


class LogitSettings(NamedTuple):
    """What is done with logits, by whom, and what of them is on other ranks."""

    transform: LogitTransform
    parallel: Parallel
    implementation: str

    @classmethod
    def from_arguments(
        cls, temperature: Any, logit_scale: Any, softcap: Any, parallel: Any, implementation: Any
    ) -> LogitSettings:
        check_implementation(implementation)
        check.logit_transform(temperature, logit_scale, softcap)
        return cls(LogitTransform(temperature, logit_scale, softcap), parallel_from(parallel), implementation)


class KnownGradient(NamedTuple):
    """logprobs [B, T], and the gradients of sum(coefficients * logprobs).

    inputs: what is differentiated by, logits or hidden states, weight and bias.  gradients: by each, None if not
    needed.  weight_grad: that by weight is to be added to it.
    """

    logprobs: Tensor
    inputs: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None)
    gradients: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None)
    weight_grad: Tensor | None = None


class Source(Protocol):
    """What the public functions need of a source. Tokens are [B, T]."""

    @property
    def settings(self) -> LogitSettings: ...

    @property
    def skips_tokens(self) -> bool:
        """Whether a token that is left out costs nothing."""

    @property
    def synchronize(self) -> bool:
        """Whether to wait for the device, to see which tokens are wanted."""

    @property
    def predictions(self) -> Predictions: ...

    @property
    def dtype(self) -> torch.dtype:
        """Of log-probabilities."""

    def logprobs(
        self, tokens: TokenLayout, keep: Tensor | None = None, with_entropy: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Log-probabilities and entropies (empty unless asked for), [B, T], with a graph where grad mode is on.

        keep: [B, T] bool on the CPU, tokens that are wanted, where that is known there.
        """

    def known_gradient(
        self, tokens: TokenLayout, coefficients: Tensor, keep: Tensor | None = None
    ) -> KnownGradient | None:
        """For known coefficients [B, T]. None: there is no gradient to compute in advance; take `logprobs`."""


def _shard(parallel: Parallel) -> VocabShard | None:
    return None if parallel.vocab is None else VocabShard(parallel.vocab, parallel.vocab_start)


def _shard_arguments(shard: VocabShard | None) -> tuple[int, str]:
    """Where this rank's part of the vocabulary begins, and the name of the group, "" for none."""
    return (0, "") if shard is None else (shard.start, name_of(shard.group))


def _accumulated(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


class LogitsSource(NamedTuple):
    """Logits [B, T, V] (packed ones are one row).  given: as the user passed them, a DTensor perhaps.

    inplace: the gradient is written over the logits.
    """

    given: Tensor
    logits: Tensor
    shard: VocabShard | None
    settings: LogitSettings
    inplace: bool
    skips_tokens: bool = False
    synchronize: bool = False

    @classmethod
    def from_arguments(cls, logits: Tensor, settings: LogitSettings, **inplace: bool) -> LogitsSource:
        """inplace: the argument by its name."""
        check.logits(logits)
        check.flags(**inplace)
        ((name, wanted),) = inplace.items() if inplace else (("inplace", False),)
        if wanted:
            check.overwritten(name, logits)
        shard, local = _shard(settings.parallel), logits
        if hasattr(logits, "placements"):
            if shard is not None:
                raise ValueError(
                    "parallel.vocab is for local logits: a DTensor says where its part of the vocabulary begins"
                )
            local, shard = shard_of(logits, -1)
        rows = local if local.dim() == 3 else local[None]
        return cls(logits, rows, shard, settings, wanted)

    @property
    def predictions(self) -> Predictions:
        size = self.logits.shape[-1] if self.shard is None else ON_ALL_RANKS
        split = self.settings.parallel.context is not None
        return Predictions(
            "logits", self.logits, tuple(self.given.shape[:-1]), size, split, self.settings.implementation
        )

    @property
    def dtype(self) -> torch.dtype:
        return _accumulated(self.logits.dtype)

    def logprobs(
        self, tokens: TokenLayout, keep: Tensor | None = None, with_entropy: bool = False
    ) -> tuple[Tensor, Tensor]:
        del keep
        inplace = self.inplace and self.logits.requires_grad and torch.is_grad_enabled()
        logprobs, entropy, _row_max, _log_sum = token_logprob(
            self.logits, tokens.labels, self.settings.transform.to_numbers(), with_entropy, inplace,
            self.settings.implementation, *_shard_arguments(self.shard),
        )  # fmt: skip
        return logprobs, entropy

    def known_gradient(
        self, tokens: TokenLayout, coefficients: Tensor, keep: Tensor | None = None
    ) -> KnownGradient | None:
        del keep
        if not (torch.is_grad_enabled() and self.logits.requires_grad) or self.shard is not None:
            return None  # of logits on several ranks a gradient needs the statistics of all of them first
        z = self.logits.detach()
        arguments = (tokens.labels, coefficients, self.settings.transform.to_numbers(), self.settings.implementation)
        if self.inplace:
            logprobs, gradient = token_logprob_known_(z, *arguments), z
        else:
            logprobs, gradient = token_logprob_known(z, *arguments)
        return KnownGradient(logprobs, (self.given, None, None), (gradient.view(self.given.shape), None, None))


class HiddenSource(NamedTuple):
    """Hidden states [N, H] and the head's weight [V, H] and bias, in the dtype that they are multiplied in.

    shape: of the tokens as the user passed them.  workspace: bytes.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    shape: tuple[int, ...]
    settings: LogitSettings
    workspace: int
    logits_dtype: torch.dtype
    weight_grad: Tensor | None
    batch_invariant: bool
    synchronize: bool
    skips_tokens: bool = True

    @classmethod
    def from_arguments(
        cls,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        settings: LogitSettings,
        *,
        workspace_mib: float | None,
        logits_dtype: torch.dtype | None = None,
        weight_grad: Tensor | None = None,
        batch_invariant: bool = False,
        synchronize: bool = False,
    ) -> HiddenSource:
        check.linear(hidden, weight, bias, workspace_mib)
        if weight_grad is not None:
            check.weight_grad(weight_grad, weight)
        check.flags(batch_invariant=batch_invariant, synchronize=synchronize)
        shape, dtype = tuple(hidden.shape[:-1]), autocast_dtype(hidden.device)
        if dtype is not None:
            hidden, weight = cast(hidden, dtype), cast_weight(weight, dtype)
            bias = None if bias is None else cast(bias, dtype)
        check.logits_dtype(logits_dtype, hidden)
        workspace = default_workspace(hidden.device) if workspace_mib is None else int(workspace_mib * 2**20)
        return cls(
            hidden.reshape(-1, hidden.shape[-1]), weight, bias, shape, settings, workspace,
            logits_dtype or hidden.dtype, weight_grad, batch_invariant, synchronize,
        )  # fmt: skip

    @property
    def predictions(self) -> Predictions:
        size = self.weight.shape[0] if self.settings.parallel.vocab is None else ON_ALL_RANKS
        split = self.settings.parallel.context is not None
        return Predictions("hidden", self.hidden, self.shape, size, split, self.settings.implementation)

    @property
    def dtype(self) -> torch.dtype:
        return _accumulated(self.hidden.dtype)

    @property
    def needs(self) -> list[bool]:
        """Whether hidden, weight and bias want a gradient."""
        wanted = torch.is_grad_enabled()
        return [wanted and x is not None and x.requires_grad for x in (self.hidden, self.weight, self.bias)]

    def mode(self, with_entropy: bool) -> str:
        """The mode of `linear/modes.py` with the fewest GEMMs; in "frozen" a rank would need the others' sums."""
        needs = self.needs
        if not any(needs):
            return "none"
        if not any(needs[1:]) and not with_entropy and self.settings.parallel.vocab is None:
            return "frozen"
        if self.weight_grad is not None or self.batch_invariant:
            return "recompute"
        size = self.hidden.shape[0] * self.weight.shape[0] * self.logits_dtype.itemsize
        return "store" if size <= self.workspace else "recompute"

    def _places(self, tokens: TokenLayout, keep: Tensor | None) -> Tensor | None:
        """[n] the tokens to compute: those with a label, or what is known without waiting. None: all, or the CPU's."""
        if self.hidden.device.type == "cpu":
            return None  # labels can be looked at
        if self.synchronize:
            keep = tokens.active.cpu()
        return None if keep is None else token_places(keep.flatten(), self.hidden.device)

    def logprobs(
        self, tokens: TokenLayout, keep: Tensor | None = None, with_entropy: bool = False
    ) -> tuple[Tensor, Tensor]:
        logprobs, entropy, *_ = linear_logprob(
            self.hidden, self.weight, self.bias, tokens.labels.flatten(), self._places(tokens, keep), self.weight_grad,
            self.logits_dtype, self.settings.transform.to_numbers(), with_entropy, self.mode(with_entropy),
            self.workspace, self.settings.implementation, *_shard_arguments(_shard(self.settings.parallel)),
            self.batch_invariant,
        )  # fmt: skip
        return logprobs.view(tokens.labels.shape), entropy

    def known_gradient(
        self, tokens: TokenLayout, coefficients: Tensor, keep: Tensor | None = None
    ) -> KnownGradient | None:
        if not any(self.needs) or self.settings.parallel.vocab is not None:
            return None
        inputs = (self.hidden, self.weight, self.bias)
        bias = None if self.bias is None else self.bias.detach()
        logprobs, *gradients = linear_logprob_known(
            self.hidden.detach(), self.weight.detach(), bias, tokens.labels.flatten(), self._places(tokens, keep),
            coefficients.flatten(), self.needs, self.weight_grad is not None, self.logits_dtype,
            self.settings.transform.to_numbers(), self.workspace, self.settings.implementation,
        )  # fmt: skip
        hidden_grad, weight_grad, bias_grad = (
            gradient if needed else None for gradient, needed in zip(gradients, self.needs, strict=True)
        )
        given = (hidden_grad, weight_grad, bias_grad)
        return KnownGradient(logprobs.view(tokens.labels.shape), inputs, given, self.weight_grad)
