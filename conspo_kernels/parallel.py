"""What is split over ranks, as one value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch.distributed import ProcessGroup

from .values import python_number

GRAD_REDUCTIONS = ("mean", "sum")


@dataclass(frozen=True)
class Parallel:
    """What is split over ranks. Each function reads the fields that concern it; None is one rank.

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
        object.__setattr__(self, "vocab_start", start)
        for name in ("data", "context", "vocab"):
            group = getattr(self, name)
            if group is not None and not isinstance(group, ProcessGroup):
                raise TypeError(f"parallel.{name} must be a torch.distributed.ProcessGroup, got {type(group).__name__}")
        if isinstance(start, bool) or not isinstance(start, int):
            raise TypeError(f"parallel.vocab_start must be an int, got {type(start).__name__}")
        if start < 0:
            raise ValueError(f"parallel.vocab_start must not be negative, got {start}")
        if start > 0 and self.vocab is None:
            raise ValueError(f"parallel.vocab_start must be 0 where parallel.vocab is None, got {start}")
        reduction: Any = self.grad_reduction
        if not isinstance(reduction, str) or reduction not in GRAD_REDUCTIONS:
            raise ValueError(f"parallel.grad_reduction must be one of 'mean', 'sum', got {reduction!r}")

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
