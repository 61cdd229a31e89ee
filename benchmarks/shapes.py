"""The shapes that are measured, and where they come from. One file for every benchmark."""

from __future__ import annotations

from dataclasses import dataclass

import torch

# Hidden size and vocabulary of the models people train with RLVR.
MODELS = {
    "Qwen2.5-1.5B": (1536, 151_936),
    "Qwen3-4B": (2560, 151_936),
    "Qwen2.5-7B": (3584, 152_064),
    "Qwen3-8B": (4096, 151_936),
    "Llama-3-8B": (4096, 128_256),
    "Gemma-3-4B": (2560, 262_144),
    "Qwen3.5": (2048, 248_320),
    "SmolLM2-135M": (576, 49_152),
    "GPT-2": (768, 50_257),
}


@dataclass(frozen=True)
class Shape:
    """Logits [rollouts, length, vocab_size] of rollouts in groups of `group_size`."""

    rollouts: int
    length: int
    vocab_size: int
    dtype: torch.dtype
    group_size: int = 8

    @property
    def tokens(self) -> int:
        return self.rollouts * self.length

    @property
    def logits_bytes(self) -> int:
        return self.tokens * self.vocab_size * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{self.tokens:,} x {self.vocab_size:,} {str(self.dtype).removeprefix('torch.')}"


@dataclass(frozen=True)
class LinearShape:
    """Hidden states [rollouts, length, hidden_size] and a head [vocab_size, hidden_size]."""

    rollouts: int
    length: int
    hidden_size: int
    vocab_size: int
    dtype: torch.dtype
    group_size: int = 8
    workspace_mib: int = 512

    @property
    def tokens(self) -> int:
        return self.rollouts * self.length

    @property
    def gemm_operations(self) -> int:
        return 2 * self.tokens * self.hidden_size * self.vocab_size

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.tokens:,} x {self.hidden_size:,} x {self.vocab_size:,} {dtype}"


QWEN, LLAMA, GEMMA, GPT2 = (MODELS[name][1] for name in ("Qwen3-8B", "Llama-3-8B", "Gemma-3-4B", "GPT-2"))

SUITES = {
    # Seconds even under Triton's interpreter: that every line of the benchmarks runs, not what it would show.
    "quick": (Shape(4, 3, 1000, torch.float32, 4), Shape(4, 3, 1003, torch.bfloat16, 4)),
    # Larger than the caches of most CPUs; few enough rows for minutes.
    "cpu": (
        Shape(16, 16, QWEN, torch.float32),
        Shape(16, 16, QWEN, torch.bfloat16),
        Shape(16, 16, GPT2, torch.float32),
        Shape(16, 16, GPT2, torch.bfloat16),
    ),
    # L1 to L4 of the targets: a micro-batch, a batch of rollouts, other vocabularies (one odd), few rows.
    "gpu": (
        Shape(8, 1024, QWEN, torch.bfloat16),
        Shape(8, 4096, QWEN, torch.bfloat16),
        Shape(8, 1024, LLAMA, torch.bfloat16),
        Shape(8, 1024, GEMMA, torch.bfloat16),
        Shape(8, 1024, GPT2, torch.bfloat16),
        Shape(8, 64, QWEN, torch.bfloat16),
        Shape(8, 1024, QWEN, torch.float32),
    ),
}
LINEAR_SUITES = {
    "quick": (LinearShape(4, 3, 16, 1000, torch.float32, 2), LinearShape(4, 3, 16, 1003, torch.bfloat16, 2)),
    "cpu": (LinearShape(32, 16, 896, QWEN, torch.float32), LinearShape(32, 16, 896, QWEN, torch.bfloat16)),
    # F1 to F4 of the targets.
    "gpu": (LinearShape(32, 256, 4096, QWEN, torch.bfloat16), LinearShape(32, 256, 2560, QWEN, torch.bfloat16)),
}
SCORES = (64, 16)  # groups, and rollouts in each, of the objective alone (L5)
