"""The shortest honest training loop: rollouts, a verifier, ConSPO with groups split over micro-batches and ranks.

    python examples/custom_loop.py
    torchrun --nproc-per-node 2 examples/custom_loop.py                       # DDP
    torchrun --nproc-per-node 2 examples/custom_loop.py --parallel fsdp2      # parameters sharded

The task is to write a word of two letters backward; a policy of a few thousand parameters learns it from its own
samples in seconds. What matters is `accumulate`: with it, any number of ranks and any size of micro-batch give the
gradient of the whole step. The loss is called inside of the model's forward, where DDP and FSDP look, and where a
sharded lm_head is whole.
"""

from __future__ import annotations

import argparse
import gc
import os

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

from conspo_kernels import CosineMargin, Parallel, conspo_weights, linear_conspo_scores, linear_weighted_score_loss

LETTERS, LENGTH = 6, 2


class Policy(nn.Module):
    """Its forward returns logits of the next letter, the scores of rollouts, or the loss of a micro-batch."""

    def __init__(self, hidden_size: int = 64) -> None:
        super().__init__()
        self.embedding = nn.Embedding(LETTERS, hidden_size)
        self.body = nn.GRU(hidden_size, hidden_size, batch_first=True)
        self.head = nn.Linear(hidden_size, LETTERS, bias=False)

    def forward(self, ids: Tensor, mask: Tensor | None = None, weights: Tensor | None = None) -> Tensor:
        hidden = self.body(self.embedding(ids))[0]
        if mask is None:
            return self.head(hidden[:, -1])
        if weights is None:
            return linear_conspo_scores(hidden, self.head.weight, ids, response_mask=mask, shift=True)
        return linear_weighted_score_loss(hidden, self.head.weight, ids, weights, response_mask=mask, shift=True)


@torch.no_grad()
def sample(model: nn.Module, prompts: Tensor) -> Tensor:
    """[rollouts, 2 * LENGTH]: prompts with sampled responses."""
    ids = prompts
    for _ in range(LENGTH):
        ids = torch.cat([ids, torch.multinomial(model(ids).softmax(-1), 1)], dim=1)
    return ids


def synchronised(model: nn.Module, last: bool) -> None:
    """Reduce gradients over the ranks in the backward of the last micro-batch only."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)
    elif isinstance(model, DistributedDataParallel):
        model.require_backward_grad_sync = last


def accumulate(
    model: nn.Module, ids: Tensor, mask: Tensor, rewards: Tensor, prompt_ids: Tensor, size: int, margin: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """The gradient of the loss of all ranks' rollouts, in micro-batches of `size`; its value and metrics.

    The ranks may have different numbers of rollouts, but as many micro-batches: with FSDP every forward is collective.
    """
    parts = list(zip(ids.split(size), mask.split(size), strict=True))
    with torch.no_grad():
        scores = torch.cat([model(*part) for part in parts])
    parallel = Parallel(data=dist.group.WORLD) if dist.is_initialized() else None
    result = conspo_weights(scores, rewards, prompt_ids, margin=margin, parallel=parallel, return_metrics=True)
    for i, (part, weights) in enumerate(zip(parts, result.weights.split(size), strict=True)):
        synchronised(model, last=i == len(parts) - 1)
        model(*part, weights).backward()
    return result.loss, result.metrics


def wrapped(model: nn.Module, parallel: str) -> nn.Module:
    if not dist.is_initialized():
        return model
    if parallel == "fsdp2":
        fully_shard(model)  # in place
        return model
    return DistributedDataParallel(model)


def train(args: argparse.Namespace, rank: int, ranks: int) -> None:
    torch.manual_seed(0)  # the same parameters and prompts on every rank
    model = wrapped(Policy(), args.parallel)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    margin = CosineMargin(args.steps)
    prompt_rng = torch.Generator().manual_seed(1)
    torch.manual_seed(rank)  # other samples
    for step in range(args.steps):
        prompts = torch.randint(LETTERS, (8, LENGTH), generator=prompt_rng)
        prompt_ids = torch.arange(8).repeat_interleave(args.group_size // ranks)  # each group is spread over the ranks
        ids = sample(model, prompts[prompt_ids])
        mask = torch.arange(2 * LENGTH).expand(ids.shape) >= LENGTH
        rewards = (ids[:, LENGTH:] == ids[:, :LENGTH].flip(1)).all(1).float()
        order = torch.randperm(len(ids))  # groups come apart
        loss, metrics = accumulate(
            model, ids[order], mask[order], rewards[order], prompt_ids[order], args.micro_batch, margin(step)
        )
        optimizer.step()
        optimizer.zero_grad()
        if rank == 0 and (step % 25 == 0 or step == args.steps - 1):
            gap = metrics["conspo/score_gap"].item()
            print(f"step {step:3}  solved {rewards.mean().item():.2f}  loss {loss.item():.3f}  score gap {gap:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--parallel", choices=("ddp", "fsdp2"), default="ddp", help="under torchrun")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--group-size", type=int, default=16, help="rollouts per prompt, over all ranks")
    parser.add_argument("--micro-batch", type=int, default=40, help="rollouts; no multiple of a group is needed")
    args = parser.parse_args()
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if args.group_size % ranks:
        parser.error(f"--group-size must be a multiple of the {ranks} ranks, got {args.group_size}")
    if "RANK" not in os.environ:
        train(args, 0, 1)
        return
    dist.init_process_group("gloo")
    train(args, dist.get_rank(), ranks)
    gc.collect()  # the model goes before the group that it uses: FSDP2's is in a cycle of references
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
