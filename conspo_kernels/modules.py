"""`nn.Module` forms of the losses: settings at construction, what changes from step to step at the call."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor, nn

from .contrast import ConSPOOutput
from .inputs.parallel import Parallel
from .loss import conspo_loss, linear_conspo_loss


class _Loss(nn.Module):
    """The settings that both losses have."""

    def __init__(
        self,
        tau: float,
        reward_threshold: float,
        temperature: float,
        logit_scale: float,
        softcap: float | None,
        shift: bool,
        ignore_index: int,
        reduction: str,
        parallel: Parallel | None,
        implementation: str,
    ) -> None:
        super().__init__()
        self.tau, self.reward_threshold = tau, reward_threshold
        self.temperature, self.logit_scale, self.softcap = temperature, logit_scale, softcap
        self.shift, self.ignore_index, self.reduction = shift, ignore_index, reduction
        self.parallel, self.implementation = parallel, implementation

    def extra_repr(self) -> str:
        settings = {name: value for name, value in vars(self).items() if not name.startswith("_") and name != "training"}
        return ", ".join(f"{name}={value!r}" for name, value in settings.items())


class ConSPOLoss(_Loss):
    """`conspo_loss` with its settings kept: the call takes what changes from step to step.

    loss_fn = ConSPOLoss(tau=0.5, shift=True)
    loss = loss_fn(logits, input_ids, rewards, groups, response_mask=response_mask, margin=margin(step))

    Args:
        All: as `conspo_loss`, which checks them at the call.

    Cost, Returns, Raises, Source: as `conspo_loss`. No parameters, no buffers.
    """

    def __init__(
        self,
        *,
        tau: float = 1.0,
        reward_threshold: float = 0.5,
        temperature: float = 1.0,
        logit_scale: float = 1.0,
        softcap: float | None = None,
        shift: bool = False,
        ignore_index: int = -100,
        reduction: str = "mean",
        parallel: Parallel | None = None,
        inplace_backward: bool = False,
        implementation: str = "auto",
    ) -> None:
        super().__init__(
            tau, reward_threshold, temperature, logit_scale, softcap, shift, ignore_index, reduction, parallel,
            implementation,
        )  # fmt: skip
        self.inplace_backward = inplace_backward

    @overload
    def forward(
        self, logits: Tensor, labels: Tensor, rewards: Tensor, groups: int | Tensor, *,
        cu_seqlens: Tensor | None = None, response_mask: Tensor | None = None, margin: float | Tensor = 0.0,
        num_groups: float | Tensor | None = None, return_metrics: Literal[False] = False,
    ) -> Tensor: ...  # fmt: skip
    @overload
    def forward(
        self, logits: Tensor, labels: Tensor, rewards: Tensor, groups: int | Tensor, *,
        cu_seqlens: Tensor | None = None, response_mask: Tensor | None = None, margin: float | Tensor = 0.0,
        num_groups: float | Tensor | None = None, return_metrics: Literal[True],
    ) -> ConSPOOutput: ...  # fmt: skip
    def forward(
        self,
        logits: Tensor,
        labels: Tensor,
        rewards: Tensor,
        groups: int | Tensor,
        *,
        cu_seqlens: Tensor | None = None,
        response_mask: Tensor | None = None,
        margin: float | Tensor = 0.0,
        num_groups: float | Tensor | None = None,
        return_metrics: bool = False,
    ) -> Tensor | ConSPOOutput:
        """The loss of a step; see `conspo_loss`."""
        return conspo_loss(
            logits, labels, rewards, groups, cu_seqlens=cu_seqlens, response_mask=response_mask, shift=self.shift,
            tau=self.tau, margin=margin, reward_threshold=self.reward_threshold, temperature=self.temperature,
            logit_scale=self.logit_scale, softcap=self.softcap, ignore_index=self.ignore_index,
            reduction=self.reduction, num_groups=num_groups, parallel=self.parallel,
            inplace_backward=self.inplace_backward, implementation=self.implementation, return_metrics=return_metrics,
        )  # fmt: skip


class LinearConSPOLoss(_Loss):
    """`linear_conspo_loss` with its settings kept, as `ConSPOLoss`.

    loss_fn = LinearConSPOLoss(shift=True)
    loss = loss_fn(hidden, head.weight, input_ids, rewards, groups, response_mask=response_mask)

    Args:
        All: as `linear_conspo_loss`, which checks them at the call.

    Cost, Returns, Raises, Source: as `linear_conspo_loss`. No parameters, no buffers.
    """

    def __init__(
        self,
        *,
        workspace_mib: float = 512,
        logits_dtype: torch.dtype | None = None,
        batch_invariant: bool = False,
        synchronize: bool = False,
        tau: float = 1.0,
        reward_threshold: float = 0.5,
        temperature: float = 1.0,
        logit_scale: float = 1.0,
        softcap: float | None = None,
        shift: bool = False,
        ignore_index: int = -100,
        reduction: str = "mean",
        parallel: Parallel | None = None,
        implementation: str = "auto",
    ) -> None:
        super().__init__(
            tau, reward_threshold, temperature, logit_scale, softcap, shift, ignore_index, reduction, parallel,
            implementation,
        )  # fmt: skip
        self.workspace_mib, self.logits_dtype = workspace_mib, logits_dtype
        self.batch_invariant, self.synchronize = batch_invariant, synchronize

    @overload
    def forward(
        self, hidden: Tensor, weight: Tensor, labels: Tensor, rewards: Tensor, groups: int | Tensor, *,
        bias: Tensor | None = None, weight_grad: Tensor | None = None, cu_seqlens: Tensor | None = None,
        response_mask: Tensor | None = None, margin: float | Tensor = 0.0, num_groups: float | Tensor | None = None,
        return_metrics: Literal[False] = False,
    ) -> Tensor: ...  # fmt: skip
    @overload
    def forward(
        self, hidden: Tensor, weight: Tensor, labels: Tensor, rewards: Tensor, groups: int | Tensor, *,
        bias: Tensor | None = None, weight_grad: Tensor | None = None, cu_seqlens: Tensor | None = None,
        response_mask: Tensor | None = None, margin: float | Tensor = 0.0, num_groups: float | Tensor | None = None,
        return_metrics: Literal[True],
    ) -> ConSPOOutput: ...  # fmt: skip
    def forward(
        self,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        rewards: Tensor,
        groups: int | Tensor,
        *,
        bias: Tensor | None = None,
        weight_grad: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        response_mask: Tensor | None = None,
        margin: float | Tensor = 0.0,
        num_groups: float | Tensor | None = None,
        return_metrics: bool = False,
    ) -> Tensor | ConSPOOutput:
        """The loss of a step; see `linear_conspo_loss`."""
        return linear_conspo_loss(
            hidden, weight, labels, rewards, groups, bias=bias, workspace_mib=self.workspace_mib,
            weight_grad=weight_grad, logits_dtype=self.logits_dtype, batch_invariant=self.batch_invariant,
            synchronize=self.synchronize, cu_seqlens=cu_seqlens, response_mask=response_mask, shift=self.shift,
            tau=self.tau, margin=margin, reward_threshold=self.reward_threshold, temperature=self.temperature,
            logit_scale=self.logit_scale, softcap=self.softcap, ignore_index=self.ignore_index,
            reduction=self.reduction, num_groups=num_groups, parallel=self.parallel,
            implementation=self.implementation, return_metrics=return_metrics,
        )  # fmt: skip
