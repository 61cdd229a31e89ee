"""What the loss takes of one RLVR step of a Llama-like model, in time and memory, eager against ours.

python -m benchmarks.training_step    # tiny, on a CPU: that it runs
python -m benchmarks.training_step --device cuda --model Qwen2.5-1.5B --layers 28 --dtype bf16 --length 2048

A step is forward of the backbone, head and loss, and backward, from random weights. Then the longest context that fits
a memory, computed from a count of bytes (see `Bytes`) and not measured.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.rivals.baselines import conspo_loss_of, eager
from benchmarks.timing.measure import Call, environment, interleaved, peak_bytes
from benchmarks.timing.shapes import MODELS
from benchmarks.timing.tables import markdown, write
from conspo_kernels import conspo_loss, linear_conspo_loss

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
HEAD = 64  # width of an attention head
TAU, MARGIN = 0.5, 0.1

Loss = Callable[[Tensor, Tensor, Tensor, Tensor, int], Tensor]  # hidden, weight, labels, rewards, group size


def llama(hidden_size: int, vocab_size: int, layers: int, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """Its backbone and head with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=hidden_size, vocab_size=vocab_size, num_hidden_layers=layers, intermediate_size=hidden_size * 3,
        num_attention_heads=max(hidden_size // HEAD, 1), num_key_value_heads=max(hidden_size // HEAD, 1),
        max_position_embeddings=65_536, use_cache=False,
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(config).to(dtype=dtype, device=device)


def eager_loss(hidden: Tensor, weight: Tensor, labels: Tensor, rewards: Tensor, group_size: int) -> Tensor:
    logits = torch.nn.functional.linear(hidden, weight)
    return conspo_loss_of(eager)(logits, labels, None, rewards, group_size, TAU, MARGIN)


def ours(hidden: Tensor, weight: Tensor, labels: Tensor, rewards: Tensor, group_size: int) -> Tensor:
    logits = torch.nn.functional.linear(hidden, weight)
    return conspo_loss(logits, labels, rewards, group_size, tau=TAU, margin=MARGIN, inplace_backward=True)  # type: ignore[return-value]


def ours_linear(hidden: Tensor, weight: Tensor, labels: Tensor, rewards: Tensor, group_size: int) -> Tensor:
    return linear_conspo_loss(hidden, weight, labels, rewards, group_size, tau=TAU, margin=MARGIN)  # type: ignore[return-value]


LOSSES: dict[str, Loss] = {"eager": eager_loss, "conspo_loss": ours, "linear_conspo_loss": ours_linear}


class Step(NamedTuple):
    model: nn.Module
    labels: Tensor
    rewards: Tensor
    group_size: int

    def whole(self, loss: Loss) -> Call:
        """Forward, loss and backward; the gradients are gone before the next."""

        def run(_: object) -> Tensor:
            hidden = self.model.model(input_ids=self.labels).last_hidden_state
            value = loss(hidden, self.model.lm_head.weight, self.labels, self.rewards, self.group_size)
            value.backward()
            return value.detach()

        return Call(lambda: self.model.zero_grad(set_to_none=True), run)

    def part(self, loss: Loss) -> Call:
        """Head, loss and their backward, from hidden states that are there."""
        with torch.no_grad():
            states = self.model.model(input_ids=self.labels).last_hidden_state

        def run(hidden: Tensor) -> Tensor:
            value = loss(hidden, self.model.lm_head.weight, self.labels, self.rewards, self.group_size)
            value.backward()
            return value.detach()

        return Call(lambda: (self.model.zero_grad(set_to_none=True), states.detach().requires_grad_())[1], run)


def measure(step: Step, device: torch.device, repeats: int) -> list[dict[str, Any]]:
    """One row per loss: its value, the step's time and memory, and the share of head and loss."""
    calls = {("step", name): step.whole(loss) for name, loss in LOSSES.items()}
    calls |= {("head and loss", name): step.part(loss) for name, loss in LOSSES.items()}
    flat = {f"{what}: {name}": call for (what, name), call in calls.items()}
    timings = interleaved(flat, device, repeats)
    rows = []
    for name in LOSSES:
        whole, part = timings[f"step: {name}"], timings[f"head and loss: {name}"]
        call = flat[f"step: {name}"]
        value = call.run(call.prepare())
        rows.append(
            {
                "provider": name, "value": float(value),  # type: ignore[arg-type]
                "step": whole.fields()["seconds"], "head_and_loss": part.fields()["seconds"],
                "share": part.median / whole.median,
                "peak_bytes": peak_bytes(call, device),
            }
        )  # fmt: skip
    return rows


class Bytes(NamedTuple):
    """A count of what a step holds at its peak: weights, gradients and Adam, checkpointed layers, head and loss.

    Per parameter: weight and gradient in bf16, master weight and two moments in fp32, over `shards` devices. A layer
    has 4 H^2 parameters in attention and 9 H^2 in its MLP. Per token: one hidden state per layer (activation
    checkpointing) and one layer's activations, 34 bytes per hidden number (Korthikanti et al., 2022, attention's scores
    left out). Not counted: fragmentation, communication, buffers of the libraries.
    """

    hidden_size: int
    vocab_size: int
    layers: int
    shards: int = 1
    itemsize: int = 2

    @property
    def fixed(self) -> int:
        parameters = 13 * self.hidden_size**2 * self.layers + 2 * self.hidden_size * self.vocab_size
        return parameters * (2 * self.itemsize + 12) // self.shards

    def per_token(self, loss: str) -> int:
        """eager: logits, log-softmax and the gradient, each in the dtype of the logits.  ours: the logits, in place."""
        backbone = self.hidden_size * self.itemsize * self.layers + 34 * self.hidden_size
        copies = {"eager": 3, "conspo_loss": 1, "linear_conspo_loss": 0}[loss]
        return backbone + copies * self.vocab_size * self.itemsize

    def once(self, loss: str) -> int:
        """The workspace and the fp32 accumulator of the fused-linear path."""
        return 2**29 + 4 * self.hidden_size * self.vocab_size if loss == "linear_conspo_loss" else 0

    def tokens(self, loss: str, memory: int) -> int:
        return max(memory - self.fixed - self.once(loss), 0) // self.per_token(loss)


def context_table(memory: int, layers: int, rollouts: int, shards: int) -> str:
    """Tokens per rollout that fit, computed, for each model and loss."""
    lines = []
    for name, (hidden_size, vocab_size) in MODELS.items():
        model = Bytes(hidden_size, vocab_size, layers, shards)
        lines.append([name, *[f"{model.tokens(loss, memory) // rollouts:,}" for loss in LOSSES]])
    return markdown(["model", *LOSSES], lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--model", choices=MODELS, help="hidden size and vocabulary; default: 128 and 4096")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--rollouts", type=int, default=8)
    parser.add_argument("--group-size", type=int, default=4)
    parser.add_argument("--length", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--memory-gib", type=float, default=80.0, help="of the computed table")
    parser.add_argument("--context-layers", type=int, default=28, help="of the computed table")
    parser.add_argument(
        "--shards", type=int, default=8, help="devices that share weights and optimizer, computed table"
    )
    parser.add_argument("--out", type=Path, help="folder for training_step.json")
    arguments = parser.parse_args()
    hidden_size, vocab_size = MODELS.get(arguments.model, (128, 4096))
    device = arguments.device
    model = llama(hidden_size, vocab_size, arguments.layers, DTYPES[arguments.dtype], device)
    labels = torch.randint(vocab_size, (arguments.rollouts, arguments.length), device=device)
    rewards = (torch.arange(arguments.rollouts, device=device) % 2).float()
    rows = measure(Step(model, labels, rewards, arguments.group_size), device, arguments.repeats)
    lines = [
        (
            row["provider"], f"{row['value']:.5f}", f"{row['step']['median'] * 1e3:.3g}",
            f"{row['head_and_loss']['median'] * 1e3:.3g}", f"{row['share']:.0%}", f"{row['peak_bytes'] / 2**20:.1f}",
        )
        for row in rows
    ]  # fmt: skip
    print(
        f"{arguments.rollouts} rollouts x {arguments.length} tokens, hidden {hidden_size}, vocabulary {vocab_size:,}, "
        f"{arguments.layers} layers, {arguments.dtype}, {device.type}\n"
    )
    print(markdown(("loss", "value", "step ms", "head and loss ms", "share", "peak MiB"), lines))
    print(
        f"\nComputed from a count of bytes, not measured: tokens per rollout that fit {arguments.memory_gib:g} GiB, "
        f"{arguments.rollouts} rollouts a device, {arguments.context_layers} layers, Adam, weights over "
        f"{arguments.shards} devices\n"
    )
    print(
        context_table(int(arguments.memory_gib * 2**30), arguments.context_layers, arguments.rollouts, arguments.shards)
    )
    if arguments.out is not None:
        about = {name: str(value) for name, value in vars(arguments).items()}
        write(arguments.out / "training_step.json", {"step": about, "environment": environment(device), "steps": rows})


if __name__ == "__main__":
    main()
