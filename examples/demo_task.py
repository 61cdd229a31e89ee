"""The demo's task: reasoning-gym's `spell_backward`, its verifier, and a held-out split by word.

reasoning-gym draws entry i from `Random(seed + i)`, so neighbouring seeds give overlapping entries and one seed repeats
words. A split by index would leak; here entries are made unique by word first, and the split is by word.
"""

from __future__ import annotations

import random
from typing import Any

import reasoning_gym

DATASET_SEED = 20_000  # fixes the words and the split, whatever the seed of the run: accuracies compare across seeds
DATASET_SIZE = 12_000


class SpellBackward:
    """Words of `min_length` to `max_length` letters, `held_out` of them kept away from training."""

    name = "spell_backward"

    def __init__(self, *, min_length: int = 3, max_length: int = 7, held_out: int = 512) -> None:
        self.max_length = max_length
        self._dataset = reasoning_gym.create_dataset(
            self.name, min_word_len=min_length, max_word_len=max_length, size=DATASET_SIZE, seed=DATASET_SEED
        )
        unique: dict[str, dict[str, Any]] = {}
        for entry in self._dataset:
            unique.setdefault(entry["metadata"]["word"].lower(), entry)
        entries = list(unique.values())
        if held_out >= len(entries):
            raise ValueError(f"held_out must be below the {len(entries)} distinct words, got {held_out}")
        self.held_out = entries[:held_out]
        self.train = entries[held_out:]

    def draw(self, rng: random.Random, count: int) -> list[dict[str, Any]]:
        """`count` different training entries."""
        return rng.sample(self.train, count)

    def prompt(self, entry: dict[str, Any]) -> str:
        """What the policy reads: the word alone, as the instruction around it is the same in every question."""
        return entry["metadata"]["word"].lower()

    def answer(self, entry: dict[str, Any]) -> str:
        """What a supervised step teaches; the verifier ignores case, so the alphabet is lower case."""
        return entry["answer"].lower()

    def reward(self, entry: dict[str, Any], text: str) -> float:
        """1 if the verifier gives full marks, else 0.

        `score_answer` pays for every letter in its place, so a wrong answer can score 6/7, and an answer that spells a
        six-letter word and then goes on scores 1 - 1e-16 (six times 1/6), which is 1 in fp32. Full marks are therefore
        told from the rest here, in Python's doubles, and not by a threshold on a tensor.
        """
        return float(self._dataset.score_answer(text, entry) >= 1.0)
