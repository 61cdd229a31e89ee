"""Log-probabilities, rewards and groups for the objectives of `examples/objectives.py`."""

from __future__ import annotations

from typing import Any

import torch
from objectives import Objective, coefficients
from torch import Tensor

LENGTH = 7  # the most tokens that a response of `Batch` may have


class Batch:
    """Random log-probabilities of ragged rollouts, old ones that the clip acts on, and rewards of 0 and 1."""

    def __init__(self, seed: int, groups: int, size: int, length: int = LENGTH) -> None:
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            return torch.rand(*shape, generator=generator, dtype=torch.float64)

        shape = (groups * size, length)
        self.size = size
        self.logprobs = -3 * draw(*shape)
        self.old = self.logprobs + 0.6 * (draw(*shape) - 0.5)
        self.mask = (torch.arange(length) < (1 + draw(groups * size, 1) * length).long()).double()
        self.rewards = (draw(groups, size) < draw(groups, 1)).double().flatten()

    def gradient(self, objective: Objective, **constants: Any) -> Tensor:
        return coefficients(
            objective, self.logprobs, self.old, self.mask, self.rewards, self.size, **constants
        )[1]  # fmt: skip
