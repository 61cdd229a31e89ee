"""Logits, or hidden states and a head, as the user passed them: checked, and made a source of log-probabilities."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..ops.label_alignment import NOT_CHECKED, ON_ALL_RANKS
from ..ops.ranks import name_of
from ..ops.workspace import default_workspace
from ..parallel import Parallel
from ..sources import HiddenSource, LogitsSource, UserValues
from ..values import accumulated, factor
from . import check
from .autocast import autocast_dtype, cast

ONE_RANK = Parallel()


def parallel_from(value: Any) -> Parallel:
    """The argument `parallel` of a public function."""
    if value is None:
        return ONE_RANK
    if not isinstance(value, Parallel):
        raise TypeError(f"parallel must be a conspo_kernels.Parallel or None, got {type(value).__name__}")
    return value


def logits_source(
    logits: Tensor,
    temperature: float,
    logit_scale: float,
    softcap: float | None,
    parallel: Parallel | None,
    implementation: str,
    inplace: bool = False,
    inplace_name: str = "inplace",
) -> LogitsSource:
    """inplace_name: the argument's name in the public function, for its errors."""
    check.implementation(implementation)
    transform, ranks = check.logit_transform(temperature, logit_scale, softcap), parallel_from(parallel)
    check.logits(logits)
    if inplace is not False:
        check.overwritten(inplace_name, inplace, logits)
    group, start, local = "", ranks.vocab_start, logits
    if ranks.vocab is not None:
        group = name_of(ranks.vocab)
    if hasattr(logits, "placements"):
        local, group, start = _local_part(logits, group)
    local = local.resolve_neg()
    return LogitsSource(
        name="logits",
        shape=tuple(logits.shape[:-1]),
        device=local.device,
        dtype=accumulated(local.dtype),
        vocab_size=ON_ALL_RANKS if group else local.shape[-1],
        parallel=ranks,
        implementation=implementation,
        user_logits=logits,
        logits=local if local.dim() == 3 else local[None],
        transform=transform,
        vocab_start=start,
        vocab_group=group,
        inplace=inplace,
    )


def hidden_source(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    temperature: float,
    logit_scale: float,
    softcap: float | None,
    parallel: Parallel | None,
    implementation: str,
    *,
    workspace_mib: float | None,
    logits_dtype: torch.dtype | None = None,
    weight_grad: Tensor | None = None,
    batch_invariant: bool = False,
    synchronize: bool = False,
) -> HiddenSource:
    check.implementation(implementation)
    transform, ranks = check.logit_transform(temperature, logit_scale, softcap), parallel_from(parallel)
    check.linear(hidden, weight, bias)
    check.flags(batch_invariant=batch_invariant, synchronize=synchronize)
    if workspace_mib is None:
        workspace = default_workspace(hidden.device)
    else:
        workspace = int(factor("workspace_mib", workspace_mib) * 2**20)
    if weight_grad is not None:
        check.weight_grad(weight_grad, weight)
        weight = weight.view_as(weight)  # whose node says in backward whether the gradient was asked for
    shape = tuple(hidden.shape[:-1])
    if autocast_dtype(hidden.device) is not None:
        hidden, weight, bias = cast(hidden), cast(weight), None if bias is None else cast(bias)
    check.logits_dtype(logits_dtype, hidden)
    return HiddenSource(
        name="hidden",
        shape=shape,
        device=hidden.device,
        dtype=accumulated(hidden.dtype),
        vocab_size=weight.shape[0] if ranks.vocab is None else ON_ALL_RANKS,
        parallel=ranks,
        implementation=implementation,
        hidden=hidden.reshape(-1, hidden.shape[-1]).resolve_neg(),
        weight=weight.resolve_neg(),
        bias=None if bias is None else bias.resolve_neg(),
        transform=transform,
        workspace=workspace,
        logits_dtype=logits_dtype or hidden.dtype,
        weight_grad=weight_grad,
        batch_invariant=batch_invariant,
        synchronize=synchronize,
    )


def logprobs_source(logprobs: Tensor, parallel: Parallel | None, implementation: str) -> UserValues:
    check.implementation(implementation)
    check.logprobs(logprobs)
    return _user_values("logprobs", logprobs, parallel, implementation)


def scores_source(scores: Tensor, parallel: Parallel | None, implementation: str) -> UserValues:
    check.implementation(implementation)
    check.scores(scores)
    return _user_values("scores", scores, parallel, implementation)


def _user_values(name: str, values: Tensor, parallel: Parallel | None, implementation: str) -> UserValues:
    values = values.to(accumulated(values.dtype)).resolve_neg()
    return UserValues(
        name=name,
        shape=tuple(values.shape),
        device=values.device,
        dtype=values.dtype,
        vocab_size=NOT_CHECKED,
        parallel=parallel_from(parallel),
        implementation=implementation,
        values=values,
    )


def _local_part(x: Tensor, vocab_group: str) -> tuple[Tensor, str, int]:
    """Of logits that are a DTensor, sharded along the vocabulary; with the name of its ranks, and where it begins."""
    # Lazy: importing torch.distributed.tensor takes as long as importing torch.
    from torch.distributed.tensor import DTensor, Shard
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    assert isinstance(x, DTensor)
    if vocab_group:
        raise ValueError(
            "parallel.vocab must be None for logits that are a DTensor, which says where its part of the vocabulary "
            "begins, got a ProcessGroup"
        )
    dim = x.dim() - 1
    sharded = [i for i, p in enumerate(x.placements) if isinstance(p, Shard) and p.dim % x.dim() == dim]
    others = [p for i, p in enumerate(x.placements) if i not in sharded and not p.is_replicate()]
    if len(sharded) != 1 or others:
        raise ValueError(
            f"a DTensor must be sharded along dimension {dim} over one mesh dimension and replicated "
            f"over the others, got placements {x.placements}"
        )
    size, total = x.device_mesh.size(sharded[0]), x.shape[dim]
    if -(-total // size) * (size - 1) >= total:  # the same on every rank, or the others would wait for the last
        raise ValueError(f"a vocabulary of {total} entries leaves ranks without any when it is sharded over {size}")
    _shape, offset = compute_local_shape_and_global_offset(x.shape, x.device_mesh, x.placements)
    return x.to_local(), name_of(x.device_mesh.get_group(sharded[0])), offset[dim]
