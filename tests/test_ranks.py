"""Groups, vocabularies and sequences that are spread over ranks: the numbers of one process, on 2 and 4 gloo ranks."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import ranks
import torch
import torch.distributed as dist
from torch import Tensor

from conspo_kernels import (
    VocabParallel,
    conspo_loss,
    conspo_scores,
    conspo_weights,
    linear_conspo_loss,
    linear_conspo_scores,
    linear_token_logprobs,
    linear_weighted_score_loss,
    token_logprobs,
    weighted_score_loss,
)

HIDDEN, VOCAB, LENGTH = 5, 23, 6
OPTIONS = {"tau": 0.5, "margin": 0.2}
CASES = list(
    itertools.product(("logits", "linear"), ("padded", "packed"), ("mean", "sum"), (torch.float64, torch.float32))
)
Output = tuple[Tensor, Tensor, Tensor]  # loss, gradient of hidden, gradient of weight


class Batch:
    """Ragged groups in any order, an unscorable rollout, an empty one, a group of one kind; the same on every rank."""

    def __init__(self, dtype: torch.dtype, num_rollouts: int = 13) -> None:
        generator = torch.Generator().manual_seed(3)
        self.hidden = torch.randn(num_rollouts, LENGTH, HIDDEN, generator=generator, dtype=torch.float64).to(dtype)
        self.weight = torch.randn(VOCAB, HIDDEN, generator=generator, dtype=torch.float64).to(dtype)
        lengths = torch.randint(1, LENGTH + 1, (num_rollouts,), generator=generator)
        lengths[4] = 0
        self.labels = torch.randint(VOCAB, (num_rollouts, LENGTH), generator=generator)
        self.labels[torch.arange(LENGTH) >= lengths[:, None]] = -100
        self.ids = torch.randint(0, 4, (num_rollouts,), generator=generator)
        self.rewards = torch.randint(0, 2, (num_rollouts,), generator=generator).float()
        self.rewards[2] = torch.nan
        self.rewards[self.ids == 3] = 1.0

    def part(self, rollouts: Tensor | slice, layout: str) -> dict[str, Any]:
        """hidden and labels of some rollouts, as a layout has them."""
        hidden, labels = self.hidden[rollouts], self.labels[rollouts]
        if layout == "padded":
            return {"hidden": hidden, "labels": labels}
        inside = torch.arange(LENGTH) < (labels != -100).sum(1)[:, None]
        offsets = torch.cat([torch.zeros(1, dtype=torch.long), inside.sum(1).cumsum(0)])
        return {"hidden": hidden[inside], "labels": labels[inside], "cu_seqlens": offsets}


def differentiated(kind: str, part: dict[str, Any], weight: Tensor) -> tuple[tuple[Tensor, ...], list[Tensor]]:
    """What a door of `kind` takes first, and the leaves: hidden, weight."""
    hidden, weight = part.pop("hidden").clone().requires_grad_(), weight.clone().requires_grad_()
    return (hidden, weight) if kind == "linear" else (hidden @ weight.T,), [hidden, weight]


def alone(kind: str, dtype: torch.dtype) -> Output:
    """The whole batch in one process, padded."""
    batch = Batch(dtype)
    part = batch.part(slice(None), "padded")
    first, leaves = differentiated(kind, part, batch.weight)
    door = linear_conspo_loss if kind == "linear" else conspo_loss
    loss = door(*first, part["labels"], batch.rewards, batch.ids, **OPTIONS)
    return loss.detach(), *torch.autograd.grad(loss, leaves)  # type: ignore[union-attr, return-value]


def places_of(rank: int, size: int) -> Tensor:
    """Rollouts scattered over ranks, the last of which has none if there are more than two."""
    order = torch.randperm(13, generator=torch.Generator().manual_seed(1))
    return order[rank :: max(2, size - 1)] if rank < max(2, size - 1) else order[:0]


def data_parallel(rank: int, size: int) -> dict[Any, Output]:
    found = {}
    for kind, layout, reduction, dtype in CASES:
        batch, places = Batch(dtype), places_of(rank, size)
        part = batch.part(places, layout)
        first, leaves = differentiated(kind, part, batch.weight)
        door = linear_conspo_loss if kind == "linear" else conspo_loss
        output = door(
            *first, part.pop("labels"), batch.rewards[places], batch.ids[places], process_group=dist.group.WORLD,
            grad_reduction=reduction, return_metrics=True, **part, **OPTIONS,
        )  # type: ignore[operator]  # fmt: skip
        grads = torch.autograd.grad(output.loss, leaves)
        dist.all_reduce(grads[1])  # what a trainer does
        found[kind, layout, reduction, dtype] = (
            output.loss.detach(), grads[1] / (size if reduction == "mean" else 1), output.metrics["conspo/score_gap"]
        )  # fmt: skip
    return found


def micro_batches(rank: int, size: int) -> dict[Any, Output]:
    """Two phases: each rank's rollouts one by one, the weights in between."""
    found = {}
    for kind, layout, reduction, dtype in CASES:
        batch, places = Batch(dtype), places_of(rank, size)
        total = torch.zeros_like(batch.weight)
        scores = []
        for place in places.split(2):
            part = batch.part(place, layout)
            first, _leaves = differentiated(kind, part, batch.weight)
            scores.append((linear_conspo_scores if kind == "linear" else conspo_scores)(*first, **part))
        everything = torch.cat(scores) if scores else torch.empty(0, dtype=dtype)
        weights = conspo_weights(
            everything, batch.rewards[places], batch.ids[places], process_group=dist.group.WORLD,
            grad_reduction=reduction, **OPTIONS,
        )  # fmt: skip
        for place, w in zip(places.split(2), weights.weights.split(2), strict=True):
            part = batch.part(place, layout)
            first, leaves = differentiated(kind, part, batch.weight)
            if len(place) == 0:
                continue
            door = linear_weighted_score_loss if kind == "linear" else weighted_score_loss
            total += torch.autograd.grad(door(*first, part.pop("labels"), w, **part), leaves)[1]
        dist.all_reduce(total)
        found[kind, layout, reduction, dtype] = (weights.loss, total / (size if reduction == "mean" else 1))
    return found  # type: ignore[return-value]


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("function", [data_parallel, micro_batches], ids=["one step", "two phases"])
def test_groups_over_ranks(function: Any, size: int) -> None:
    everyone = ranks.run(size, function)
    for kind, layout, reduction, dtype in CASES:
        loss, _hidden, weight = alone(kind, dtype)
        tolerance = 1e-12 if dtype == torch.float64 else 1e-6
        for found in everyone:
            ours = found[kind, layout, reduction, dtype]
            assert (ours[0] - loss).abs() <= tolerance * loss.abs()
            assert (ours[1] - weight).abs().max() <= tolerance * weight.abs().max()
        assert len({f[kind, layout, reduction, dtype][0].item() for f in everyone}) == 1  # bitwise on every rank


def shards(size: int) -> list[tuple[int, int]]:
    """Uneven parts of the vocabulary."""
    cuts = {1: [0, VOCAB], 2: [0, 9, VOCAB], 4: [0, 3, 9, 10, VOCAB]}[size]
    return list(itertools.pairwise(cuts))


def vocabulary(rank: int, size: int) -> dict[str, Any]:
    batch = Batch(torch.float64)
    start, stop = shards(size)[rank]
    shard = VocabParallel(dist.group.WORLD, start)
    hidden, weight = batch.hidden.clone().requires_grad_(), batch.weight[start:stop].clone().requires_grad_()
    found: dict[str, Any] = {}
    for name, options in {"plain": {}, "softcap": {"softcap": 2.0, "temperature": 0.7}}.items():
        logits = hidden @ weight.T
        logprobs, entropy = token_logprobs(logits, batch.labels, return_entropy=True, vocab_parallel=shard, **options)
        (grad,) = torch.autograd.grad((logprobs + 0.3 * entropy).square().sum(), logits)
        found[f"tokens, {name}"] = (logprobs.detach(), entropy.detach(), grad)
        for mib in (512, 2.0**-12):
            logprobs, entropy = linear_token_logprobs(
                hidden, weight, batch.labels, return_entropy=True, vocab_parallel=shard, workspace_mib=mib, **options
            )
            grads = torch.autograd.grad((logprobs + 0.3 * entropy).square().sum(), (hidden, weight))
            found[f"linear, {name}, {mib}"] = (logprobs.detach(), entropy.detach(), *grads)
    arguments = (batch.labels, batch.rewards, batch.ids)
    loss = linear_conspo_loss(hidden, weight, *arguments, vocab_parallel=shard, **OPTIONS)
    found["loss"] = (loss.detach(), *torch.autograd.grad(loss, (hidden, weight)))
    logits = hidden @ weight.T
    loss = conspo_loss(logits * 1, *arguments, vocab_parallel=shard, inplace_backward=True, **OPTIONS)
    found["in place"] = (loss.detach(), torch.autograd.grad(loss, weight)[0])
    scores = conspo_scores((hidden @ weight.T).detach(), batch.labels, vocab_parallel=shard)
    weights = conspo_weights(scores, batch.rewards, batch.ids, **OPTIONS).weights
    for name, loss in {
        "phase 2": weighted_score_loss(hidden @ weight.T, batch.labels, weights, vocab_parallel=shard),
        "linear phase 2": linear_weighted_score_loss(hidden, weight, batch.labels, weights, vocab_parallel=shard),
    }.items():
        found[name] = (loss.detach(), torch.autograd.grad(loss, weight)[0])
    frozen = linear_conspo_loss(hidden, weight.detach(), *arguments, vocab_parallel=shard, **OPTIONS)
    found["frozen"] = (frozen.detach(), torch.autograd.grad(frozen, hidden)[0])
    try:
        token_logprobs(logits.detach(), torch.full_like(batch.labels, VOCAB), vocab_parallel=shard)
    except ValueError as error:
        found["error"] = str(error)
    return found


def close(actual: Tensor, exact: Tensor, tolerance: float = 1e-12) -> bool:
    return bool((actual - exact).abs().max() <= tolerance * max(1.0, exact.abs().max().item()))


@pytest.mark.parametrize("size", [2, 4])
def test_a_vocabulary_over_ranks(size: int) -> None:
    everyone = ranks.run(size, vocabulary)
    whole = ranks.run(1, vocabulary)[0]  # itself: a group of one rank
    loss, hidden, weight = alone("linear", torch.float64)
    for a, b in zip(whole["loss"], (loss, hidden, weight), strict=True):
        assert close(a, b)
    for (start, stop), found in zip(shards(size), everyone, strict=True):
        for name in whole:
            if name == "error":
                assert "labels must lie in the vocabulary of all ranks" in found[name]
                continue
            for actual, exact in zip(found[name], whole[name], strict=True):
                if exact.shape == (VOCAB, HIDDEN):
                    exact = exact[start:stop]
                elif exact.shape[-1:] == (VOCAB,):
                    exact = exact[..., start:stop]
                assert close(actual, exact), name


def sequences(rank: int, size: int) -> dict[str, Any]:
    """Tokens of each rollout cut where they may; packed, a rank may have none of a rollout."""
    found: dict[str, Any] = {}
    cuts = {1: [0, LENGTH], 2: [0, 4, LENGTH], 4: [0, 1, 3, 4, LENGTH]}[size]
    columns = slice(cuts[rank], cuts[rank + 1])
    for kind, layout, reduction, dtype in CASES:
        batch = Batch(dtype)
        batch.hidden, batch.labels = batch.hidden[:, columns], batch.labels[:, columns]
        hidden, labels = batch.hidden, batch.labels
        more: dict[str, Any] = {}
        if layout == "packed":
            inside = labels != -100
            more["cu_seqlens"] = torch.cat([torch.zeros(1, dtype=torch.long), inside.sum(1).cumsum(0)])
            hidden, labels = hidden[inside], labels[inside]
        first, leaves = differentiated(kind, {"hidden": hidden}, batch.weight)
        more |= {"context_group": dist.group.WORLD, "grad_reduction": reduction}
        door = linear_conspo_loss if kind == "linear" else conspo_loss
        loss = door(*first, labels, batch.rewards, batch.ids, **more, **OPTIONS)
        (grad,) = torch.autograd.grad(loss, leaves[1:], retain_graph=True)
        reduction_of_scores = more.pop("grad_reduction")
        scores = (linear_conspo_scores if kind == "linear" else conspo_scores)(*first, labels, **more)
        weights = conspo_weights(scores, batch.rewards, batch.ids, **OPTIONS).weights
        first, leaves = differentiated(kind, {"hidden": hidden}, batch.weight)
        phase_two = (linear_weighted_score_loss if kind == "linear" else weighted_score_loss)(
            *first, labels, weights, grad_reduction=reduction_of_scores, **more
        )
        (grad_two,) = torch.autograd.grad(phase_two, leaves[1:])
        for g in (grad, grad_two):
            dist.all_reduce(g)
            g /= size if reduction == "mean" else 1
        found[kind, layout, reduction, dtype] = (loss.detach(), grad, grad_two)
    return found


@pytest.mark.parametrize("size", [2, 4])
def test_sequences_over_ranks(size: int) -> None:
    everyone = ranks.run(size, sequences)
    for kind, layout, reduction, dtype in CASES:
        loss, _hidden, weight = alone(kind, dtype)
        tolerance = 1e-12 if dtype == torch.float64 else 2e-6
        for found in everyone:
            value, grad, grad_two = found[kind, layout, reduction, dtype]
            assert (value - loss).abs() <= tolerance * loss.abs()
            for g in (grad, grad_two):
                assert (g - weight).abs().max() <= tolerance * weight.abs().max(), (kind, layout, reduction, dtype)
