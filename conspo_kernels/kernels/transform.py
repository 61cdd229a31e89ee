"""The transform between raw logits and the softmax, as numbers that a kernel can use."""

from __future__ import annotations

from typing import NamedTuple

import torch


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

    def tanh(self, dtype: torch.dtype) -> str | None:
        """Which tanh of `softmax_triton.py` the compiled kernels need for logits of a dtype.

        "short" is wrong by up to 1.5e-7, which `scale` multiplies: up to 64 that stays below 1e-5. fp32 logits, twice
        the bytes, leave time for "series".
        """
        if self.softcap is None:
            return None
        return "short" if dtype.itemsize == 2 and self.scale <= 64 else "series"
