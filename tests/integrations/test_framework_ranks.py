"""What integrations do across ranks: two gloo processes, started once for all that is asked here."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from framework_batch import TOLERANCE, FrameworkBatch, relative
from ranks import run
from test_frameworks import slime_args, slime_data, slime_modules, slime_step
from test_verl import eager_head, head_inputs

from conspo_kernels.integrations import slime
from conspo_kernels.integrations.verl_head import linear_cross_entropy


def slime_gradient(rank: int, size: int) -> torch.Tensor:
    """Of this rank's rollouts, the others' being known by what crosses ranks only."""
    batch, rows = FrameworkBatch(), torch.arange(16)[rank::size]
    megatron, core = ModuleType("megatron"), ModuleType("megatron.core")
    core.mpu = SimpleNamespace(get_data_parallel_group=lambda with_context_parallel: dist.group.WORLD)
    sys.modules.update({"megatron": megatron, "megatron.core": core, **slime_modules(batch)})
    data = slime_data(batch, rows)
    slime.compute_advantages(slime_args(), data)
    slime_step(batch, rows, data, 2)
    return batch.accumulated()


def head_of_a_part(rank: int, size: int) -> tuple[torch.Tensor, ...]:
    hidden, weight, labels, (c, d) = head_inputs()
    part = weight.detach().chunk(size)[rank].requires_grad_()
    logp, entropy = linear_cross_entropy(hidden, part, labels, 0.7, "none", dist.group.WORLD)
    gradients = torch.autograd.grad((logp * c + entropy * d).sum(), (hidden, part))
    return logp.detach(), entropy.detach(), *gradients


def of_a_rank(rank: int, size: int) -> dict[str, Any]:
    return {"slime": slime_gradient(rank, size), "head": head_of_a_part(rank, size)}


@pytest.fixture(scope="module")
def results() -> list[dict[str, Any]]:
    return run(2, of_a_rank)


def test_slime_with_every_group_on_both_ranks(results):
    """slime adds gradients up over ranks."""
    assert relative(sum(result["slime"] for result in results), FrameworkBatch().gradient()) < TOLERANCE


def test_verls_head_over_tensor_parallel_ranks(results):
    """Gradients of hidden are parts that Megatron's sequence parallelism sums; those of the weight are of each part."""
    hidden, weight, labels, (c, d) = head_inputs()
    logp, entropy = eager_head(hidden, weight, labels, 0.7)
    of_hidden, of_weight = torch.autograd.grad((logp * c + entropy * d).sum(), (hidden, weight))
    parts = [result["head"] for result in results]
    near = {"rtol": 1e-10, "atol": 1e-12}
    for found_logp, found_entropy, _, _ in parts:
        torch.testing.assert_close(found_logp, logp.detach(), **near)
        torch.testing.assert_close(found_entropy, entropy.detach(), **near)
    torch.testing.assert_close(sum(part[2] for part in parts), of_hidden, **near)
    torch.testing.assert_close(torch.cat([part[3] for part in parts]), of_weight, **near)
