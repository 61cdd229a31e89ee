"""What a run can be told on the command line, and the defaults of each model."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

COLUMNS = ("char", "smollm2", "smollm2 on a GPU")
DEFAULTS = {
    "steps": (200, 20, 100),
    "prompts_per_step": (32, 8, 32),
    "group_size": (8, 8, 16),
    "lr": (1e-4, 2e-5, 1e-5),
    "max_grad_norm": (1.0, 1.0, 1.0),
    "temperature": (1.0, 1.0, 1.0),
    "tau": (10.0, 10.0, 10.0),
    "margin": (0.01, 0.01, 0.01),
    "margin_warmup": (0.3, 0.3, 0.3),
    "warmup_steps": (2000, 0, 0),  # a pretrained model solves some prompts as it comes
    "held_out": (512, 64, 64),
    "eval_samples": (4, 4, 16),
    # char: matrices of 128 columns leave little to share, and threads wait for each other where another process wants
    # a core.
    "threads": (1, 2, 2),
    "out": (Path("runs/demo"), Path("runs/smollm2"), Path("runs/smollm2")),
}
MODELS = ("char", "smollm2")


def resolve_device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def defaults(model: str, device: torch.device) -> dict[str, Any]:
    """The column of the table for a model and the device it runs on."""
    on_gpu = f"{model} on a GPU"
    column = COLUMNS.index(on_gpu if device.type == "cuda" and on_gpu in COLUMNS else model)
    return {name: values[column] for name, values in DEFAULTS.items()}


def parse_arguments(argv: Sequence[str] | None, description: str) -> argparse.Namespace:
    """The settings of a run. Model and device are read first: the other defaults, --help's too, depend on them."""
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument("--model", choices=MODELS, default="char", help="other defaults depend on it")
    first.add_argument(
        "--device", type=resolve_device, default="auto", help="auto (a GPU where there is one), cpu, cuda, cuda:1 ..."
    )
    chosen, _ = first.parse_known_args(argv)

    parser = argparse.ArgumentParser(
        description=description, parents=[first], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--loss", choices=("conspo", "grpo"), default="conspo")
    add("--fused-linear", action="store_true", help="compute the loss from hidden states rather than from logits")
    add("--seed", type=int, default=0)
    add("--steps", type=int, help="reinforcement learning steps")
    add("--prompts-per-step", type=int, help="different prompts per step")
    add("--group-size", type=int, help="rollouts per prompt")
    add("--lr", type=float, help="Adam's learning rate")
    add("--max-grad-norm", type=float, help="the gradient is clipped to this")
    add("--temperature", type=float, help="of the rollouts and of the loss; evaluation is at 1")
    add("--tau", type=float, help="temperature of the contrast between rollouts, nats per token")
    add("--margin", type=float, help="target margin, nats per token")
    add("--margin-warmup", type=float, help="fraction of the steps over which the margin rises")
    add("--warmup-steps", type=int, help="supervised steps at most, 0 for none")
    add("--warmup-accuracy", type=float, default=0.35, help="sampled accuracy at which the supervised steps end")
    add("--warmup-lr", type=float, default=5e-4)
    add("--warmup-batch", type=int, default=64, help="prompts per supervised step")
    add("--warm-start", type=Path, help="file that keeps the warmed-up weights: read if it is there, else written")
    add("--held-out", type=int, help="prompts kept for evaluation")
    add("--eval-samples", type=int, help="samples per held-out prompt")
    add("--implementation", choices=("auto", "torch", "triton", "native"), default="auto")
    add("--threads", type=int, help="CPU threads")
    add("--out", type=Path, help="folder of the results")
    parser.set_defaults(**defaults(chosen.model, chosen.device))
    arguments = parser.parse_args(argv)
    counts = ("steps", "prompts_per_step", "warmup_batch", "held_out", "eval_samples", "threads")
    for name, least in {**dict.fromkeys(counts, 1), "warmup_steps": 0}.items():
        if getattr(arguments, name) < least:
            parser.error(f"--{name.replace('_', '-')} must be at least {least}, got {getattr(arguments, name)}")
    if arguments.group_size < 2:
        parser.error(f"--group-size must be at least 2 for a contrast, got {arguments.group_size}")
    return arguments
