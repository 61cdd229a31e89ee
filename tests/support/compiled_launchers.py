"""The launchers that `benchmarks.compiled` does not call, compiled for a GPU: registers, spills, and how many binaries.

Run in a process of its own, without Triton's interpreter; prints JSON.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.compiled import TARGETS, _amd, _nvidia, offline
from conspo_kernels.backends.triton import group_infonce, label_alignment, scale, sequence_score, token_logprob
from conspo_kernels.objective import Groups, Objective, Rollouts
from conspo_kernels.values import Incoming, LogitRows, LogitTransform, Statistics

OFFSETS = torch.tensor([0, 3, 8])
LABELS = torch.zeros(2, 8, dtype=torch.int64)


def align(i: int, mask: torch.dtype | None = None, packed: bool = False, shift: bool = False) -> None:
    labels = torch.zeros(2, 30, dtype=torch.int64)[:, i : i + 8 + i % 3]
    labels = labels[:1] if packed else labels
    offsets = torch.zeros(3 + i, dtype=torch.int32)[i % 2 :] if packed else None
    label_alignment.align(labels, None if mask is None else labels.to(mask), offsets, shift, -100 + i)


def known(logits: Tensor, softcap: float | None = None, cached: bool = True) -> None:
    token_logprob.row_fits_cache = lambda _: cached  # type: ignore[assignment]
    labels = torch.zeros(logits.shape[:2], dtype=torch.int64)
    rows = LogitRows(logits, labels, LogitTransform(softcap=softcap))
    token_logprob.forward_backward(torch.empty(logits.shape, dtype=logits.dtype), rows, torch.ones(labels.shape))


def tile(i: int) -> None:
    """A slice of the columns, with statistics and results that begin anywhere."""
    logits = torch.zeros(1, 4, 4096, dtype=torch.bfloat16)
    rows = LogitRows(logits, LABELS.view(1, 16)[:, i : i + 4], LogitTransform(), i * 4096)
    longer = torch.zeros(4, 40)[:, None, i : i + 4].unbind()
    statistics = Statistics(*longer)
    token_logprob.forward(rows._replace(start=0), True, statistics)
    token_logprob.backward(logits, rows, statistics.incoming(statistics.logprobs, statistics.entropy))


def wide() -> None:
    """fp32 logits, gradients in bf16."""
    logits = torch.zeros(1, 4, 151_936)
    ones = torch.ones(1, 4)
    rows = LogitRows(logits, LABELS.view(4, 4)[:1], LogitTransform())
    token_logprob.backward(logits.bfloat16(), rows, Incoming(ones, ones, ones))


def contrast(num_rollouts: int, on_device: bool) -> None:
    group_infonce._pointer_or_number = (  # type: ignore[assignment]
        (lambda x: (x, 0.0)) if on_device else (lambda x: (None, 0.0 if x is None else x.item()))
    )
    scores, counts = torch.zeros(num_rollouts), torch.ones(num_rollouts, dtype=torch.int32)
    rollouts = Rollouts(torch.zeros(num_rollouts), Groups(2))
    for reduction, num_groups in (("mean", None), ("mean", torch.tensor(3.0)), ("sum", None), ("none", None)):
        objective = Objective(1.0, torch.tensor(0.1), 0.5, reduction, num_groups)
        group_infonce.infonce(scores, counts, rollouts, objective)


def spread(packed: bool) -> None:
    labels, offsets = (LABELS[:1], OFFSETS) if packed else (LABELS, None)
    weights, counts = torch.ones(2), torch.ones(2, dtype=torch.int32)
    for factor in (None, torch.ones(())):
        sequence_score.backward(weights, counts, labels, offsets, factor)
    coefficients, _counts, _wanted = sequence_score.coefficients(weights, labels, offsets)
    sequence_score.masked(coefficients, labels)
    for number in (None, counts):
        sequence_score.weighted_sum(weights, weights, number)


def multiply() -> None:
    gradient = torch.zeros(2, 5, 40, dtype=torch.bfloat16)
    scale.scale_(gradient, torch.ones(()))
    scale.scale_(gradient[:, :-1], torch.ones(()))


def bf16(vocab_size: int) -> Tensor:
    return torch.zeros(1, 2, vocab_size, dtype=torch.bfloat16)


CASES: dict[str, Callable[[], None]] = {
    "labels": lambda: align(0),
    "labels, masked, shifted": lambda: align(0, torch.bool, shift=True),
    "labels, packed, shifted": lambda: align(0, torch.float32, packed=True, shift=True),
    "known, bf16": lambda: known(bf16(151_936)),
    "known, bf16, odd": lambda: known(bf16(50_257)),
    "known, bf16, elsewhere": lambda: known(bf16(100_514)[..., :50_257]),
    "known, bf16, softcap": lambda: known(bf16(151_936), 30.0),
    "known, fp32": lambda: known(torch.zeros(1, 2, 50_304)),
    "known, fp32, softcap": lambda: known(torch.zeros(1, 2, 50_304), 30.0),
    "known, three launches": lambda: known(bf16(151_936), cached=False),
    "tile": lambda: tile(0),
    "fp32 logits, bf16 gradients": wide,
    "InfoNCE": lambda: contrast(64, False),
    "InfoNCE, many, margin on the device": lambda: contrast(4096, True),
    "weights": lambda: spread(False),
    "weights, packed": lambda: spread(True),
    "scale": multiply,
}
ONCE: dict[str, Callable[[int], None]] = {
    "labels": align,
    "labels, masked": lambda i: align(i, torch.bool, shift=True),
    "labels, packed": lambda i: align(i, packed=True, shift=True),
    "tile": tile,
}


def registers(kernel: Any) -> tuple[int, int]:
    """Registers and spills."""
    return (_amd(kernel) if "amdgcn" in kernel.asm else _nvidia(kernel.asm["cubin"]))[:2]


def main() -> None:
    target = TARGETS[sys.argv[1]]
    rows, binaries = [], {}
    for case, call in CASES.items():
        with offline(target) as kernels:
            call()
        rows += [(case, it.metadata.name, it.metadata.num_warps, *registers(it)) for it in kernels]
    for case, step in ONCE.items():
        with offline(target) as kernels:
            for i in range(12):
                step(i)
        binaries[case] = (len({id(it) for it in kernels}), len({it.metadata.name for it in kernels}), len(kernels))
    print(json.dumps({"rows": rows, "binaries": binaries}))


if __name__ == "__main__":
    main()
