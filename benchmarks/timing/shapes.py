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
    "Gemma-3-12B": (3840, 262_144),
    "Qwen3.5": (2048, 248_320),
    "SmolLM2-135M": (576, 49_152),
    "GPT-2": (768, 50_257),
}


@dataclass(frozen=True)
class Shape:
    """Logits [rollouts, length, vocab_size] of rollouts in groups of `group_size`.

    peaked: one logit of a row is far above the rest, as a trained policy's are; else they are normal, and too flat.
    skewed: one rollout in four is whole, and the others stop after 1/4, 1/2 and 1/8 of the length.
    half: the rollouts of every second group are all right, so that its tokens get no gradient.
    softcap: of the logits, as Gemma's heads have it.
    entropy: the ops with entropy are timed too.
    few: timed beside eager PyTorch alone.
    target: of the targets that the shape is there for, none if empty.
    """

    rollouts: int
    length: int
    vocab_size: int
    dtype: torch.dtype
    group_size: int = 8
    peaked: bool = False
    skewed: bool = False
    half: bool = False
    softcap: float | None = None
    entropy: bool = False
    few: bool = False
    target: str = ""

    @property
    def tokens(self) -> int:
        return self.rollouts * self.length

    @property
    def plain(self) -> bool:
        """Normal logits of whole rollouts, as they are: what is drawn over N and V."""
        return not (self.peaked or self.skewed or self.half or self.softcap)

    @property
    def lengths(self) -> list[int]:
        """Response tokens of each rollout."""
        cuts = (1, 4, 2, 8) if self.skewed else (1,)
        return [max(self.length // cuts[i % len(cuts)], 1) for i in range(self.rollouts)]

    @property
    def rights(self) -> list[bool]:
        """Which rollouts are right: the first half of each group, or with `half` all of every second group."""
        groups = [divmod(i, self.group_size) for i in range(self.rollouts)]
        return [place < self.group_size // 2 or (self.half and group % 2 == 1) for group, place in groups]

    @property
    def response_tokens(self) -> int:
        return sum(self.lengths)

    @property
    def contrasted_tokens(self) -> int:
        """Those of groups with right and wrong rollouts."""
        groups = [i // self.group_size for i in range(self.rollouts)]
        return sum(n for n, group in zip(self.lengths, groups, strict=True) if not (self.half and group % 2 == 1))

    @property
    def row_bytes(self) -> int:
        return self.vocab_size * self.dtype.itemsize

    @property
    def logits_bytes(self) -> int:
        return self.tokens * self.row_bytes

    def __str__(self) -> str:
        kinds = [name for name in ("peaked", "skewed", "half", "softcap") if getattr(self, name)]
        return ", ".join([f"{self.tokens:,} x {self.vocab_size:,} {str(self.dtype).removeprefix('torch.')}", *kinds])


@dataclass(frozen=True)
class LinearShape:
    """Hidden states [rollouts, length, hidden_size] and a head [vocab_size, hidden_size].

    workspace_mib: None: the library's default, which is what users have.
    few: timed beside eager PyTorch alone.
    needs: a module without which the rival that the shape is there for computes something else.
    """

    rollouts: int
    length: int
    hidden_size: int
    vocab_size: int
    dtype: torch.dtype
    group_size: int = 8
    workspace_mib: int | None = None
    softcap: float | None = None
    few: bool = False
    target: str = ""
    needs: str | None = None

    @property
    def tokens(self) -> int:
        return self.rollouts * self.length

    @property
    def gemm_operations(self) -> int:
        return 2 * self.tokens * self.hidden_size * self.vocab_size

    @property
    def gemm_bytes(self) -> int:
        """Operands and result of one GEMM, each once."""
        n, h, v = self.tokens, self.hidden_size, self.vocab_size
        return (n * h + v * h + n * v) * self.dtype.itemsize

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        kinds = [dtype, *["softcap"] * bool(self.softcap)]
        kinds += [] if self.workspace_mib is None else [f"{self.workspace_mib} MiB"]
        return f"{self.tokens:,} x {self.hidden_size:,} x {self.vocab_size:,} {', '.join(kinds)}"


QWEN, LLAMA, GEMMA, GPT2 = (MODELS[name][1] for name in ("Qwen3-8B", "Llama-3-8B", "Gemma-3-4B", "GPT-2"))

GEMMA_SOFTCAP = 30.0

BF16, FP32 = torch.bfloat16, torch.float32

SUITES = {
    # Seconds even under Triton's interpreter: that every line of the benchmarks runs, not what it would show.
    "quick": (
        Shape(4, 3, 1000, FP32, 4),
        Shape(4, 3, 1003, BF16, 4),
        Shape(8, 8, 300, FP32, 4, peaked=True, skewed=True, half=True),
        Shape(4, 3, 200, BF16, 4, softcap=GEMMA_SOFTCAP, entropy=True),
    ),
    # Larger than the caches of most CPUs; few enough rows for minutes.
    "cpu": (
        Shape(16, 16, QWEN, FP32),
        Shape(16, 16, QWEN, BF16),
        Shape(16, 16, GPT2, FP32),
        Shape(16, 16, GPT2, BF16),
        Shape(16, 4, QWEN, BF16),
        Shape(16, 16, QWEN, BF16, peaked=True, skewed=True, half=True),
    ),
    # What settles the targets first, and then each thing that random logits of whole rollouts do not show.
    "gpu": (
        Shape(8, 1024, QWEN, BF16, entropy=True, target="L1 L2"),
        Shape(8, 64, QWEN, BF16, target="L4-rows"),
        Shape(8, 1024, GEMMA, BF16, target="L4-Gemma"),
        Shape(8, 1024, GPT2, BF16, target="L4-GPT-2"),
        Shape(8, 1024, LLAMA, BF16, target="L4-Llama"),
        Shape(8, 1024, GEMMA, BF16, softcap=GEMMA_SOFTCAP, entropy=True),
        Shape(8, 4096, QWEN, BF16, target="L3"),
        Shape(8, 1024, QWEN, BF16, peaked=True, few=True),
        Shape(8, 1024, QWEN, BF16, skewed=True, few=True),
        Shape(16, 512, QWEN, BF16, half=True, few=True),
        Shape(8, 1024, QWEN, FP32, few=True),
    ),
    # The same for a simulated one.
    "gpu-tiny": (
        Shape(2, 2, 61, BF16, 2, target="L1 L2 L3 L4-Llama L4-Gemma L4-GPT-2 L4-rows"),
        Shape(2, 2, 40, BF16, 2, skewed=True, half=True, few=True, softcap=GEMMA_SOFTCAP, entropy=True),
    ),
}


def _linear(model: str, rollouts: int, length: int, dtype: torch.dtype, target: str = "") -> LinearShape:
    return LinearShape(rollouts, length, *MODELS[model], dtype, target=target)


LINEAR_SUITES = {
    "quick": (LinearShape(4, 3, 16, 1000, FP32, 2), LinearShape(4, 3, 16, 1003, BF16, 2)),
    "cpu": (LinearShape(32, 16, 896, QWEN, FP32), LinearShape(32, 16, 896, QWEN, BF16)),
    # F1 to F4, with the workspace that users have; the shape at which Liger states its rate; the first, with the
    # workspace of a small GPU; vocabularies of rows that are no whole 16 bytes, GPT-2's and Llama 3's with one token
    # more; the widest and the smallest head.
    "gpu": (
        _linear("Qwen3-8B", 32, 256, BF16, target="F1 F2 F3 F4"),
        LinearShape(32, 256, 4096, 131_072, BF16, target="F1-Liger", needs="cutlass"),
        LinearShape(32, 256, *MODELS["Qwen3-8B"], BF16, workspace_mib=512, few=True),
        LinearShape(32, 256, *MODELS["GPT-2"], BF16, few=True),
        LinearShape(32, 256, MODELS["Llama-3-8B"][0], LLAMA + 1, BF16, few=True),
        LinearShape(32, 256, *MODELS["Gemma-3-12B"], BF16, softcap=GEMMA_SOFTCAP),
        _linear("Gemma-3-4B", 32, 256, BF16),
        _linear("Qwen2.5-1.5B", 32, 256, BF16),
    ),
    "gpu-tiny": (
        LinearShape(4, 1, 16, 40, BF16, 2, target="F1 F2 F3 F4 F1-Liger"),
        LinearShape(4, 1, 16, 40, BF16, 2, softcap=GEMMA_SOFTCAP),
        LinearShape(4, 1, 16, 41, BF16, 2, few=True),
    ),
}
# Tokens, at which the fused-linear path may hold the same memory beyond its gradients (M1); hidden size, vocabulary.
MEMORY = {"gpu": ((2048, 8192, 32_768), 2048, QWEN, 512), "gpu-tiny": ((8,), 16, 40, 1)}
SCORES = (64, 16)  # groups, and rollouts in each, of the objective alone (L5)
