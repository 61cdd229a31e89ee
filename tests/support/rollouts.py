"""Rollouts for a model, and what its own logits say of them."""

from __future__ import annotations

import torch
from tiny_models import VOCAB
from torch import Tensor, nn

from conspo_kernels import (
    conspo_loss,
)

LENGTHS, PROMPTS = (9, 4, 12, 7), (3, 1, 4, 6)
REWARDS = torch.tensor([1.0, 0.0, 0.0, 1.0])
OPTIONS = {"tau": 0.5, "margin": 0.2, "temperature": 0.8}


def padded_batch(side: str = "right") -> dict[str, Tensor]:
    """Four rollouts; padding holds nonsense in its labels, as `input_ids.clone()` would."""
    generator = torch.Generator().manual_seed(1)
    shape = (len(LENGTHS), max(LENGTHS))
    ids = torch.randint(3, VOCAB, shape, generator=generator)
    attention, response = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64)
    for row, (length, prompt) in enumerate(zip(LENGTHS, PROMPTS, strict=True)):
        start = shape[1] - length if side == "left" else 0
        attention[row, start : start + length] = 1
        response[row, start + prompt : start + length] = 1
    labels = ids.masked_fill((response == 0) & (attention == 1), -100)
    return {"input_ids": ids, "attention_mask": attention, "labels": labels}


def own_logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits


def own_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """From the model's own logits, which hold its scale and softcap already."""
    labels = batch["labels"].masked_fill(batch["attention_mask"] == 0, -100)
    return conspo_loss(own_logits(model, batch), labels, REWARDS, 2, shift=True, **OPTIONS)


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_gradients_equal(result: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Relative to the largest gradient's norm: one parameter's may be rounding alone (a bias before a norm)."""
    assert result.keys() == expected.keys()
    largest = max(x.norm() for x in expected.values())
    assert largest > 0
    for name, value in expected.items():
        assert (result[name] - value).norm() <= 1e-5 * largest, name
