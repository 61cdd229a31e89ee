"""Copies and pickles of modules that know what is split over ranks: a process group lives in its process."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import nn

from conspo_kernels import ConSPOLoss, LinearConSPOLoss, Parallel, conspo_loss

torch.manual_seed(0)
LOGITS, LABELS, REWARDS = torch.randn(4, 3, 11), torch.randint(11, (4, 3)), torch.tensor([1.0, 0, 0, 1])


@pytest.fixture
def group() -> Iterator[dist.ProcessGroup]:
    """Of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


class Policy(nn.Module):
    """A model that holds its loss, as a trainer copies it for an average of its weights or for a reference."""

    def __init__(self, parallel: Parallel) -> None:
        super().__init__()
        self.head = nn.Linear(2, 3)
        self.logits_loss, self.hidden_loss = ConSPOLoss(parallel=parallel), LinearConSPOLoss(parallel=parallel)


@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, lambda m: torch.optim.swa_utils.AveragedModel(m).module])
def test_a_copy_keeps_the_group(group: dist.ProcessGroup, copied) -> None:
    policy = copied(Policy(Parallel(data=group, context=group, grad_reduction="sum")))
    for loss in (policy.logits_loss, policy.hidden_loss):
        parallel = loss.settings["parallel"]
        assert (parallel.data, parallel.context, parallel.grad_reduction) == (group, group, "sum")
    expected = conspo_loss(LOGITS, LABELS, REWARDS, 2)
    torch.testing.assert_close(policy.logits_loss(LOGITS, LABELS, REWARDS, 2), expected)


@pytest.mark.parametrize("field", ["data", "context", "vocab"])
def test_a_pickle_says_to_pass_parallel_at_the_call(group: dist.ProcessGroup, field: str) -> None:
    policy = Policy(Parallel(**{field: group}))
    message = rf"Parallel\({field}=...\) cannot be pickled, .* pass `parallel` at the call"
    with pytest.raises(TypeError, match=message):
        pickle.dumps(policy)
    with pytest.raises(TypeError, match=message):
        torch.save(policy, io.BytesIO())
    assert list(policy.state_dict()) == ["head.weight", "head.bias"]


def test_what_has_no_group_is_pickled() -> None:
    parallel = Parallel(grad_reduction="sum")
    assert pickle.loads(pickle.dumps(parallel)) == parallel
    module = pickle.loads(pickle.dumps(ConSPOLoss(parallel=parallel, tau=0.5)))
    assert module.settings == {"parallel": parallel, "tau": 0.5}
