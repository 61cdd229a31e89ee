"""`nn.Module` forms of the losses: settings at construction, a step's tensors and margin at the call."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, Literal, overload

from torch import Tensor, nn
from typing_extensions import Unpack

from .conspo import ConSPOOutput
from .loss import conspo_loss, linear_conspo_loss
from .options import LinearLossOptions, LossOptions
from .values import python_number

OF_A_STEP = {"cu_seqlens", "response_mask", "bias", "weight_grad"}  # tensors, which only a call takes


class _Settings(nn.Module):
    """The settings of a loss that are not its defaults; a call's own win over them. Values are checked at the call."""

    loss: Callable[..., Tensor | ConSPOOutput]
    names: frozenset[str]

    def __init__(self, settings: Mapping[str, Any]) -> None:
        super().__init__()
        for name in settings:
            if name not in self.names:
                raise TypeError(f"{type(self).__name__}() got an unexpected keyword argument {name!r}")
        # torch.compile takes a scalar of NumPy for an array.
        values = {name: python_number(value) for name, value in settings.items()}
        defaults = type(self).loss.__kwdefaults__ or {}
        self.settings = {name: value for name, value in values.items() if not _equal(value, defaults[name])}

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.settings.items())


def _signature(loss: Callable[..., object], names: frozenset[str]) -> inspect.Signature:
    """What `help` shows of a module's constructor: the settings as its loss spells them out."""
    this = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return inspect.Signature([this, *(it for it in inspect.signature(loss).parameters.values() if it.name in names)])


def _equal(value: Any, default: Any) -> bool:
    """Whether a call takes both alike: 10 for 10.0, but neither 0 for False nor -100.0 for -100.

    Tensors and arrays are no default: their comparison would be another one of these.
    """
    alike = type(value) is type(default) or (type(value), type(default)) == (int, float)
    return value is default or (alike and isinstance(value, (int, float, str)) and bool(value == default))


class ConSPOLoss(_Settings):
    """`conspo_loss` that stores its settings: a call passes only the arguments that change from step to step.

        loss_fn = ConSPOLoss(shift=True)
        loss = loss_fn(logits, input_ids, rewards, groups, response_mask=response_mask, margin=margin(step))

    Args:
        All: as `conspo_loss`. A call takes the others (cu_seqlens, response_mask, return_metrics), and any of these
            again: the call's own win.

    Cost, Returns, Raises, Source: as `conspo_loss`, at the call. No parameters, no buffers.
    """

    loss = staticmethod(conspo_loss)
    names = frozenset(LossOptions.__annotations__) - OF_A_STEP

    def __init__(self, **settings: Unpack[LossOptions]) -> None:
        super().__init__(settings)

    # Of the constructor: that of a class would be its instances' and its subclasses' too.
    __init__.__signature__ = _signature(loss, names)  # type: ignore[attr-defined]

    @overload
    def forward(
        self, logits: Tensor, labels: Tensor, rewards: Tensor, groups: int | Tensor, *,
        return_metrics: Literal[False] = False, **options: Unpack[LossOptions],
    ) -> Tensor: ...  # fmt: skip
    @overload
    def forward(
        self, logits: Tensor, labels: Tensor, rewards: Tensor, groups: int | Tensor, *,
        return_metrics: Literal[True], **options: Unpack[LossOptions],
    ) -> ConSPOOutput: ...  # fmt: skip
    def forward(
        self, logits: Tensor, labels: Tensor, rewards: Tensor, groups: int | Tensor, **options: Any
    ) -> Tensor | ConSPOOutput:
        """The loss of a step; options are keyword arguments of `conspo_loss`."""
        return conspo_loss(logits, labels, rewards, groups, **{**self.settings, **options})


class LinearConSPOLoss(_Settings):
    """`linear_conspo_loss` that stores its settings, as `ConSPOLoss` does.

        loss_fn = LinearConSPOLoss(shift=True)
        loss = loss_fn(hidden, head.weight, input_ids, rewards, groups, response_mask=response_mask)

    Args:
        All: as `linear_conspo_loss`. A call takes the others (bias, weight_grad, cu_seqlens, response_mask,
            return_metrics), and any of these again: the call's own win.

    Cost, Returns, Raises, Source: as `linear_conspo_loss`, at the call. No parameters, no buffers.
    """

    loss = staticmethod(linear_conspo_loss)
    names = frozenset(LinearLossOptions.__annotations__) - OF_A_STEP

    def __init__(self, **settings: Unpack[LinearLossOptions]) -> None:
        super().__init__(settings)

    # Of the constructor: that of a class would be its instances' and its subclasses' too.
    __init__.__signature__ = _signature(loss, names)  # type: ignore[attr-defined]

    @overload
    def forward(
        self, hidden: Tensor, weight: Tensor, labels: Tensor, rewards: Tensor, groups: int | Tensor, *,
        return_metrics: Literal[False] = False, **options: Unpack[LinearLossOptions],
    ) -> Tensor: ...  # fmt: skip
    @overload
    def forward(
        self, hidden: Tensor, weight: Tensor, labels: Tensor, rewards: Tensor, groups: int | Tensor, *,
        return_metrics: Literal[True], **options: Unpack[LinearLossOptions],
    ) -> ConSPOOutput: ...  # fmt: skip
    def forward(
        self, hidden: Tensor, weight: Tensor, labels: Tensor, rewards: Tensor, groups: int | Tensor, **options: Any
    ) -> Tensor | ConSPOOutput:
        """The loss of a step; options are keyword arguments of `linear_conspo_loss`."""
        return linear_conspo_loss(hidden, weight, labels, rewards, groups, **{**self.settings, **options})
