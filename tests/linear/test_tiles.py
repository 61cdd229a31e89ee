"""Tiles of logits on a GPU: every GEMM's operands are aligned whatever V is, and the last waves of GEMMs are full."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

import conspo_kernels as ck
from benchmarks.simulation.simulated_gpu import CUDA, simulated
from conspo_kernels.linear import gemm
from conspo_kernels.linear.tiling import (
    BLOCK,
    Problem,
    backward_tile,
    cost_bytes,
    idle_operations,
    row_tile,
    workspace_of,
)

TOKENS, HIDDEN = (4, 3), 64
AS: dict[str, Any] = {"implementation": "triton"}
VOCABULARIES = [257, 50_257, 128_257]


class Products:
    """Within, keeps the matrices of every GEMM, its result too.  results: of the step, for those who compare them."""

    def __init__(self) -> None:
        self.matrices: list[Tensor] = []
        self.number = 0
        self.results: list[Tensor | None] = []

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        product, add = gemm.gemm, gemm.add_gemm

        def multiply(a: Tensor, b: Tensor, out: Tensor, bias: Tensor | None = None) -> Tensor:
            self.keep(a, b, out)
            return product(a, b, out, bias)

        def multiply_and_add(total: Tensor, a: Tensor, b: Tensor, unrounded: bool = False) -> None:
            self.keep(a, b, total)
            add(total, a, b, unrounded)

        with mock.patch.object(gemm, "gemm", multiply), mock.patch.object(gemm, "add_gemm", multiply_and_add):
            yield

    def keep(self, *matrices: Tensor) -> None:
        self.number += 1
        self.matrices += matrices


def misaligned(x: Tensor) -> bool:
    """As cuBLAS takes a matrix: one stride is 1, the other its leading dimension, in whole 16 bytes."""
    leading = x.stride(0) if x.stride(1) == 1 else x.stride(1)
    assert 1 in x.stride()
    return leading * x.element_size() % 16 != 0 or x.data_ptr() % 16 != 0


@contextlib.contextmanager
def without_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Large vocabularies: a layout depends on no value."""
    from triton.runtime.interpreter import GridExecutor

    with monkeypatch.context() as patch:
        patch.setattr(GridExecutor, "__call__", lambda *_, **__: None)
        yield


def head(
    vocab_size: int, frozen: bool, bias: bool, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(*TOKENS, HIDDEN, generator=generator).to(dtype).to(device).requires_grad_()
    weight = (torch.randn(vocab_size, HIDDEN, generator=generator) / 4).to(dtype).to(device)
    number = torch.randn(vocab_size, generator=generator).to(dtype).to(device) if bias else None
    for x in (weight, number):
        if x is not None:
            x.requires_grad_(not frozen)
    return hidden, weight, number


MODES: dict[str, Callable[..., Tensor]] = {
    "none": lambda x, w, y, r, **more: ck.linear_token_logprobs(x.detach(), w.detach(), y, **more),  # type: ignore[dict-item]
    "store": lambda x, w, y, r, **more: ck.linear_conspo_loss(x, w, y, r, 2, **more),  # type: ignore[dict-item]
    "recompute": lambda x, w, y, r, **more: ck.linear_conspo_loss(x, w, y, r, 2, **more),  # type: ignore[dict-item]
    "known": lambda x, w, y, r, **more: ck.linear_weighted_score_loss(x, w, y, r - 0.5, **more),  # type: ignore[dict-item]
    "frozen": lambda x, w, y, r, **more: ck.linear_conspo_loss(x, w, y, r, 2, **more),  # type: ignore[dict-item]
}


def step(mode: str, vocab_size: int, bias: bool = False, dtype: torch.dtype = torch.bfloat16, **more: Any) -> Products:
    """A mode forward and backward, with tiles of fewer rows than there are tokens where it has any."""
    hidden, weight, number = head(vocab_size, mode == "frozen", bias, dtype, CUDA)
    labels = (torch.arange(12) * 7 % vocab_size).view(TOKENS).to(CUDA)
    rewards = torch.tensor([1.0, 0, 0, 1], device=CUDA)
    share = 2.0 if mode == "store" else 0.4
    mib = share * 12 * (vocab_size + 64) * 4 / 2**20
    number = number.detach() if number is not None and mode == "none" else number
    products = Products()
    with products.kept():
        loss = MODES[mode](hidden, weight, labels, rewards, bias=number, workspace_mib=mib, **AS, **more)
        if mode != "none":
            (loss * 2).backward()
    products.results = [loss.detach(), *(x.grad for x in (hidden, weight, number) if x is not None)]
    return products


@pytest.mark.parametrize("logits", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("vocab_size", VOCABULARIES)
@pytest.mark.parametrize("mode", MODES)
def test_operands_are_aligned(
    mode: str, vocab_size: int, bias: bool, logits: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    with simulated(), without_kernels(monkeypatch):
        products = step(mode, vocab_size, bias, logits_dtype=logits)
    assert products.number >= {"none": 1, "store": 3, "recompute": 4, "known": 3, "frozen": 2}[mode]
    wrong = [(tuple(x.shape), x.stride(), x.dtype) for x in products.matrices if misaligned(x)]
    assert wrong == []


@pytest.mark.parametrize("vocab_size", [64, 72], ids=["whole lines", "whole 16 bytes"])
def test_a_bias_is_added_in_the_epilogue_where_it_can(vocab_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """That is where a result is contiguous: rows that are aligned as they are are not padded."""
    with simulated(), without_kernels(monkeypatch):
        products = step("none", vocab_size, bias=True)
    results = [x for x in products.matrices if x.shape[1] == vocab_size and x.shape[0] < 64]
    assert results
    assert all(x.is_contiguous() for x in results)


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("mode", MODES)
def test_padding_changes_no_result(mode: str, bias: bool) -> None:
    """V = 257 on a simulated GPU, beside fp64 logits of the same numbers in eager PyTorch."""
    with simulated():
        products = step(mode, 257, bias, torch.float32)
    hidden, weight, number = (
        None if x is None else x.detach().double().requires_grad_(x.requires_grad)
        for x in head(257, mode == "frozen", bias, torch.float32, torch.device("cpu"))
    )  # fmt: skip
    z = hidden @ weight.T + (0 if number is None else number)  # type: ignore[operator, union-attr]
    labels = (torch.arange(12) * 7 % 257).view(TOKENS)
    rewards = torch.tensor([1.0, 0, 0, 1])
    with torch.enable_grad():
        if mode == "none":
            loss = ck.token_logprobs(z, labels, implementation="torch")
        elif mode == "known":
            loss = (ck.token_logprobs(z, labels, implementation="torch").mean(1) * (rewards - 0.5)).sum()  # type: ignore[union-attr]
        else:
            loss = ck.conspo_loss(z, labels, rewards, 2, implementation="torch")
        if mode != "none":
            (loss * 2).backward()  # type: ignore[operator]
    expected = [loss.detach(), *(x.grad for x in (hidden, weight, number) if x is not None)]  # type: ignore[union-attr]
    for ours, theirs in zip(products.results, expected, strict=True):
        assert (ours is None) == (theirs is None)
        if theirs is not None:
            torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5)


def problem(n: int = 8192, v: int = 151_936, h: int = 4096) -> Problem:
    return Problem(n, v, h, 2, multiprocessors=132)


@pytest.mark.parametrize("needs", [(False, False), (True, False), (True, True)], ids=str)
def test_rows_are_whole_blocks(needs: tuple[bool, bool]) -> None:
    """Wherever tokens are cut at all; and no tile is larger than the workspace."""
    for n in (300, 8192, 9001, 32_768):
        for v, h in ((50_257, 768), (151_936, 4096), (262_144, 3840)):
            for workspace in (2**27, 2**29, workspace_of(80 * 2**30)):
                it = problem(n, v, h)
                for tile in (row_tile(it, workspace, *needs), backward_tile(it, workspace, *needs)):
                    assert tile.rows == n or tile.rows % BLOCK[0] == 0
                    assert it.tile_bytes(*tile) <= workspace


def test_the_last_wave_is_full() -> None:
    """A frozen head of Qwen3-8B in 512 MiB: by rows of 1,024 dH fills 0.97 of a wave, by 1,639 it would 0.78 of two."""
    assert row_tile(problem(), 2**29, True, False).rows == 1024
    idle = idle_operations(problem(), row_tile(problem(), 2**29, True, False), True, False)
    assert idle / (2 * 2 * 8192 * 4096 * 151_936) < 0.02
    even = problem()._replace(multiprocessors=0)
    assert row_tile(even, 2**29, True, False).rows == 1639
    wasted = idle_operations(problem(), row_tile(even, 2**29), True, False)
    assert wasted / (2 * 2 * 8192 * 4096 * 151_936) > 0.15


def test_idle_operations_by_hand() -> None:
    """Two blocks of 128 x 256 on 132 multiprocessors for each GEMM: 130 wait."""
    it = Problem(256, 256, 256, 2, multiprocessors=132)
    tile = row_tile(it, 2**30)
    assert tile == (256, 256)
    assert idle_operations(it, tile, True, True) == 3 * 2 * 130 * 128 * 256 * 256
    assert cost_bytes(it, tile, True, True) > 0
    assert idle_operations(it._replace(multiprocessors=0), tile, True, True) == 0
