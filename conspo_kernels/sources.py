"""Where log-probabilities come from: logits, or hidden states and the weight of the head.

Both sources offer the same: log-probabilities, with a graph where grad mode is on, and the gradient for known
coefficients. Every public function of logits or hidden states builds a source and passes it on.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from .inputs import check
from .inputs.autocast import autocast_dtype, cast, cast_weight
from .inputs.parallel import Parallel, VocabShard, parallel_from, shard_of
from .inputs.tokens import Predictions, TokenLayout
from .ops import check_implementation
from .ops.devices import true_indices
from .ops.known_gradient import linear_logprob_known, token_logprob_known, token_logprob_known_
from .ops.label_alignment import ON_ALL_RANKS
from .ops.linear_logprob import linear_logprob
from .ops.ranks import name_of
from .ops.token_logprob import token_logprob
from .ops.workspace import default_workspace, logits_fit
from .values import LogitTransform, python_number


class LogitSettings(NamedTuple):
    """The transform of the logits, what is split over ranks, and the implementation that computes."""

    transform: LogitTransform
    parallel: Parallel
    implementation: str

    @classmethod
    def from_arguments(
        cls, temperature: Any, logit_scale: Any, softcap: Any, parallel: Any, implementation: Any
    ) -> LogitSettings:
        check_implementation(implementation)
        temperature, logit_scale, softcap = map(python_number, (temperature, logit_scale, softcap))
        check.logit_transform(temperature, logit_scale, softcap)
        return cls(LogitTransform(temperature, logit_scale, softcap), parallel_from(parallel), implementation)


class KnownGradient(NamedTuple):
    """logprobs [B, T], and the gradients of sum(coefficients * logprobs).

    inputs: (logits or hidden states, weight, bias).  gradients: with respect to each, None if not needed.
    weight_grad: a buffer to which the gradient of weight is added, or None.
    """

    logprobs: Tensor
    inputs: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None)
    gradients: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None)
    weight_grad: Tensor | None = None


class Source(Protocol):
    """What the public functions ask of a source. Tokens are [B, T]."""

    @property
    def settings(self) -> LogitSettings: ...

    @property
    def skips_tokens(self) -> bool:
        """Whether leaving tokens out saves work."""

    @property
    def synchronize(self) -> bool:
        """Whether to wait for the device once, to learn which tokens take part."""

    @property
    def predictions(self) -> Predictions: ...

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of log-probabilities."""

    def logprobs(
        self, tokens: TokenLayout, keep: Tensor | None = None, with_entropy: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Log-probabilities and entropies (empty unless asked for), [B, T], with a graph where grad mode is on.

        keep: [B, T] bool on the CPU, the tokens that are wanted; None where the CPU does not know them.
        """

    def known_gradient(
        self, tokens: TokenLayout, coefficients: Tensor, keep: Tensor | None = None
    ) -> KnownGradient | None:
        """The gradient for known coefficients [B, T]; None if it cannot be computed in advance: use `logprobs` then."""


def _shard(parallel: Parallel) -> VocabShard | None:
    return None if parallel.vocab is None else VocabShard(parallel.vocab, parallel.vocab_start)


def _shard_arguments(shard: VocabShard | None) -> tuple[int, str]:
    """The first entry of this rank's part of the vocabulary, and the name of the process group, "" for none."""
    return (0, "") if shard is None else (shard.start, name_of(shard.group))


def _accumulated(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


class LogitsSource(NamedTuple):
    """logits: [B, T, V], of packed tokens [1, N, V].  given: as the user passed them, perhaps a DTensor.

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
        """inplace: the public argument, by its own name: `inplace=...`, `inplace_backward=...` or neither."""
        check.logits(logits)
        check.flags(**inplace)
        ((name, wanted),) = inplace.items() if inplace else (("inplace", False),)
        if wanted:
            check.overwritten(name, logits)
        shard, local = _shard(settings.parallel), logits
        if hasattr(logits, "placements"):
            if shard is not None:
                raise ValueError(
                    "parallel.vocab must be None for logits that are a DTensor, which says where its part of the "
                    "vocabulary begins, got a ProcessGroup"
                )
            local, shard = shard_of(logits, -1)
        local = local.resolve_neg()
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
            return None  # with a split vocabulary the gradient needs the statistics of all ranks first
        if torch.compiler.is_compiling():
            return None  # compiled, its product with what comes in would be one more pass over all logits
        z = self.logits.detach()
        arguments = (tokens.labels, coefficients, self.settings.transform.to_numbers(), self.settings.implementation)
        if self.inplace:
            logprobs, gradient = token_logprob_known_(z, *arguments), z
        else:
            logprobs, gradient = token_logprob_known(z, *arguments)
        return KnownGradient(logprobs, (self.given, None, None), (gradient.view(self.given.shape), None, None))


class HiddenSource(NamedTuple):
    """Hidden states [N, H] and the head's weight [V, H] and bias [V], in the dtype of the GEMMs.

    shape: of the tokens as the user passed them.  workspace: bytes for tiles of logits.
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
        workspace_mib = python_number(workspace_mib)
        check.linear(hidden, weight, bias, workspace_mib)
        if weight_grad is not None:
            check.weight_grad(weight_grad, weight)
            weight = weight.view_as(weight)  # whose node says in backward whether the gradient was asked for
        check.flags(batch_invariant=batch_invariant, synchronize=synchronize)
        shape, dtype = tuple(hidden.shape[:-1]), autocast_dtype(hidden.device)
        if dtype is not None:
            hidden, weight = cast(hidden, dtype), cast_weight(weight, dtype)
            bias = None if bias is None else cast(bias, dtype)
        check.logits_dtype(logits_dtype, hidden)
        hidden, weight = hidden.resolve_neg(), weight.resolve_neg()
        bias = None if bias is None else bias.resolve_neg()
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
        """Whether hidden, weight and bias need a gradient."""
        wanted = torch.is_grad_enabled()
        return [wanted and x is not None and x.requires_grad for x in (self.hidden, self.weight, self.bias)]

    def mode(self, with_entropy: bool) -> str:
        """The mode of `linear/modes.py` with the fewest GEMMs. "frozen" needs the whole vocabulary on one rank."""
        needs = self.needs
        if not any(needs):
            return "none"
        if not any(needs[1:]) and not with_entropy and self.settings.parallel.vocab is None:
            return "frozen"
        if self.weight_grad is not None or self.batch_invariant:
            return "recompute"
        fits = logits_fit(self.hidden, self.weight, self.bias, self.logits_dtype, self.workspace)
        return "store" if fits else "recompute"

    def _token_indices(self, tokens: TokenLayout, keep: Tensor | None) -> Tensor | None:
        """[n] int64 indices of the tokens to compute. None: all of them, or the op looks at labels on the CPU."""
        if self.hidden.device.type == "cpu":
            return None  # the op can look at the labels
        if self.synchronize:
            active = tokens.active.cpu()
            keep = active if keep is None else active & keep
        return None if keep is None else true_indices(keep.flatten(), self.hidden.device)

    def logprobs(
        self, tokens: TokenLayout, keep: Tensor | None = None, with_entropy: bool = False
    ) -> tuple[Tensor, Tensor]:
        logprobs, entropy, *_ = linear_logprob(
            self.hidden, self.weight, self.bias, tokens.labels.flatten(), self._token_indices(tokens, keep),
            self.weight_grad, self.logits_dtype, self.settings.transform.to_numbers(), with_entropy,
            self.mode(with_entropy), self.workspace, self.settings.implementation,
            *_shard_arguments(_shard(self.settings.parallel)), self.batch_invariant,
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
            self.hidden.detach(), self.weight.detach(), bias, tokens.labels.flatten(),
            self._token_indices(tokens, keep), coefficients.flatten(), self.needs, self.weight_grad is not None,
            self.logits_dtype, self.settings.transform.to_numbers(), self.workspace, self.settings.implementation,
        )  # fmt: skip
        hidden_grad, weight_grad, bias_grad = (
            gradient if needed else None for gradient, needed in zip(gradients, self.needs, strict=True)
        )
        given = (hidden_grad, weight_grad, bias_grad)
        return KnownGradient(logprobs.view(tokens.labels.shape), inputs, given, self.weight_grad)
