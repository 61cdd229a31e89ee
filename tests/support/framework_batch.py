"""Rollouts of groups that lie across micro-batches and ranks, and the gradient that the whole batch's loss has."""

from __future__ import annotations

import torch
from torch import Tensor

from conspo_kernels import conspo_loss, token_logprobs

TAU, MARGIN = 0.4, 0.3
SETTINGS = {"tau": TAU, "margin": MARGIN}
TOLERANCE = 1e-6  # relative to the largest entry of the gradient, fp32


class FrameworkBatch:
    """16 rollouts of four prompts, in turns; logits are a leaf. Prompts are PROMPT tokens, responses up to RESPONSE."""

    VOCAB, PROMPT, RESPONSE, ROLLOUTS = 23, 2, 6, 16

    def __init__(self, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        rows, length = self.ROLLOUTS, self.PROMPT + self.RESPONSE
        self.lengths = torch.tensor([6, 1, 3, 4, 2, 5, 6, 6, 1, 3, 4, 2, 6, 5, 4, 3])
        self.ids = torch.randint(self.VOCAB, (rows, length), generator=generator)
        self.logits = torch.randn(rows, length, self.VOCAB, generator=generator).mul_(2).requires_grad_()
        self.mask = torch.arange(self.RESPONSE) < self.lengths[:, None]  # [S, RESPONSE]
        self.mask[3, 1] = False  # a token that a tool wrote
        rewards = [1, 0, 0, 1, 0, 1, 0, 0, 1, 1, 0, 1, 0, 0, 0, 0]  # none of the third prompt's is right
        self.rewards = torch.tensor(rewards, dtype=torch.float32)
        self.groups = torch.tensor([0, 1, 2, 3] * 4)

    @property
    def full_mask(self) -> Tensor:
        """[S, PROMPT + RESPONSE]."""
        return torch.cat([torch.zeros(self.ROLLOUTS, self.PROMPT, dtype=torch.bool), self.mask], dim=1)

    def response_logprobs(self) -> Tensor:
        """[S, RESPONSE], of each response token, as every framework here aligns them; with a graph."""
        logp = token_logprobs(self.logits, self.ids, shift=True)
        return logp[:, self.PROMPT - 1 : -1]

    def loss(self, **options: float) -> Tensor:
        return conspo_loss(
            self.logits, self.ids, self.rewards, self.groups, response_mask=self.full_mask, shift=True,
            **{**SETTINGS, **options},
        )  # fmt: skip

    def gradient(self, **options: float) -> Tensor:
        """The gradient of the whole batch's loss, in one call."""
        return torch.autograd.grad(self.loss(**options), self.logits)[0]

    def accumulated(self) -> Tensor:
        """The gradient that backward calls have added up on the logits; their sum starts anew."""
        gradient, self.logits.grad = self.logits.grad, None
        assert gradient is not None
        return gradient


def relative(x: Tensor, reference: Tensor) -> float:
    return float((x - reference).abs().max() / reference.abs().max())
