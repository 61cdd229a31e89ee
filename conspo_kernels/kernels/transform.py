"""The transform between raw logits and the softmax, as numbers that a kernel can use."""

from __future__ import annotations

from typing import NamedTuple


class LogitTransform(NamedTuple):
    """y = f(z) / temperature, f(z) = softcap * tanh(z * logit_scale / softcap), or z * logit_scale without a softcap.

    Kernels compute y = u * scale with u = tanh(z * inner), or u = z: maxima and differences are taken of u, so that the
    constant factor costs one multiplication per exponential and no digits of a large logit.
    """

    temperature: float = 1.0
    logit_scale: float = 1.0
    softcap: float | None = None

    @property
    def inner(self) -> float:
        return 1.0 if self.softcap is None else self.logit_scale / self.softcap

    @property
    def scale(self) -> float:
        return (self.logit_scale if self.softcap is None else self.softcap) / self.temperature
