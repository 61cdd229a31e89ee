"""Problems with one number as their answer: grade-school mathematics, or sums of two digits for a small run."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

INSTRUCTION = "Solve the problem step by step. End with the answer as a number on a line of its own.\n\n"


@dataclass(frozen=True)
class Problem:
    question: str
    answer: str


def last_number(text: str) -> str | None:
    """The last number of a text, without separators of thousands and trailing zeros: "1,250.0" is 1250."""
    numbers = re.findall(r"-?\d[\d,]*(?:\.\d+)?", text)
    if not numbers:
        return None
    number = numbers[-1].replace(",", "")
    return number.rstrip("0").rstrip(".") if "." in number else number


def reward(problem: Problem, response: str) -> float:
    """1 if the last number of the response is the answer, else 0."""
    return float(last_number(response) == last_number(problem.answer))


def gsm8k(split: str) -> list[Problem]:
    """GSM8K, 7473 problems to train on and 1319 to test: from the hub, by the package `datasets`."""
    from datasets import load_dataset

    rows = load_dataset("openai/gsm8k", "main", split=split)
    return [Problem(INSTRUCTION + row["question"], row["answer"].split("####")[-1].strip()) for row in rows]


def sums(split: str) -> list[Problem]:
    """A stand-in for a small run: `a+b=` for all digits whose sum is a digit, every fifth of them to test."""
    every = [Problem(f"{a}+{b}=", str(a + b)) for a in range(10) for b in range(10 - a)]
    return [problem for i, problem in enumerate(every) if (i % 5 == 0) == (split == "test")]


SOURCES = {"gsm8k": gsm8k, "sums": sums}


class Draws:
    """Problems in random order, all of them before one comes again."""

    def __init__(self, problems: list[Problem], seed: int) -> None:
        self._problems, self._rng, self._rest = problems, random.Random(seed), list[Problem]()

    def take(self, count: int) -> list[Problem]:
        taken: list[Problem] = []
        while len(taken) < count:
            if not self._rest:
                self._rest = self._rng.sample(self._problems, len(self._problems))
            taken.append(self._rest.pop())
        return taken
