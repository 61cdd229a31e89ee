"""The demo's tasks: reasoning-gym's problems, their verifiers, and held-out splits by problem.

reasoning-gym draws entry i from `Random(seed + i)`, so neighbouring seeds give overlapping entries and one seed repeats
problems. A split by index would leak; here entries are made unique by problem first, and the split is by problem.
"""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import random
import re
import sys
from typing import Any

DATASET_SEED = 20_000  # fixes the problems and the split, whatever the seed of the run: accuracies compare across seeds

Entry = dict[str, Any]  # a problem as reasoning-gym gives it


def create_dataset(category: str, name: str, **config: int) -> Any:
    """One of reasoning-gym's datasets, imported alone: of what the package depends on it needs PyYAML only.

    `import reasoning_gym` imports all of its hundred datasets, and with them eleven packages. One of these, pycosat,
    has no wheels, so pip would compile it. Here the packages above the dataset's module are made without running their
    `__init__`.
    """
    for package in ("reasoning_gym", f"reasoning_gym.{category}"):
        if package not in sys.modules:
            spec = importlib.util.find_spec(package)
            if spec is None:
                raise ModuleNotFoundError(
                    "the demo's tasks are in reasoning-gym, which it needs without its own dependencies: "
                    "pip install --no-deps reasoning-gym==0.1.25 (`make demo` does)",
                    name=package,
                )
            sys.modules[package] = importlib.util.module_from_spec(spec)
    importlib.import_module(f"reasoning_gym.{category}.{name}")  # which registers it
    return importlib.import_module("reasoning_gym.factory").create_dataset(name, **config)


class Task:
    """Problems of one of reasoning-gym's datasets, `held_out` of them kept away from training.

    A task says what the policy reads (`prompt`), what a supervised step would teach (`answer`) and what the verifier is
    shown of a response (`extract`).
    """

    category: str
    name: str
    max_new_tokens: int  # of a response, its end of sequence among them

    def __init__(self, held_out: int, **config: int) -> None:
        self._dataset = create_dataset(self.category, self.name, seed=DATASET_SEED, **config)
        unique: dict[str, Entry] = {}
        for entry in self._dataset:
            unique.setdefault(self.prompt(entry), entry)
        entries = list(unique.values())
        if held_out >= len(entries):
            raise ValueError(f"held_out must be below the {len(entries)} distinct problems, got {held_out}")
        self.held_out = entries[:held_out]
        self.train = entries[held_out:]

    def draw(self, rng: random.Random, count: int) -> list[Entry]:
        """`count` different training entries."""
        return rng.sample(self.train, count)

    def prompt(self, entry: Entry) -> str:
        raise NotImplementedError

    def answer(self, entry: Entry) -> str:
        raise NotImplementedError

    def extract(self, text: str) -> str:
        return text

    def reward(self, entry: Entry, text: str) -> float:
        """1 if the verifier gives full marks, else 0.

        `score_answer` pays for parts of an answer, such as every letter in its place. A wrong spelling can score 6/7,
        and one that spells a six-letter word and then goes on scores 1 - 1e-16 (six times 1/6), which is 1 in fp32.
        Full marks are therefore told from the rest here, in Python's doubles, and not by a threshold on a tensor.
        """
        return float(self._dataset.score_answer(self.extract(text), entry) >= 1.0)


class SpellBackward(Task):
    """Words of `min_length` to `max_length` letters."""

    category = "algorithmic"
    name = "spell_backward"

    def __init__(self, *, min_length: int = 3, max_length: int = 7, held_out: int = 512) -> None:
        # Two more than the longest answer: its end of sequence, and one token in which to be too long.
        self.max_new_tokens = max_length + 2
        super().__init__(held_out, min_word_len=min_length, max_word_len=max_length, size=12_000)

    def prompt(self, entry: Entry) -> str:
        """The word alone, as the instruction around it is the same in every question."""
        return entry["metadata"]["word"].lower()

    def answer(self, entry: Entry) -> str:
        """The verifier ignores case, so the alphabet is lower case."""
        return entry["answer"].lower()


class OneDigitSums(Task):
    """`a + b` and `a - b` of two digits, 200 problems, asked as reasoning-gym asks them."""

    category = "arithmetic"
    name = "chain_sum"
    max_new_tokens = 16  # "The answer to 8 + 3 is 11." and its end of sequence are 15 tokens of SmolLM2

    def __init__(self, *, held_out: int = 64) -> None:
        super().__init__(held_out, min_terms=2, max_terms=2, min_digits=1, max_digits=1, size=4_000)

    def prompt(self, entry: Entry) -> str:
        return entry["question"]

    def answer(self, entry: Entry) -> str:
        return f"The answer is {entry['answer']}."

    def extract(self, text: str) -> str:
        """The last number of the text: what `The answer is 11.`, `8 + 3 = 11` and `11` agree on."""
        numbers = re.findall(r"-?\d+(?:\.\d+)?", text)
        return numbers[-1] if numbers else ""


class RunningSums(Task):
    """Sums and differences of `min_terms` to `max_terms` digits, worked out term by term: "4-6+9" -> "-2,7".

    The verifier sees the last number only: the working is the policy's own. Responses are of very different lengths.
    """

    category = "arithmetic"
    name = "chain_sum"
    signs = "+-,"  # what its tokens need beside digits

    def __init__(self, *, min_terms: int = 2, max_terms: int = 8, held_out: int = 512, size: int = 12_000) -> None:
        # Three digits with sign and comma for each result, and room for as much again.
        self.max_new_tokens = 4 * max_terms
        super().__init__(held_out, min_terms=min_terms, max_terms=max_terms, min_digits=1, max_digits=1, size=size)

    def prompt(self, entry: Entry) -> str:
        return entry["metadata"]["expression"].replace(" ", "")

    def answer(self, entry: Entry) -> str:
        terms = [int(term) for term in re.findall(r"[+-]?\d+", self.prompt(entry))]
        return ",".join(str(total) for total in list(itertools.accumulate(terms))[1:])

    def extract(self, text: str) -> str:
        """The last number, of a response that is nothing but numbers."""
        return text.split(",")[-1] if re.fullmatch(r"-?\d+(,-?\d+)*", text) else ""
