"""Second derivatives raise. Without this module a gradient would be a constant in silence."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor


def no_second_derivative(ctx, *_):  # type: ignore[no-untyped-def]
    raise NotImplementedError("conspo_kernels has no second derivative: the gradient has no gradient of its own")


def traced(x: Tensor | None) -> bool:
    """Whether a compiler traces the op that x comes to.

    A traced backward overwrites nothing that the forward saved: inductor cannot prove such a tensor to be its own, and
    would read and write all of it once more.
    """
    return isinstance(x, FakeTensor | FunctionalTensor)


class _WithoutDerivative(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gradient: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        return gradient.view_as(gradient)

    backward = staticmethod(no_second_derivative)


def without_derivative(gradient: Tensor) -> Tensor:
    """The gradient; under `create_graph=True`, when grad mode is on in backward, one whose own backward raises."""
    if not torch.is_grad_enabled() or traced(gradient):
        return gradient
    return _WithoutDerivative.apply(gradient.detach().requires_grad_())
