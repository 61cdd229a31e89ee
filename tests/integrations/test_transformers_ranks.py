"""`InForward` under DDP and FSDP2: the gradient of all ranks' rollouts, groups straddling the ranks."""

from __future__ import annotations

import pytest
import ranks
import torch
import torch.distributed as dist
from tiny_models import VOCAB, tiny_model
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from conspo_kernels import Parallel, conspo_weights, linear_conspo_scores, linear_weighted_score_loss
from conspo_kernels.integrations.transformers import InForward, conspo_loss_of, head_inputs

REWARDS = torch.tensor([1.0, 0.0, 0.0, 1.0, 0.0, 1.0])
PROMPTS = torch.tensor([0, 0, 1, 0, 1, 1])


def rollouts() -> dict[str, Tensor]:
    ids = torch.randint(3, VOCAB, (6, 9), generator=torch.Generator().manual_seed(1))
    lengths, prompts = torch.tensor([9, 5, 7, 9, 4, 6]), torch.tensor([3, 1, 2, 4, 1, 2])
    position = torch.arange(9)
    attention = (position < lengths[:, None]).long()
    return {"input_ids": ids, "attention_mask": attention, "response_mask": attention * (position >= prompts[:, None])}


def scores_of(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return linear_conspo_scores(**head_inputs(model, batch))


def weighted_loss_of(model: nn.Module, batch: dict[str, Tensor], weights: Tensor) -> Tensor:
    return linear_weighted_score_loss(**head_inputs(model, batch), weights=weights)


def rank_gradients(rank: int, size: int, wrapper: str, two_phases: bool) -> dict[str, Tensor]:
    model = InForward(tiny_model("Llama"))
    if wrapper == "fsdp2":
        for layer in model.model.model.layers:
            fully_shard(layer)
        fully_shard(model)
        wrapped: nn.Module = model
    else:
        wrapped = DistributedDataParallel(model)
    mine = slice(rank * 3, rank * 3 + 3)
    batch = {name: value[mine] for name, value in rollouts().items()}
    parallel = Parallel(data=dist.group.WORLD)
    if two_phases:
        with torch.no_grad():
            scores = wrapped(scores_of, batch)
        weights = conspo_weights(scores, REWARDS[mine], PROMPTS[mine], tau=0.5, parallel=parallel).weights
        wrapped(weighted_loss_of, batch, weights).backward()
    else:
        wrapped(conspo_loss_of, batch, REWARDS[mine], PROMPTS[mine], tau=0.5, parallel=parallel).backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: g.full_tensor() if hasattr(g, "full_tensor") else g for name, g in grads.items()}


def rank_results(rank: int, size: int) -> tuple[list[dict[str, Tensor]], str]:
    gradients = [
        rank_gradients(rank, size, wrapper, phases) for wrapper in ("ddp", "fsdp2") for phases in (False, True)
    ]
    with pytest.raises(ValueError, match="sharded") as error:
        conspo_loss_of(fully_shard(tiny_model("Llama")), rollouts(), REWARDS, PROMPTS)
    return gradients, str(error.value)


def test_ranks_give_the_gradient_of_one_process() -> None:
    """And a model that is sharded itself, rather than inside of `InForward`, raises and says how to."""
    model = tiny_model("Llama")
    conspo_loss_of(model, rollouts(), REWARDS, PROMPTS, tau=0.5).backward()
    expected = {f"model.{name}": p.grad for name, p in model.named_parameters()}
    largest = max(g.norm() for g in expected.values())
    for gradients, error in ranks.run(2, rank_results):
        assert "shard InForward(model) instead of the model" in error
        assert len(gradients) == 4
        for result in gradients:
            assert result.keys() == expected.keys()
            for name, value in expected.items():
                assert (result[name] - value).norm() <= 1e-6 * largest, name
