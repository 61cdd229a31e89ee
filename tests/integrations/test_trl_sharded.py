"""The head of `ConSPOTrainer` inside of a model that DDP or FSDP2 holds: the gradient of one process, on two ranks."""

from __future__ import annotations

import pytest
import ranks
import torch
import trl_parts as parts
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from conspo_kernels import sequence_scores
from conspo_kernels.integrations.trl.policy_head import PolicyHead

WEIGHTS = torch.tensor([0.4, -0.1, -0.3, 0.2, 0.3, -0.5])


def rollouts() -> dict[str, Tensor]:
    ids = torch.randint(2, 14, (6, 9), generator=torch.Generator().manual_seed(1))
    attention = (torch.arange(9) < torch.tensor([9, 5, 7, 9, 4, 6])[:, None]).long()
    labels = ids.masked_fill(attention == 0, -100)
    labels[:, :2] = -100
    return {"input_ids": ids, "attention_mask": attention, "labels": labels}


def gradients(wrapper: str, rows: slice, known: bool) -> dict[str, Tensor]:
    """Of the mean over all six rollouts of weight times score; each rank has half, and gradients are averaged."""
    model = parts.model()
    head = PolicyHead(model, 0.8, False)
    wrapped: torch.nn.Module = model
    if wrapper == "fsdp2":
        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
    elif wrapper == "ddp":
        wrapped = DistributedDataParallel(model)
    batch = {name: x[rows] for name, x in rollouts().items()}
    mask = (batch["labels"] != -100).long()
    with torch.no_grad():
        before = head.token_logprobs(wrapped)(**batch, fused_lm_head=True).log_probs
    scores = sequence_scores(before, torch.zeros_like(mask[:, 1:]), response_mask=mask[:, 1:])
    if known:
        policy_pass = head.weighted_scores(wrapped, WEIGHTS[rows], scores, mask, 1.0)
        policy_pass(**batch, fused_lm_head=True)
        policy_pass.output.loss.backward()
        assert float(policy_pass.output.metrics["conspo/score_drift"]) < 1e-6
    else:
        logprobs = head.token_logprobs(wrapped)(**batch, fused_lm_head=True).log_probs
        now = sequence_scores(logprobs, torch.zeros_like(mask[:, 1:]), response_mask=mask[:, 1:])
        (WEIGHTS[rows] * now).sum().backward()
    grads = {name.removeprefix("module."): p.grad for name, p in wrapped.named_parameters()}
    return {name: g.full_tensor() if hasattr(g, "full_tensor") else g for name, g in grads.items()}


def on_rank(rank: int, size: int) -> list[dict[str, Tensor]]:
    mine = slice(rank * 3, rank * 3 + 3)
    return [gradients(wrapper, mine, known) for wrapper in ("ddp", "fsdp2") for known in (True, False)]


@pytest.mark.parametrize("known", [True, False])
def test_one_process(known: bool) -> None:
    model, batch = parts.model(), rollouts()
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1] / 0.8
    labels = batch["labels"][:, 1:]
    logprobs = logits.log_softmax(-1).gather(2, labels.clamp(min=0)[..., None])[..., 0] * (labels != -100)
    scores = logprobs.sum(1) / (labels != -100).sum(1)
    wanted = parts.gradients_of(model, (WEIGHTS * scores).sum())
    assert parts.difference(gradients("none", slice(None), known), wanted) < 1e-6


def test_ranks_have_the_gradient_of_one_process() -> None:
    wanted = {name: x / 2 for name, x in gradients("none", slice(None), True).items()}
    for results in ranks.run(2, on_rank):
        assert len(results) == 4
        for result in results:
            assert parts.difference(result, wanted) < 1e-6
