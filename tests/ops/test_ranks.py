"""Groups, vocabularies and sequences that are spread over ranks: the numbers of one process, on 2 and 4 gloo ranks."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import ranks
import torch
import torch.distributed as dist
from torch import Tensor

import conspo_kernels as ck
from conspo_kernels.ops import ranks as op_ranks
from conspo_kernels.values import Statistics

HIDDEN, VOCAB, LENGTH = 5, 23, 6
OPTIONS = {"tau": 0.5, "margin": 0.2}
CASES = list(
    itertools.product(("logits", "linear"), ("padded", "packed"), ("mean", "sum"), (torch.float64, torch.float32))
)
Output = tuple[Tensor, Tensor, Tensor]  # loss, gradient of hidden, gradient of weight


@functools.cache
def on_ranks(size: int) -> dict[str, list[Any]]:
    """What each function gives on each of `size` ranks; the processes are started once for all of them."""
    functions = [data_parallel, micro_batches, vocabulary, sequences]
    functions += {1: [], 2: [distributed_tensor, no_contrast, equal_groups, compiled], 4: [both, mixed]}[size]
    if size == 2:
        functions.append(killed)  # the last, as it leaves the group broken
    per_rank = ranks.run(size, several, [vocabulary] if size == 1 else functions)
    return {name: [results[name] for results in per_rank] for name in per_rank[0]}


def several(rank: int, size: int, functions: list[Callable[[int, int], Any]]) -> dict[str, Any]:
    return {function.__name__: function(rank, size) for function in functions}


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
    """What a public function of `kind` takes first, and the leaves: hidden, weight."""
    hidden, weight = part.pop("hidden").clone().requires_grad_(), weight.clone().requires_grad_()
    return (hidden, weight) if kind == "linear" else (hidden @ weight.T,), [hidden, weight]


def alone(kind: str, dtype: torch.dtype) -> Output:
    """The whole batch in one process, padded."""
    batch = Batch(dtype)
    part = batch.part(slice(None), "padded")
    first, leaves = differentiated(kind, part, batch.weight)
    function = ck.linear_conspo_loss if kind == "linear" else ck.conspo_loss
    loss = function(*first, part["labels"], batch.rewards, batch.ids, **OPTIONS)
    return loss.detach(), *torch.autograd.grad(loss, leaves)  # type: ignore[union-attr, return-value]


def places_of(rank: int, size: int) -> Tensor:
    """Rollouts scattered over ranks, the last of which has none if there are more than two."""
    order = torch.randperm(13, generator=torch.Generator().manual_seed(1))
    return order[rank :: max(2, size - 1)] if rank < max(2, size - 1) else order[:0]


def data_parallel(rank: int, size: int) -> dict[Any, Output]:
    results = {}
    for kind, layout, reduction, dtype in CASES:
        batch, places = Batch(dtype), places_of(rank, size)
        part = batch.part(places, layout)
        first, leaves = differentiated(kind, part, batch.weight)
        function = ck.linear_conspo_loss if kind == "linear" else ck.conspo_loss
        output = function(
            *first, part.pop("labels"), batch.rewards[places], batch.ids[places],
            parallel=ck.Parallel(data=dist.group.WORLD, grad_reduction=reduction),
            return_metrics=True, **part, **OPTIONS,
        )  # type: ignore[operator]  # fmt: skip
        grads = torch.autograd.grad(output.loss, leaves)
        dist.all_reduce(grads[1])  # what a trainer does
        results[kind, layout, reduction, dtype] = (
            output.loss.detach(), grads[1] / (size if reduction == "mean" else 1), *output.metrics.values()
        )  # fmt: skip
    return results


def micro_batches(rank: int, size: int) -> dict[Any, Output]:
    """Two phases: each rank's rollouts one by one, the weights in between."""
    results = {}
    for kind, layout, reduction, dtype in CASES:
        batch, places = Batch(dtype), places_of(rank, size)
        total = torch.zeros_like(batch.weight)
        scores = []
        for place in places.split(2):
            part = batch.part(place, layout)
            first, _leaves = differentiated(kind, part, batch.weight)
            scores.append((ck.linear_conspo_scores if kind == "linear" else ck.conspo_scores)(*first, **part))
        all_scores = torch.cat(scores) if scores else torch.empty(0, dtype=dtype)
        weights = ck.conspo_weights(
            all_scores, batch.rewards[places], batch.ids[places],
            parallel=ck.Parallel(data=dist.group.WORLD, grad_reduction=reduction),
            **OPTIONS,
        )  # fmt: skip
        for place, w in zip(places.split(2), weights.weights.split(2), strict=True):
            part = batch.part(place, layout)
            first, leaves = differentiated(kind, part, batch.weight)
            function = ck.linear_weighted_score_loss if kind == "linear" else ck.weighted_score_loss
            total += torch.autograd.grad(function(*first, part.pop("labels"), w, **part), leaves)[1]
        dist.all_reduce(total)
        results[kind, layout, reduction, dtype] = (weights.loss, total / (size if reduction == "mean" else 1))
    return results  # type: ignore[return-value]


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("function", ["data_parallel", "micro_batches"])
def test_groups_over_ranks(function: str, size: int) -> None:
    of_all_ranks = on_ranks(size)[function]
    for kind, layout, reduction, dtype in CASES:
        loss, _hidden, weight = alone(kind, dtype)
        tolerance = 1e-12 if dtype == torch.float64 else 1e-6
        for results in of_all_ranks:
            ours = results[kind, layout, reduction, dtype]
            assert (ours[0] - loss).abs() <= tolerance * loss.abs()
            assert (ours[1] - weight).abs().max() <= tolerance * weight.abs().max()
            assert all(
                a == b for a, b in zip(ours[2:], of_all_ranks[0][kind, layout, reduction, dtype][2:], strict=True)
            )
        assert len({f[kind, layout, reduction, dtype][0].item() for f in of_all_ranks}) == 1  # bitwise on every rank


def shards(size: int) -> list[tuple[int, int]]:
    """Uneven parts of the vocabulary."""
    cuts = {1: [0, VOCAB], 2: [0, 9, VOCAB], 4: [0, 3, 9, 10, VOCAB]}[size]
    return list(itertools.pairwise(cuts))


def vocabulary(rank: int, size: int) -> dict[str, Any]:
    batch = Batch(torch.float64)
    start, stop = shards(size)[rank]
    shard = ck.Parallel(vocab=dist.group.WORLD, vocab_start=start)
    hidden, weight = batch.hidden.clone().requires_grad_(), batch.weight[start:stop].clone().requires_grad_()
    results: dict[str, Any] = {}
    for name, options in {"plain": {}, "softcap": {"softcap": 2.0, "temperature": 0.7}}.items():
        logits = hidden @ weight.T
        logprobs, entropy = ck.token_logprobs(logits, batch.labels, return_entropy=True, parallel=shard, **options)
        (grad,) = torch.autograd.grad((logprobs + 0.3 * entropy).square().sum(), logits)
        results[f"tokens, {name}"] = (logprobs.detach(), entropy.detach(), grad)
        for mib in (512, 2.0**-12):
            logprobs, entropy = ck.linear_token_logprobs(
                hidden, weight, batch.labels, return_entropy=True, parallel=shard, workspace_mib=mib, **options
            )
            grads = torch.autograd.grad((logprobs + 0.3 * entropy).square().sum(), (hidden, weight))
            results[f"linear, {name}, {mib}"] = (logprobs.detach(), entropy.detach(), *grads)
    arguments = (batch.labels, batch.rewards, batch.ids)
    loss = ck.linear_conspo_loss(hidden, weight, *arguments, parallel=shard, **OPTIONS)
    results["loss"] = (loss.detach(), *torch.autograd.grad(loss, (hidden, weight)))
    logits = hidden @ weight.T
    loss = ck.conspo_loss(logits * 1, *arguments, parallel=shard, inplace_backward=True, **OPTIONS)
    results["in place"] = (loss.detach(), torch.autograd.grad(loss, weight)[0])
    scores = ck.conspo_scores((hidden @ weight.T).detach(), batch.labels, parallel=shard)
    weights = ck.conspo_weights(scores, batch.rewards, batch.ids, **OPTIONS).weights
    for name, loss in {
        "phase 2": ck.weighted_score_loss(hidden @ weight.T, batch.labels, weights, parallel=shard),
        "linear phase 2": ck.linear_weighted_score_loss(hidden, weight, batch.labels, weights, parallel=shard),
    }.items():
        results[name] = (loss.detach(), torch.autograd.grad(loss, weight)[0])
    frozen = ck.linear_conspo_loss(hidden, weight.detach(), *arguments, parallel=shard, **OPTIONS)
    results["frozen"] = (frozen.detach(), torch.autograd.grad(frozen, hidden)[0])
    try:
        ck.token_logprobs(logits.detach(), torch.full_like(batch.labels, VOCAB), parallel=shard)
    except ValueError as error:
        results["error"] = str(error)
    if size > 1:
        with pytest.raises(ValueError, match=f"must not overlap: {size} ranks have the label 0"):
            ck.token_logprobs(
                logits.detach(), torch.zeros_like(batch.labels), parallel=dataclasses.replace(shard, vocab_start=0)
            )
        gathered_logits(batch, rank, size)
    return results


def gathered_logits(batch: Batch, rank: int, size: int) -> None:
    """As if each rank had a part, and all have the whole vocabulary: off by log(size), which nobody would see."""
    split = ck.Parallel(vocab=dist.group.WORLD, vocab_start=rank * VOCAB)
    logits = batch.hidden @ batch.weight.T
    message = f"the {size} ranks of parallel.vocab must have their own parts of the vocabulary, got the same logits"
    with pytest.raises(ValueError, match=message):
        ck.token_logprobs(logits, batch.labels, parallel=split)
    with pytest.raises(ValueError, match=message):
        ck.linear_conspo_loss(
            batch.hidden, batch.weight, batch.labels, batch.rewards, batch.ids, parallel=split, softcap=3.0
        )
    # Elsewhere than on a CPU no value is read: the result is NaN.
    part = Statistics(torch.zeros(5), None, torch.arange(5.0), torch.ones(5))
    flags = torch.zeros(5, dtype=torch.bool)
    whole, _owners, alike = op_ranks._whole_statistics(part, flags | (rank == 0), flags, 100, 1.0, dist.group.WORLD)
    assert alike
    assert whole.logprobs.isnan().all()
    # A new head's logits are equal, on every rank: log(1 / V).
    new = ck.token_logprobs(torch.zeros_like(logits), batch.labels, parallel=split)
    expected = torch.where(batch.labels == -100, 0.0, -torch.tensor(size * VOCAB, dtype=new.dtype).log())
    torch.testing.assert_close(new, expected)


def close(actual: Tensor, exact: Tensor, tolerance: float = 1e-12) -> bool:
    assert actual.shape == exact.shape
    return bool((actual - exact).abs().max() <= tolerance * max(1.0, exact.abs().max().item()))


@pytest.mark.parametrize("size", [2, 4])
def test_a_vocabulary_over_ranks(size: int) -> None:
    of_all_ranks = on_ranks(size)["vocabulary"]
    whole = on_ranks(1)["vocabulary"][0]  # itself: a group of one rank
    loss, hidden, weight = alone("linear", torch.float64)
    for a, b in zip(whole["loss"], (loss, hidden, weight), strict=True):
        assert close(a, b)
    for (start, stop), results in zip(shards(size), of_all_ranks, strict=True):
        for name in whole:
            if name == "error":
                assert "labels must lie in the vocabulary of all ranks" in results[name]
                continue
            for actual, exact in zip(results[name], whole[name], strict=True):
                if exact.shape == (VOCAB, HIDDEN):
                    exact = exact[start:stop]
                elif exact.shape[-1:] == (VOCAB,):
                    exact = exact[..., start:stop]
                assert close(actual, exact), name


def sequences(rank: int, size: int) -> dict[str, Any]:
    """Tokens of each rollout cut where they may; packed, a rank may have none of a rollout."""
    results: dict[str, Any] = {}
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
        more["parallel"] = ck.Parallel(context=dist.group.WORLD, grad_reduction=reduction)
        function = ck.linear_conspo_loss if kind == "linear" else ck.conspo_loss
        loss = function(*first, labels, batch.rewards, batch.ids, **more, **OPTIONS)
        (grad,) = torch.autograd.grad(loss, leaves[1:], retain_graph=True)
        scores = (ck.linear_conspo_scores if kind == "linear" else ck.conspo_scores)(*first, labels, **more)
        weights = ck.conspo_weights(scores, batch.rewards, batch.ids, **OPTIONS).weights
        first, leaves = differentiated(kind, {"hidden": hidden}, batch.weight)
        phase_two = (ck.linear_weighted_score_loss if kind == "linear" else ck.weighted_score_loss)(
            *first, labels, weights, **more
        )
        (grad_two,) = torch.autograd.grad(phase_two, leaves[1:])
        for g in (grad, grad_two):
            dist.all_reduce(g)
            g /= size if reduction == "mean" else 1
        results[kind, layout, reduction, dtype] = (loss.detach(), grad, grad_two)
    return results


@pytest.mark.parametrize("size", [2, 4])
def test_sequences_over_ranks(size: int) -> None:
    of_all_ranks = on_ranks(size)["sequences"]
    for kind, layout, reduction, dtype in CASES:
        loss, _hidden, weight = alone(kind, dtype)
        tolerance = 1e-12 if dtype == torch.float64 else 1e-6
        for results in of_all_ranks:
            value, grad, grad_two = results[kind, layout, reduction, dtype]
            assert (value - loss).abs() <= tolerance * loss.abs()
            for g in (grad, grad_two):
                assert (g - weight).abs().max() <= tolerance * weight.abs().max(), (kind, layout, reduction, dtype)


def both(rank: int, size: int) -> tuple[Tensor, Tensor]:
    """Two replicas of two parts of the vocabulary: groups over one dimension, entries over the other."""
    replica, part = divmod(rank, 2)
    groups = [dist.new_group(pair) for pair in ([0, 1], [2, 3], [0, 2], [1, 3])]  # each made by all ranks
    tensor_group, data_group = groups[replica], groups[2 + part]
    batch, (start, stop) = Batch(torch.float64), shards(2)[part]
    places = torch.arange(replica, 13, 2)
    hidden, weight = batch.hidden[places], batch.weight[start:stop].clone().requires_grad_()
    loss = ck.linear_conspo_loss(
        hidden, weight, batch.labels[places], batch.rewards[places], batch.ids[places],
        parallel=ck.Parallel(data=data_group, vocab=tensor_group, vocab_start=start, grad_reduction="sum"), **OPTIONS,
    )  # type: ignore[arg-type]  # fmt: skip
    (grad,) = torch.autograd.grad(loss, weight)  # type: ignore[arg-type]
    dist.all_reduce(grad, group=data_group)
    return loss.detach(), grad  # type: ignore[union-attr]


def test_groups_and_vocabulary_over_ranks() -> None:
    loss, _hidden, weight = alone("linear", torch.float64)
    for rank, (value, grad) in enumerate(on_ranks(4)["both"]):
        start, stop = shards(2)[rank % 2]
        assert close(value, loss)
        assert close(grad, weight[start:stop])


def distributed_tensor(rank: int, size: int) -> tuple[Tensor, Tensor]:
    """Logits as a column-parallel head leaves them; 23 entries over two ranks: uneven."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh, batch = init_device_mesh("cpu", (size,)), Batch(torch.float64)
    weight = distribute_tensor(batch.weight, mesh, [Shard(0)]).requires_grad_()
    logits = distribute_tensor(batch.hidden, mesh, [Replicate()]) @ weight.T
    loss = ck.conspo_loss(logits, batch.labels, batch.rewards, batch.ids, **OPTIONS)  # type: ignore[arg-type]
    (grad,) = torch.autograd.grad(loss, weight)  # type: ignore[arg-type]
    leaf = distribute_tensor(batch.hidden @ batch.weight.T, mesh, [Shard(2)]).requires_grad_()
    plain = (batch.hidden @ batch.weight.T).requires_grad_()
    per_rollout = torch.linspace(-1, 1, 13, dtype=torch.float64)
    for function in (
        lambda z: ck.conspo_loss(z, batch.labels, batch.rewards, batch.ids, inplace_backward=True, **OPTIONS),  # type: ignore[arg-type]
        lambda z: ck.weighted_score_loss(z, batch.labels, per_rollout, inplace=True),
    ):
        ours, exact = (torch.autograd.grad(function(x * 1), x)[0] for x in (leaf, plain))  # type: ignore[arg-type]
        assert close(ours.full_tensor(), exact)  # type: ignore[attr-defined]
        with pytest.raises(ValueError, match="would overwrite logits, a leaf tensor of yours"):
            function(leaf)
    with pytest.raises(ValueError, match="leaves ranks without any"):
        ck.conspo_loss(
            distribute_tensor(torch.randn(2, 3, 1), mesh, [Shard(2)]), batch.labels[:2, :3], batch.rewards[:2], 2
        )
    with pytest.raises(ValueError, match="must be sharded along dimension 2"):
        ck.conspo_loss(distribute_tensor(batch.hidden, mesh, [Shard(0)]), batch.labels, batch.rewards, 1)
    with pytest.raises(ValueError, match="weight must be a whole tensor, got a DTensor"):
        ck.linear_conspo_loss(batch.hidden, weight, batch.labels, batch.rewards, batch.ids)
    return loss.detach(), grad.full_tensor()  # type: ignore[union-attr, attr-defined]


def test_logits_that_are_a_distributed_tensor() -> None:
    loss, _hidden, weight = alone("linear", torch.float64)
    for value, grad in on_ranks(2)["distributed_tensor"]:
        assert close(value, loss)
        assert close(grad, weight)


def no_contrast(rank: int, size: int) -> tuple[Tensor, Tensor, float]:
    """No valid group anywhere, and a rank without rollouts: an exact zero with a graph."""
    number = 0 if rank else 3
    logits = torch.randn(number, 4, 7, dtype=torch.float64, requires_grad=True)
    output = ck.conspo_loss(
        logits, torch.zeros(number, 4).long(), torch.ones(number), torch.arange(number), return_metrics=True,
        parallel=ck.Parallel(data=dist.group.WORLD),
    )  # fmt: skip
    output.loss.backward()  # type: ignore[union-attr]
    return output.loss.detach(), logits.grad, output.metrics["conspo/valid_group_fraction"].item()  # type: ignore[union-attr, return-value]


def test_no_valid_group_on_any_rank() -> None:
    for loss, grad, fraction in on_ranks(2)["no_contrast"]:
        assert loss == 0
        assert (grad == 0).all()
        assert fraction == 0


def equal_groups(rank: int, size: int) -> tuple[Tensor, Tensor]:
    """An int G counts over the ranks' rollouts in rank order: 3 and 5 rollouts, groups of 4."""
    batch, mine = Batch(torch.float64), slice(0, 3) if rank == 0 else slice(3, 8)
    scores = (batch.hidden[:, 0, 0] * 1).requires_grad_()
    rewards = torch.tensor([1.0, 0, 0, 1, 0, 1, 1, 0])
    loss = ck.conspo_loss_from_scores(scores[mine], rewards[mine], 4, parallel=ck.Parallel(data=dist.group.WORLD))
    whole = ck.conspo_loss_from_scores(scores[:8], rewards, 4)
    per_group = ck.conspo_loss_from_scores(
        scores[mine],
        rewards[mine],
        4,
        reduction="none",
        parallel=ck.Parallel(data=dist.group.WORLD, grad_reduction="sum"),
    )
    assert per_group.shape == (2,)  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="groups=3 rollouts per prompt must divide the number of rollouts, got 8"):
        ck.conspo_loss_from_scores(scores[mine], rewards[mine], 3, parallel=ck.Parallel(data=dist.group.WORLD))
    groups = 4 if rank == 0 else torch.zeros(5, dtype=torch.long)
    with pytest.raises(ValueError, match="an int on all, got both"):
        ck.conspo_loss_from_scores(scores[mine], rewards[mine], groups, parallel=ck.Parallel(data=dist.group.WORLD))
    (ours,), (all_of_them,) = (torch.autograd.grad(x, scores) for x in (loss, whole))  # type: ignore[arg-type]
    expected = torch.zeros_like(ours)
    expected[mine] = all_of_them[mine] * size
    return (loss - whole).detach(), ours - expected  # type: ignore[operator]


def test_equal_groups_over_ranks() -> None:
    for difference, grad_difference in on_ranks(2)["equal_groups"]:
        assert difference.abs() <= 1e-14
        assert grad_difference.abs().max() <= 1e-14


def mixed(rank: int, size: int) -> Tensor:
    """Rewards of another type on every rank: 0.1 is not above a threshold of 0.1 in any."""
    rewards = [torch.tensor([0.1, 0.9]), torch.tensor([1, 0]), torch.tensor([True, False])][rank % 3]
    rewards = rewards.half() if rank == 3 else rewards
    ids = torch.tensor([0, 0], dtype=[torch.int64, torch.int32, torch.uint8, torch.int16][rank]) + rank // 2
    scores = torch.tensor([-1.0, -2.0 - rank])
    return ck.conspo_loss_from_scores(
        scores, rewards, ids, reward_threshold=0.1, parallel=ck.Parallel(data=dist.group.WORLD)
    )  # type: ignore[return-value]


def test_types_that_differ_between_ranks() -> None:
    scores = torch.tensor([-1.0, -2, -1, -3, -1, -4, -1, -5])
    rewards, ids = torch.tensor([0.0, 1, 1, 0, 1, 0, 0, 1]), torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
    expected = ck.conspo_loss_from_scores(scores, rewards, ids)
    for loss in on_ranks(4)["mixed"]:
        assert torch.equal(loss, expected)  # type: ignore[arg-type]


def killed(rank: int, size: int) -> str:
    logits = torch.randn(2, 3, 7, requires_grad=True)
    labels, rewards = torch.zeros(2, 3).long(), torch.tensor([1.0, 0.0])
    ck.conspo_loss(logits, labels, rewards, 2, parallel=ck.Parallel(data=dist.group.WORLD))
    if rank == 1:
        dist.destroy_process_group()
        return "gone"
    try:
        ck.conspo_loss(logits, labels, rewards, 2, parallel=ck.Parallel(data=dist.group.WORLD))
    except RuntimeError as error:
        return type(error).__module__ + str(error)
    return "no error"


def test_a_rank_that_dies_is_torchs_own_error() -> None:
    survivor, gone = on_ranks(2)["killed"]
    assert gone == "gone"
    assert "gloo" in survivor.lower() or "connection" in survivor.lower(), survivor


def compiled(rank: int, size: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Every collective traced: groups, vocabulary and sequence; other numbers of rollouts each time."""
    import torch._dynamo

    batch, (start, stop), world = Batch(torch.float64), shards(size)[rank], dist.group.WORLD
    columns = slice(0, 4) if rank == 0 else slice(4, LENGTH)

    def over_groups(hidden: Tensor, weight: Tensor, labels: Tensor, rewards: Tensor, ids: Tensor) -> Tensor:
        return ck.linear_conspo_loss(hidden, weight, labels, rewards, ids, parallel=ck.Parallel(data=world), **OPTIONS)

    def over_vocabulary(hidden: Tensor, weight: Tensor, labels: Tensor, rewards: Tensor, ids: Tensor) -> Tensor:
        shard = ck.Parallel(vocab=world, vocab_start=start)
        return ck.conspo_loss(hidden @ weight[start:stop].T, labels, rewards, ids, parallel=shard, **OPTIONS)

    def over_tokens(hidden: Tensor, weight: Tensor, labels: Tensor, rewards: Tensor, ids: Tensor) -> Tensor:
        logits = hidden[:, columns] @ weight.T
        return ck.conspo_loss(logits, labels[:, columns], rewards, ids, parallel=ck.Parallel(context=world), **OPTIONS)

    results = []
    for function in (over_groups, over_vocabulary, over_tokens):
        torch._dynamo.reset()
        traced = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
        for number in (13, 11):
            places = torch.arange(number) if function is not over_groups else torch.arange(rank, number, size)
            weight = batch.weight.clone().requires_grad_()
            arguments = (batch.labels[places], batch.rewards[places], batch.ids[places])
            for f in (function, traced):
                loss = f(batch.hidden[places], weight, *arguments)
                results.append((loss.detach(), *torch.autograd.grad(loss, weight)))
    return results  # type: ignore[return-value]


def test_collectives_under_torch_compile() -> None:
    for results in on_ranks(2)["compiled"]:
        for eager, traced in zip(results[::2], results[1::2], strict=True):
            for a, b in zip(eager, traced, strict=True):
                assert close(a, b)
