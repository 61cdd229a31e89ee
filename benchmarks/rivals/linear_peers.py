"""The rivals in other packages that start from hidden states. A package is imported when its rival is first called.

Signatures were read in the sources of trl 1.16, liger-kernel 0.8.5, cut-cross-entropy 25.1, fla-core 0.6.0, verl 0.9
and quack 0.6.5.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

TRL_CHUNK = 32_768  # entries of the vocabulary: trl.trainer.utils._CHUNKED_LOGPROB_CHUNK_SIZE


class LinearPeer(NamedTuple):
    """compute: hidden [N, H], weight [V, H], labels [N] to log-probabilities [N] (or, summed, to their sum).

    same_value: the value is compared; else it is another loss's, and only its gradient is.
    softcap: what it caps the logits with.
    """

    name: str
    compute: Callable[[Tensor, Tensor, Tensor], Tensor]
    package: str
    summed: bool = False
    same_value: bool = True
    compiled: bool = False
    softcap: float | None = None


def linear_peers(
    device: torch.device, coefficient: float, shape: tuple[int, int], softcap: float | None = None
) -> Iterator[LinearPeer]:
    """Those that run on a device. coefficient: of every log-probability in a sum.  shape: rollouts, length."""
    yield LinearPeer("TRL chunked log-probs", _trl, "trl")
    yield LinearPeer("Liger fused scaled CE", _liger_scaled, "liger_kernel")
    grpo = _liger_chunked(coefficient, shape)
    yield LinearPeer("Liger chunked GRPO", grpo, "liger_kernel", summed=True, same_value=False, compiled=True)
    if device.type != "cuda":
        compiled = _cut_cross_entropy("torch_compile", softcap)
        yield LinearPeer("CCE, torch_compile", compiled, "cut_cross_entropy", compiled=True, softcap=softcap)
        return
    yield LinearPeer("CCE", _cut_cross_entropy("cce", softcap), "cut_cross_entropy", softcap=softcap)
    liger = _liger_cross_entropy(coefficient, softcap)
    yield LinearPeer("Liger fused linear CE", liger, "liger_kernel", summed=True, softcap=softcap)
    yield LinearPeer("FLA fused linear CE", _fla(coefficient, softcap), "fla", summed=True, softcap=softcap)
    yield LinearPeer("verl linear_cross_entropy", _verl, "verl")
    yield LinearPeer("quack linear_cross_entropy", _quack, "quack")
    yield LinearPeer("quack chunked linear CE", _quack_chunked(coefficient), "quack", summed=True)


def _trl(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    from trl.kernels import ChunkedLogProbFunction

    return ChunkedLogProbFunction.apply(hidden, weight, None, labels, 1.0, TRL_CHUNK, None, 1.0, ())[0]


def _liger_scaled(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """CuTe on sm_90, elsewhere chunks in PyTorch: Liger's own choice."""
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import LigerFusedLinearScaledCrossEntropyFunction

    output = LigerFusedLinearScaledCrossEntropyFunction.apply(hidden, weight, labels)
    return -(output[0] if isinstance(output, tuple) else output)


def _liger_chunked(coefficient: float, shape: tuple[int, int]) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """On policy the loss is minus the mean of the advantages; these give every log-probability our coefficient."""

    def summed(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

        loss = LigerFusedLinearGRPOLoss(beta=0.0, use_ref_model=False, loss_type="bnpo")
        advantages = torch.full((shape[0],), -coefficient * labels.numel(), device=hidden.device)
        mask = torch.ones(shape, device=hidden.device)
        output, _metrics = loss(hidden.view(*shape, -1), weight, labels.view(shape), mask, advantages)
        return output

    return summed


def _cut_cross_entropy(implementation: str, softcap: float | None) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def logprobs(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        from cut_cross_entropy import linear_cross_entropy

        return -linear_cross_entropy(hidden, weight, labels, softcap=softcap, reduction="none", impl=implementation)

    return logprobs


def _liger_cross_entropy(coefficient: float, softcap: float | None) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """In chunks, with the gradients computed in the forward pass."""

    def summed(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

        output = LigerFusedLinearCrossEntropyFunction.apply(
            hidden, weight, labels, None, None, -100, 0.0, 0.0, "sum", softcap
        )
        return -coefficient * output[0]

    return summed


def _fla(coefficient: float, softcap: float | None) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """In chunks, with the gradients computed in the forward pass."""

    def summed(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        from fla.modules.fused_linear_cross_entropy import fused_linear_cross_entropy_loss

        return -coefficient * fused_linear_cross_entropy_loss(
            hidden, labels, weight, logit_softcapping=softcap, reduction="sum"
        )

    return summed


def _verl(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    for package in ("verl", "verl.utils"):
        _without_init(package)
    linear_cross_entropy = importlib.import_module("verl.utils.kernel.linear_cross_entropy").linear_cross_entropy
    return linear_cross_entropy(hidden, weight, labels, 1.0, "none")[0]


def _quack(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    from quack.linear_cross_entropy import linear_cross_entropy_func

    return -linear_cross_entropy_func(hidden, weight, None, labels, reduction="none", inplace_backward=True)


def _quack_chunked(coefficient: float) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def summed(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        from quack.linear_cross_entropy import chunked_linear_cross_entropy

        return -coefficient * chunked_linear_cross_entropy(hidden, weight, labels, reduction="sum")

    return summed


def _without_init(package: str) -> None:
    """Make a package importable without its __init__: that of verl wants ray, its kernel only torch and Triton."""
    if package in sys.modules:
        return
    spec = importlib.util.find_spec(package)
    if spec is None:
        raise ModuleNotFoundError(f"No module named {package!r}", name=package)
    module = types.ModuleType(package)
    module.__path__ = list(spec.submodule_search_locations or [])
    sys.modules[package] = module
