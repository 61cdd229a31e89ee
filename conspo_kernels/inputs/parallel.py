"""What is split over ranks, as one value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor
from torch.distributed import ProcessGroup

from ..values import python_number
from . import check


@dataclass(frozen=True)
class Parallel:
    """What is split over ranks. A function takes of it what concerns it; None is one rank.

    Args:
        data: the ranks over which the rollouts of groups are spread. Scores, rewards and ids are gathered, S numbers
            each; the loss and the metrics are of all of them, the same on every rank. Ids are global; an int for
            `groups` counts over the rollouts of all ranks in rank order. A rank may have any number of rollouts, or
            none. The host waits for these numbers.
        context: the ranks over which the tokens of each rollout are spread (context or sequence parallelism): all have
            the same S rollouts, each its own tokens of them, or none.
        vocab: the ranks over which the vocabulary is spread (tensor parallelism). Labels are of the whole vocabulary,
            and the same on all of these ranks, as the results are. Parts may differ in size. Logits that are a DTensor,
            sharded along the vocabulary, say so themselves; logits that were gathered are not spread.
        vocab_start: the entry of the vocabulary at which this rank's part begins.
        grad_reduction: what the trainer does with gradients across `data` and `context`: "mean" (DDP, FSDP: this rank's
            gradients are multiplied by the number of ranks) or "sum".

    A copy has the same groups. A group lives in its process, so a value with one cannot be pickled.

    Raises:
        TypeError, ValueError: a field is of the wrong kind.
    """

    data: ProcessGroup | None = None
    context: ProcessGroup | None = None
    vocab: ProcessGroup | None = None
    vocab_start: int = 0
    grad_reduction: str = "mean"

    def __post_init__(self) -> None:
        start = python_number(self.vocab_start)
        if start is not self.vocab_start:
            object.__setattr__(self, "vocab_start", start)
        check.parallel(self.data, self.context, self.vocab, self.vocab_start, self.grad_reduction)

    def __copy__(self) -> Parallel:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Parallel:
        return self  # an average of a model, or its reference, is split as the model is

    def __reduce__(self) -> tuple[Any, ...]:
        groups = [name for name in ("data", "context", "vocab") if getattr(self, name) is not None]
        if groups:
            raise TypeError(
                f"Parallel({', '.join(f'{name}=...' for name in groups)}) cannot be pickled, as a process group lives "
                "in its process: make the module without it and pass `parallel` at the call, or save its state_dict()"
            )
        return type(self), (None, None, None, self.vocab_start, self.grad_reduction)

    @property
    def data_factor(self) -> float:
        """What a rank's gradient is multiplied by, so that the trainer's mean over `data` is the sum of theirs."""
        return self._factor(self.data)

    @property
    def context_factor(self) -> float:
        """The same of `context`."""
        return self._factor(self.context)

    def _factor(self, group: ProcessGroup | None) -> float:
        return float(group.size()) if group is not None and self.grad_reduction == "mean" else 1.0


ONE_RANK = Parallel()


def parallel_from(value: Any) -> Parallel:
    """The argument `parallel` of a public function."""
    if value is None:
        return ONE_RANK
    if not isinstance(value, Parallel):
        raise TypeError(f"parallel must be a conspo_kernels.Parallel or None, got {type(value).__name__}")
    return value


class VocabShard(NamedTuple):
    """The ranks that share a vocabulary, and where this rank's part of it begins. Parts may differ in size."""

    group: ProcessGroup
    start: int


def shard_of(x: Tensor, dim: int) -> tuple[Tensor, VocabShard]:
    """The local part of a DTensor that is sharded along `dim` and replicated otherwise, and where it lies."""
    # Imported by who has one: it takes as long as the rest of torch.
    from torch.distributed.tensor import DTensor, Shard
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    assert isinstance(x, DTensor)
    sharded = [i for i, p in enumerate(x.placements) if isinstance(p, Shard) and p.dim % x.dim() == dim % x.dim()]
    others = [p for i, p in enumerate(x.placements) if i not in sharded and not p.is_replicate()]
    if len(sharded) != 1 or others:
        raise ValueError(
            f"a DTensor must be sharded along dimension {dim % x.dim()} over one mesh dimension and replicated "
            f"over the others, got placements {x.placements}"
        )
    size, total = x.device_mesh.size(sharded[0]), x.shape[dim]
    if -(-total // size) * (size - 1) >= total:  # the same on every rank, or the others would wait for the last
        raise ValueError(f"a vocabulary of {total} entries leaves ranks without any when it is sharded over {size}")
    _shape, offset = compute_local_shape_and_global_offset(x.shape, x.device_mesh, x.placements)
    return x.to_local(), VocabShard(x.device_mesh.get_group(sharded[0]), offset[dim])
