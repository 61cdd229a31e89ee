"""`nn.Module` forms of the losses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from .loss import ConSPOOutput, conspo_loss, linear_conspo_loss


class _Settings(nn.Module):
    """A loss with its keyword arguments kept; a call's own win over them. Values are checked at the call."""

    loss: Callable[..., Tensor | ConSPOOutput]

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        known = type(self).loss.__kwdefaults__ or {}
        unknown = sorted(settings.keys() - known.keys())
        if unknown:
            raise TypeError(
                f"{type(self).__name__} got unknown settings {', '.join(unknown)}; known are {', '.join(known)}"
            )
        self.settings = settings

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.settings.items())


class ConSPOLoss(_Settings):
    """`conspo_loss` with its settings kept: the call takes what changes from step to step.

    loss_fn = ConSPOLoss(tau=0.5, shift=True);  loss = loss_fn(logits, input_ids, rewards, groups, mask=mask, margin=m)

    Args:
        Settings: any keyword argument of `conspo_loss`; a call's own keyword arguments win over them.

    Raises:
        TypeError: a setting that `conspo_loss` does not know, at construction.

    Cost, Returns, Source: as `conspo_loss`. No parameters, no buffers.
    """

    loss = staticmethod(conspo_loss)

    def forward(
        self, logits: Tensor, labels: Tensor, rewards: Tensor, groups: int | Tensor, **arguments: Any
    ) -> Tensor | ConSPOOutput:
        return conspo_loss(logits, labels, rewards, groups, **{**self.settings, **arguments})


class LinearConSPOLoss(_Settings):
    """`linear_conspo_loss` with its settings kept, as `ConSPOLoss`.

    loss_fn = LinearConSPOLoss(shift=True);  loss = loss_fn(hidden, head.weight, input_ids, rewards, groups, mask=mask)
    """

    loss = staticmethod(linear_conspo_loss)

    def forward(
        self, hidden: Tensor, weight: Tensor, labels: Tensor, rewards: Tensor, groups: int | Tensor, **arguments: Any
    ) -> Tensor | ConSPOOutput:
        return linear_conspo_loss(hidden, weight, labels, rewards, groups, **{**self.settings, **arguments})
