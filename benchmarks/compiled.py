"""The compiled kernels, without a GPU: registers, stack, shared memory and access widths of what the launchers launch.

The launchers of `backends/triton` are called with small CPU tensors under a driver that claims to be the target;
Triton specialises and compiles as it would there, and nothing is launched. Run as

    python -m benchmarks.compiled [--json] [--target sm_90 ...]
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from benchmarks.compiled_code.machine_code import disassembled, least_in_flight
from benchmarks.compiled_code.occupancy import Occupancy, occupancy
from conspo_kernels.linear.tiles import second_halves
from conspo_kernels.objective import Groups, Objective, Rollouts
from conspo_kernels.values import LogitRows, LogitTransform, Statistics
from ptx_executor.driver import CompilingDriver

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


ROW_KERNELS = ("_statistics_kernel", "_backward_kernel", "_forward_backward_kernel")  # whose main loops load logits


@dataclass(frozen=True)
class Compiled:
    """One compiled kernel. Widths in bits; loads and stores count instructions of global memory, by width."""

    case: str
    kernel: str
    target: str
    registers: int
    stack_bytes: int  # of a thread, in memory: where registers are spilled to
    shared_bytes: int
    loads: dict[int, int]
    stores: dict[int, int]
    num_warps: int
    occupancy: Occupancy  # expected, from the three before
    in_flight: int  # bytes of logits per multiprocessor, of the main loop that has fewest; 0 where this is not counted


def target_name(target: GPUTarget) -> str:
    return next(name for name, it in TARGETS.items() if it == target)


@contextlib.contextmanager
def offline(target: GPUTarget) -> Iterator[list[Any]]:
    """Within, calling a Triton kernel compiles it for `target` and appends it to the list that is yielded."""
    kernels: list[Any] = []
    run = JITFunction.run

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        del grid, warmup
        kernel = run(self, *args, grid=None, warmup=True, **kwargs)
        kernels.append(kernel)
        return kernel

    from conspo_kernels.backends.triton import launch

    table_row = launch.architecture
    launch.architecture = lambda _: target_name(target)  # type: ignore[assignment]
    active = triton.runtime.driver._active  # reset_active() would look for a GPU
    triton.runtime.driver.set_active(CompilingDriver(target, "offline"))  # type: ignore[arg-type]
    JITFunction.run = compile_only  # type: ignore[method-assign]
    try:
        yield kernels
    finally:
        JITFunction.run = run  # type: ignore[method-assign]
        launch.architecture = table_row
        triton.runtime.driver._active = active


def call_token_logprob(
    logits: Tensor, softcap: float | None = None, entropy: bool = False
) -> tuple[LogitRows, Statistics, Tensor]:
    """Call the launchers of forward and backward for logits [B, T, V].

    Returns their input, what forward gives, and the gradient of half the squares of that. The first token's label is
    the first entry, the last one's the last.
    """
    from conspo_kernels.backends.triton import token_logprob as kernels

    labels = torch.linspace(0, logits.shape[-1] - 1, logits.shape[:-1].numel()).long().view(logits.shape[:-1])
    rows = LogitRows(logits, labels, LogitTransform(softcap=softcap))
    statistics = kernels.forward(rows, entropy)
    grad = torch.empty(logits.shape, dtype=logits.dtype)
    kernels.backward(grad, rows, statistics.incoming(statistics.logprobs, statistics.entropy))
    return rows, statistics, grad


def call_over(vocab_size: int, known: bool) -> tuple[Any, ...]:
    """As `call_token_logprob`, or with `known` `call_forward_backward`: the gradient in bf16 lies over fp32 logits."""
    from conspo_kernels.backends.triton import token_logprob as kernels

    logits = _logits(vocab_size, torch.float32)
    labels = torch.tensor([[0, vocab_size - 1]])
    rows = LogitRows(logits, labels, LogitTransform())
    stride = -(-vocab_size // 64) * 64
    tile = torch.empty(2 * stride).as_strided((2, vocab_size), (stride, 1)).copy_(logits[0])
    grad, over = second_halves(tile, torch.bfloat16)[None], rows._replace(logits=tile[None])
    if known:
        with mock.patch.object(kernels, "row_fits_cache", return_value=True):
            return rows, kernels.forward_backward(grad, over, torch.ones(1, 2)), grad
    statistics = kernels.forward(over, False)
    kernels.backward(grad, over, statistics.incoming(statistics.logprobs))
    return rows, statistics, grad


def call_forward_backward(logits: Tensor) -> tuple[LogitRows, Tensor, Tensor]:
    """Logits and labels, log-probabilities, and the gradient of their sum: one launch, as where caches hold a row."""
    from conspo_kernels.backends.triton import token_logprob as kernels

    labels = torch.linspace(0, logits.shape[-1] - 1, logits.shape[:-1].numel()).long().view(logits.shape[:-1])
    rows, grad = LogitRows(logits.clone(), labels, LogitTransform()), logits
    with mock.patch.object(kernels, "row_fits_cache", return_value=True):
        logprobs = kernels.forward_backward(grad, rows._replace(logits=grad), torch.ones(labels.shape))
    return rows, logprobs, grad


def call_sequence_score(packed: bool, num_tokens: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities [2, num_tokens], their scores [2], and the gradient of half the squares of those."""
    from conspo_kernels.backends.triton import sequence_score as kernels

    logprobs, labels = -torch.rand(2, num_tokens), torch.zeros(2, num_tokens, dtype=torch.int64)
    offsets = torch.tensor([0, num_tokens, 2 * num_tokens]) if packed else None
    scores, counts = kernels.forward(logprobs, labels, offsets)
    return logprobs, scores, kernels.backward(scores, counts, labels, offsets)


def call_group_infonce(
    ragged: bool, num_groups: int = 2, size: int = 4, margin: float = 0.0, rewards: Tensor | None = None
) -> tuple[Tensor, Rollouts, Objective, tuple[Tensor, Tensor]]:
    """Scores, rollouts, objective and result. Every second rollout is right, unless rewards are given."""
    from conspo_kernels.backends.triton import group_infonce as kernels

    n = num_groups * size
    groups = Groups(size).sorted(n, torch.device("cpu")) if ragged else Groups(size)
    rewards = torch.arange(n).remainder(2).float() if rewards is None else rewards
    counts = torch.ones(n, dtype=torch.int32)
    scores, rollouts = -torch.rand(n), Rollouts(rewards, groups)
    objective = Objective(1.0, torch.tensor(margin), 0.5, "mean", None)
    return scores, rollouts, objective, kernels.infonce(scores, counts, rollouts, objective)


def call_scale() -> tuple[Tensor, Tensor]:
    """Before, and half of that."""
    from conspo_kernels.backends.triton import scale

    x = torch.randn(16_384, dtype=torch.bfloat16)
    halved = x.clone()
    scale.scale_(halved, torch.tensor(0.5))
    return x, halved


def _logits(vocab_size: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(1, 2, vocab_size, dtype=dtype)


CASES: dict[str, Callable[[], object]] = {
    "bf16, V 151,936": lambda: call_token_logprob(_logits(151_936, torch.bfloat16)),
    "bf16, V 50,257": lambda: call_token_logprob(_logits(50_257, torch.bfloat16)),
    "bf16, V 50,257, gradient elsewhere": lambda: call_token_logprob(_logits(50_257 * 2, torch.bfloat16)[..., :50_257]),
    "bf16, V 262,144, softcap": lambda: call_token_logprob(_logits(262_144, torch.bfloat16), softcap=30.0),
    "bf16, V 262,144, softcap, entropy": lambda: call_token_logprob(
        _logits(262_144, torch.bfloat16), softcap=50.0, entropy=True
    ),
    "bf16, V 262,144, softcap of 1,000": lambda: call_token_logprob(_logits(262_144, torch.bfloat16), softcap=1000.0),
    "bf16, V 262,144, softcap of 1,000, entropy": lambda: call_token_logprob(
        _logits(262_144, torch.bfloat16), softcap=1000.0, entropy=True
    ),
    "fp32, V 262,144, softcap": lambda: call_token_logprob(_logits(262_144, torch.float32), softcap=30.0),
    "bf16, V 151,936, entropy": lambda: call_token_logprob(_logits(151_936, torch.bfloat16), entropy=True),
    "fp32, V 151,936": lambda: call_token_logprob(_logits(151_936, torch.float32)),
    "fp64, V 1,000": lambda: call_token_logprob(_logits(1000, torch.float64)),
    "known, bf16, V 151,936": lambda: call_forward_backward(_logits(151_936, torch.bfloat16)),
    "known, fp32, V 50,257": lambda: call_forward_backward(_logits(50_257, torch.float32)),
    "bf16 over fp32, V 50,257": lambda: call_over(50_257, known=False),
    "known, bf16 over fp32, V 50,257": lambda: call_over(50_257, known=True),
    "padded": lambda: call_sequence_score(packed=False),
    "packed": lambda: call_sequence_score(packed=True),
    "equal groups": lambda: call_group_infonce(ragged=False),
    "ragged groups": lambda: call_group_infonce(ragged=True),
    "bf16, by a scalar": call_scale,
}


@functools.lru_cache  # cases share kernels, and each of the two programs takes its time to start
def _nvidia(cubin: bytes) -> tuple[int, int, dict[int, int], dict[int, int]]:
    """Registers, bytes of stack, load and store widths, from the machine code."""
    binaries = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run(
            [binaries / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    sass = disassembled(cubin)

    def widths(instruction: str) -> dict[int, int]:
        counts: dict[int, int] = {}
        for match in re.finditer(rf"\b{instruction}\.E(\S*)", sass):
            flags = match.group(1).split(".")
            width = next((int(f) for f in flags if f in ("64", "128")), None)
            if width is None:
                width = 8 if {"U8", "S8"} & set(flags) else 16 if {"U16", "S16"} & set(flags) else 32
            counts[width] = counts.get(width, 0) + 1
        return counts

    fields = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    return fields["REG"], fields["STACK"] + fields["LOCAL"], widths("LDG"), widths("STG")


def _amd(kernel: Any) -> tuple[int, int, dict[int, int], dict[int, int]]:
    """The same from AMD's assembly text.

    Scalars that LLVM parks in lanes of a vector register (`sgpr_spill_count`) are in no memory.
    """
    text = kernel.asm["amdgcn"]
    sizes = {"dwordx4": 128, "dwordx3": 96, "dwordx2": 64, "dword": 32, "ushort": 16, "short": 16, "ubyte": 8}

    def widths(kind: str) -> dict[int, int]:
        counts: dict[int, int] = {}
        for match in re.finditer(rf"\b(?:global|buffer)_{kind}_(?:d16_)?(?:hi_)?([a-z]+\d?)", text):
            width = sizes.get(match.group(1), 8)
            counts[width] = counts.get(width, 0) + 1
        return counts

    def field(name: str) -> int:
        match = re.search(rf"\.{name}:\s+(\d+)", text)
        return int(match.group(1)) if match else 0

    return field("vgpr_count"), field("private_segment_fixed_size"), widths("load"), widths("store")


def compiled(target: str) -> list[Compiled]:
    """Every kernel in every case, compiled for a target."""
    table = []
    for case, call in CASES.items():
        with offline(TARGETS[target]) as kernels:
            call()
        for kernel in kernels:
            registers, stack, loads, stores = _amd(kernel) if "amdgcn" in kernel.asm else _nvidia(kernel.asm["cubin"])
            shared, warps = kernel.metadata.shared, kernel.metadata.num_warps
            resident = occupancy(target, registers, shared, warps)
            flight = 0
            if kernel.metadata.name in ROW_KERNELS and ", V " in case and "cubin" in kernel.asm:
                flight = least_in_flight(kernel.asm["cubin"]) * 32 * resident.warps
            table.append(
                Compiled(
                    case, kernel.metadata.name, target, registers, stack, shared, loads, stores, warps, resident, flight
                )
            )  # fmt: skip
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", choices=TARGETS, nargs="*", default=list(TARGETS))
    parser.add_argument("--json", action="store_true", help="print JSON rather than a table")
    arguments = parser.parse_args()
    rows = [row for target in arguments.target for row in compiled(target)]
    if arguments.json:
        print(json.dumps([asdict(row) for row in rows]))
        return
    print(
        f"{'target':8}{'kernel':22}{'case':38}{'regs':>5}{'stack':>7}{'shared':>7}{'flight':>8}  {'occupancy':24}"
        "loads, stores {bits: count}"
    )
    for row in rows:
        print(
            f"{row.target:8}{row.kernel:22}{row.case:38}{row.registers:5}{row.stack_bytes:7}{row.shared_bytes:7}"
            f"{row.in_flight:8}  {'{}/{} ({})'.format(*row.occupancy):24}{row.loads} {row.stores}"
        )


if __name__ == "__main__":
    main()
