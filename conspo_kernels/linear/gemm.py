"""The GEMMs of the fused-linear path: products of matrices by torch, and sums of products in fp32."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

PRODUCT_BYTES = 2**24  # of a product that is added to a wider sum where a GEMM cannot: torch makes a wider copy of it
WIDENS = frozenset({"cuda"})  # devices whose GEMMs of 16-bit matrices can write their fp32 sums unrounded
REDUCTIONS = {
    torch.bfloat16: "allow_bf16_reduced_precision_reduction",
    torch.float16: "allow_fp16_reduced_precision_reduction",
}


def slices(total: int, size: int) -> Iterator[slice]:
    """Slices of `size` that cover `total`; the last may be shorter."""
    for start in range(0, total, max(1, size)):
        yield slice(start, min(start + size, total))


class _Switch:
    """A setting of the process that is off while a product of any thread needs it off.

    Autograd has a thread per device: one that puts the setting back must not do so under another's product.
    """

    def __init__(self, name: str) -> None:
        self.name, self.users = name, 0
        self.lock = threading.Lock()
        self.before: tuple[bool, ...] = ()

    def __enter__(self) -> None:
        settings = torch.backends.cuda.matmul
        with self.lock:
            if self.users == 0:
                # Newer versions of torch set a second flag with the first: whether a long sum may be split at all.
                names = [self.name, f"{self.name}_split_k"]
                self.before = tuple(getattr(settings, name) for name in names if hasattr(settings, name))
                self._set(False, *self.before[1:])
            self.users += 1

    def __exit__(self, *_: object) -> None:
        with self.lock:
            self.users -= 1
            if self.users == 0:
                self._set(*self.before)

    def _set(self, *flags: bool) -> None:
        setattr(torch.backends.cuda.matmul, self.name, flags if len(flags) > 1 else flags[0])


SWITCHES = {dtype: _Switch(name) for dtype, name in REDUCTIONS.items()}


def _summed_in_fp32(product: Callable[..., Tensor], *matrices: Tensor, **options: Any) -> Tensor:
    """A product on a GPU. Where cuBLAS splits a long sum, its parts are not added in 16 bits, as torch allows."""
    with SWITCHES.get(matrices[-1].dtype, contextlib.nullcontext()):
        return product(*matrices, **options)


def gemm(a: Tensor, b: Tensor, out: Tensor, bias: Tensor | None = None) -> Tensor:
    """out = a @ b + bias. A wider `out` gets what the GEMM has summed, not rounded to the dtype of a and b."""
    if out.dtype == a.dtype:
        if out.device.type == "cpu":
            return torch.mm(a, b, out=out) if bias is None else torch.addmm(bias, a, b, out=out)
        if bias is None:
            return _summed_in_fp32(torch.mm, a, b, out=out)
        return _summed_in_fp32(torch.addmm, bias, a, b, out=out)
    if out.device.type in WIDENS:
        torch.mm(a, b, out_dtype=out.dtype, out=out)
    else:  # a product of two bf16 or fp16 numbers is exact in fp32
        torch.mm(a.to(out.dtype), b.to(out.dtype), out=out)
    return out if bias is None else out.add_(bias)


def add_gemm(total: Tensor, a: Tensor, b: Tensor, unrounded: bool = False) -> None:
    """total += a @ b, summed in the precision of `total`.

    unrounded: so is the product. Else a CPU rounds it once to the dtype of a and b, which takes less time.
    """
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    elif total.device.type in WIDENS:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        b = b.to(total.dtype) if unrounded else b
        width = max(total.shape[1], a.shape[1]) if unrounded else total.shape[1]  # a is copied too
        for part in slices(total.shape[0], PRODUCT_BYTES // (width * b.element_size())):
            total[part] += torch.mm(a[part].to(b.dtype), b)


class Sum:
    """A gradient [rows, H] that is a sum of products: written at once where there is one, else summed in fp32."""

    def __init__(self, out: Tensor, terms: int) -> None:
        self.out = out
        narrow = out.element_size() < 4
        self.total = torch.empty_like(out, dtype=torch.float32) if terms > 1 and narrow else out
        self.unrounded = self.total is out  # nobody rounds it later
        self.begun = False
        if terms == 0:
            self.total.zero_()

    @classmethod
    def onto(cls, total: Tensor) -> Sum:
        """A sum that begins with the values of `total`."""
        added = cls(total, 1)
        added.begun = True
        return added

    def add(self, rows: slice, first: bool, a: Tensor, b: Tensor) -> None:
        total = self.total[rows]
        if self.begun or not first:
            add_gemm(total, a, b, unrounded=self.unrounded)
            return
        if total.device.type == "cpu":
            total.zero_()  # new pages cost half, one after another, of what they do in the order of a GEMM
        if total.dtype == a.dtype or total.device.type in WIDENS:
            gemm(a, b, total)
        else:
            add_gemm(total, a, b, unrounded=self.unrounded)

    def result(self) -> Tensor:
        return self.out if self.total is self.out else self.out.copy_(self.total)
