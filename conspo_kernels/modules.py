"""`nn.Module` forms of the losses."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .loss import ConSPOOutput, conspo_loss


class ConSPOLoss(nn.Module):
    """`conspo_loss` with its settings kept: the call takes what changes from step to step.

    loss_fn = ConSPOLoss(tau=0.5, shift=True);  loss = loss_fn(logits, input_ids, rewards, groups, mask=mask, margin=m)

    Args:
        Settings: any keyword argument of `conspo_loss`; a call's own keyword arguments win over them.

    Raises:
        TypeError: a setting that `conspo_loss` does not know, at construction.

    Cost, Returns, Source: as `conspo_loss`. No parameters, no buffers.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        known = conspo_loss.__kwdefaults__ or {}
        unknown = sorted(settings.keys() - known.keys())
        if unknown:
            raise TypeError(f"ConSPOLoss got unknown settings {', '.join(unknown)}; known are {', '.join(known)}")
        self.settings = settings

    def forward(
        self, logits: Tensor, labels: Tensor, rewards: Tensor, groups: int | Tensor, **arguments: Any
    ) -> Tensor | ConSPOOutput:
        return conspo_loss(logits, labels, rewards, groups, **{**self.settings, **arguments})

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.settings.items())
