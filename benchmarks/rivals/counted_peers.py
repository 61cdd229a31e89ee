"""The Triton kernels of other packages, compiled for counting as this library's are: `counted.py`.

Each is called as its package calls it, on bf16 logits of V 151,936. Within `compiled.offline` nothing is launched, so
tensors may lie on a CPU and hold anything; where a package asks for a GPU the question is answered for it.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple
from unittest import mock

import torch
from torch import Tensor

VOCAB_SIZE = 151_936


class Peer(NamedTuple):
    """names: what each kernel does that the call compiles, first to last."""

    package: str
    call: Callable[[], None]
    names: tuple[str, ...]


def _logits(rows: int = 2) -> Tensor:
    return torch.zeros(1, rows, VOCAB_SIZE, dtype=torch.bfloat16, requires_grad=True)


def _labels(rows: int = 2) -> Tensor:
    return torch.zeros(1, rows, dtype=torch.int64)


def _trl() -> None:
    from trl.kernels import selective_log_softmax_and_entropy

    logprobs, entropy = selective_log_softmax_and_entropy(_logits(), _labels())
    (logprobs.sum() + entropy.sum()).backward()


def _trl_chunked(softcap: float | None) -> Callable[[], None]:
    def call() -> None:
        from trl.kernels import ChunkedLogProbFunction, chunked_logprob

        hidden = torch.zeros(2, 16, dtype=torch.bfloat16, requires_grad=True)
        weight = torch.zeros(32_768, 16, dtype=torch.bfloat16, requires_grad=True)
        with mock.patch.object(chunked_logprob, "_use_triton", return_value=True):
            labels = torch.zeros(2, dtype=torch.int64)
            outputs = ChunkedLogProbFunction.apply(hidden, weight, None, labels, 1.0, 32_768, softcap, 1.0, ())
            outputs[0].sum().backward()

    return call


def _liger_grpo(level: str) -> Callable[[], None]:
    def call() -> None:
        from liger_kernel.ops.grpo_loss import GrpoLossFunction

        arguments = (1.0, 0.0, 0.2, 0.2, True, "grpo", None, True, level)
        loss = GrpoLossFunction.apply(_logits(3) * 1, None, None, _labels(), torch.ones(1), None, *arguments)[0]
        loss.sum().backward()

    return call


def _liger_cross_entropy() -> None:
    from liger_kernel.ops.cross_entropy import LigerCrossEntropyFunction

    LigerCrossEntropyFunction.apply(_logits().flatten(0, 1) * 1, _labels().flatten(), None)


def _flash_attn() -> None:
    # The package imports its CUDA extension first. The Triton kernels do without: so will a wheel that has none.
    extension = "flash_attn_2_cuda"
    if extension not in sys.modules and importlib.util.find_spec(extension) is None:
        sys.modules[extension] = ModuleType(extension)
    from flash_attn.ops.triton.cross_entropy import cross_entropy_loss

    with mock.patch("torch.cuda.device"):
        losses, _z = cross_entropy_loss(_logits().flatten(0, 1), _labels().flatten())
        losses.sum().backward()


PEERS = (
    Peer("trl", _trl, ("forward with entropy", "backward with entropy")),
    Peer("trl", _trl_chunked(None), ("chunked, forward", "chunked, backward")),
    Peer("trl", _trl_chunked(30.0), ("chunked, forward, softcap", "chunked, backward, softcap")),
    Peer(
        "liger_kernel",
        _liger_grpo("sequence"),
        ("GRPO, log-probabilities", "GRPO by sequence, forward", "GRPO by sequence, backward"),
    ),
    Peer("liger_kernel", _liger_grpo("token"), ("GRPO by token, forward", "GRPO by token, backward")),
    Peer("liger_kernel", _liger_cross_entropy, ("cross-entropy, forward and gradient",)),
    Peer("flash_attn", _flash_attn, ("cross-entropy, forward", "cross-entropy, backward")),
)  # fmt: skip

# Installed or not, what cannot be counted so.
NOT_COUNTED = {
    "cut_cross_entropy": "its logits are tiles of a GEMM and stay in registers: no loop over logits in memory"
}
