"""What is promised beside speed: memory that does not grow with the tokens (M1), and no recompilation (C1).

python -m benchmarks.timing.behaviour --suite gpu --out DIR    # behaviour.json
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.timing import fused_linear
from benchmarks.timing.measure import peak_bytes
from benchmarks.timing.rows import Row
from benchmarks.timing.shapes import MEMORY, LinearShape
from benchmarks.timing.tables import write
from conspo_kernels import conspo_loss

WARMUPS = 3  # dynamo takes the second length as a sign that lengths change


def memory(suite: str, device: torch.device, implementation: str) -> Iterator[Row]:
    """Peak memory of the fused-linear path beyond the gradients that are returned and one fp32 accumulator."""
    tokens, hidden_size, vocab_size, workspace_mib = MEMORY[suite]
    for num_tokens in tokens:
        shape = LinearShape(
            8, num_tokens // 8, hidden_size, vocab_size, torch.bfloat16, workspace_mib=workspace_mib
        )  # fmt: skip
        inputs = fused_linear.Inputs.from_shape(shape, device)
        for name in ("linear, recompute", "linear, known weights"):
            op = fused_linear.OPS[name]
            call = fused_linear.call(op, fused_linear.ours(op, inputs, implementation), inputs)
            call.run(call.prepare())
            peak = peak_bytes(call, device)
            gradients = (num_tokens + vocab_size) * hidden_size * shape.dtype.itemsize
            accumulator = max(num_tokens, vocab_size) * hidden_size * 4
            yield {
                "what": "memory", "op": name, "shape": str(shape), "tokens": num_tokens, "peak_bytes": peak,
                "gradient_bytes": gradients, "accumulator_bytes": accumulator,
                "extra_bytes": max(peak - gradients - accumulator, 0), "workspace_bytes": workspace_mib * 2**20,
            }  # fmt: skip


class Steps:
    """Training steps of the logits path, each of another length and margin. group_size: of two groups."""

    def __init__(self, device: torch.device, implementation: str, vocab_size: int, group_size: int) -> None:
        self.device, self.implementation = device, implementation
        self.vocab_size, self.group_size = vocab_size, group_size

    def loss(
        self, logits: torch.Tensor, labels: torch.Tensor, rewards: torch.Tensor, margin: torch.Tensor
    ) -> torch.Tensor:
        return conspo_loss(
            logits, labels, rewards, self.group_size, margin=margin, implementation=self.implementation
        )  # type: ignore[return-value]  # fmt: skip

    def batch(self, length: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        rollouts = 2 * self.group_size
        logits = torch.randn(rollouts, length, self.vocab_size, device=self.device, requires_grad=True)
        labels = torch.randint(self.vocab_size, logits.shape[:2], device=self.device)
        return logits, labels, torch.arange(rollouts, device=self.device) % 2

    def run(self, i: int, loss: Any) -> None:
        loss(*self.batch(2 + i), torch.tensor(0.05 * i, device=self.device)).backward()


def recompilations(steps: Steps, backend: str, num_steps: int) -> Row:
    """After a warm-up: kernels that Triton compiles anew, and graphs that dynamo does."""
    import triton
    from torch._dynamo.utils import counters

    compiled: list[str] = []

    def seen(*_: object, **about: Any) -> None:
        compiled.append(about["repr"])

    triton.knobs.runtime.jit_cache_hook = seen  # called when a kernel is not in the cache; false goes on to compile
    try:
        for i in range(WARMUPS):
            steps.run(i, steps.loss)
        before = len(compiled)
        for i in range(num_steps):
            steps.run(WARMUPS + i, steps.loss)
    finally:
        triton.knobs.runtime.jit_cache_hook = None
    torch._dynamo.reset()
    loss = torch.compile(steps.loss, fullgraph=True, backend=backend)
    for i in range(WARMUPS):
        steps.run(i, loss)
    graphs = counters["stats"]["unique_graphs"]
    for i in range(num_steps):
        steps.run(WARMUPS + i, loss)
    return {
        "what": "recompilations", "steps": num_steps, "triton": len(compiled) - before,
        "triton_in_warmup": before, "dynamo": counters["stats"]["unique_graphs"] - graphs,
        "fullgraph": True, "backend": backend,
    }  # fmt: skip


def synchronisation(steps: Steps) -> Row:
    """Whether a warmed-up step makes the host wait."""
    batch, margin = steps.batch(6), torch.tensor(0.1, device=steps.device)
    steps.loss(*batch, margin).backward()
    batch[0].grad = None
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        steps.loss(*batch, margin).backward()
        message = ""
    except RuntimeError as error:
        message = str(error).splitlines()[0]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return {"what": "synchronisation", "found": message}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", choices=MEMORY, default="gpu")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    on_gpu = arguments.suite == "gpu"
    device = torch.device("cuda")
    steps = Steps(device, "triton", *((10_000, 8) if on_gpu else (20, 2)))
    rows: list[Row] = []
    checks = (
        lambda: [synchronisation(steps)],
        lambda: memory(arguments.suite, device, "triton"),
        lambda: [recompilations(steps, "inductor", 20 if on_gpu else 1)],  # the dearest last
    )
    for check in checks:
        for row in check():
            rows.append(row)
            print(row, flush=True)
            write(arguments.out / "behaviour.json", {"rows": rows})


if __name__ == "__main__":
    main()
