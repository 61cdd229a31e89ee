"""Launches of a call, counted; no copy from pageable memory, nothing that waits; GEMMs that sum in fp32.

A call that reads a value, or whose shapes depend on one, raises on "meta" tensors: what is counted here can be captured
in a CUDA graph as far as the library is concerned.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from launches import DEVICE, Launch, launches_of, other_than_gemms, pageable
from processes import python
from torch import Tensor

import conspo_kernels as ck
from conspo_kernels.linear import gemm

ROLLOUTS, LENGTH, HIDDEN, VOCAB, GROUP = 8, 5, 64, 50_257, 4
LABELS = torch.zeros(ROLLOUTS, LENGTH, dtype=torch.int64, device=DEVICE)
REWARDS = torch.zeros(ROLLOUTS, device=DEVICE)
ON_CPU = torch.tensor([1.0, 0, 0, 0, 1, 0, 0, 1])
REACHED = torch.tensor([1.0, 1, 1, 1, 0, 0, 0, 0])  # the second group has no positive
MASK = torch.ones(ROLLOUTS, LENGTH, dtype=torch.bool, device=DEVICE)
COEFFICIENTS = torch.zeros(ROLLOUTS, LENGTH, device=DEVICE)
OFFSETS = torch.arange(ROLLOUTS + 1) * LENGTH
OFFSETS_THERE = torch.zeros(ROLLOUTS + 1, dtype=torch.int32, device=DEVICE)
AS = {"implementation": "triton"}


def logits(rollouts: int = ROLLOUTS, length: int = LENGTH) -> Tensor:
    return torch.empty(rollouts, length, VOCAB, dtype=torch.bfloat16, device=DEVICE, requires_grad=True)


def head(frozen: bool = False) -> tuple[Tensor, Tensor]:
    hidden = torch.empty(ROLLOUTS, LENGTH, HIDDEN, dtype=torch.bfloat16, device=DEVICE, requires_grad=True)
    weight = torch.empty(VOCAB, HIDDEN, dtype=torch.bfloat16, device=DEVICE, requires_grad=not frozen)
    return hidden, weight


def many(groups: int) -> Callable[[], Tensor]:
    rewards, labels = (torch.zeros(groups * GROUP, 1, dtype=torch.int64, device=DEVICE) for _ in range(2))
    return lambda: ck.conspo_loss(logits(groups * GROUP, 1), labels, rewards[:, 0], GROUP, **AS)  # type: ignore[return-value]


# At most so many launches beside GEMMs, forward and backward, the gradient of the loss by itself (`ones_like`) too.
CALLS: dict[str, tuple[int, Callable[[], Tensor]]] = {
    "conspo_loss": (8, lambda: ck.conspo_loss(logits(), LABELS, REWARDS, GROUP, **AS)),
    "conspo_loss, margin, shift, mask": (
        8, lambda: ck.conspo_loss(
            logits(), LABELS, REWARDS, GROUP, margin=0.1, num_groups=2, shift=True, response_mask=MASK, **AS
        ),
    ),
    "conspo_loss, margin on the device": (
        8, lambda: ck.conspo_loss(
            logits(), LABELS, REWARDS, GROUP, margin=torch.empty((), device=DEVICE), inplace_backward=False, **AS
        ),
    ),
    "conspo_loss, packed": (
        8, lambda: ck.conspo_loss(
            logits().flatten(0, 1), LABELS.flatten(), REWARDS, GROUP, cu_seqlens=OFFSETS_THERE, shift=True, **AS
        ),
    ),
    "conspo_loss, 256 groups": (8, many(256)),
    "conspo_loss, 1,024 groups": (9, many(1024)),
    # One copy for what is on the CPU.
    "conspo_loss, rewards on the CPU": (9, lambda: ck.conspo_loss(logits(), LABELS, ON_CPU, GROUP, **AS)),
    "conspo_loss, ids on the CPU": (9, lambda: ck.conspo_loss(logits(), LABELS, REWARDS, torch.arange(8) // 4, **AS)),
    "conspo_loss, offsets on the CPU": (
        9, lambda: ck.conspo_loss(
            logits().flatten(0, 1), LABELS.flatten(), REWARDS, GROUP, cu_seqlens=OFFSETS, shift=True, **AS
        ),
    ),
    "weighted_score_loss": (8, lambda: ck.weighted_score_loss(logits(), LABELS, REWARDS, **AS)),
    "weighted_score_loss, shift, mask, weights on the CPU": (
        8, lambda: ck.weighted_score_loss(logits(), LABELS, ON_CPU, shift=True, response_mask=MASK, **AS)
    ),
    "weighted_score_loss, packed": (
        8, lambda: ck.weighted_score_loss(
            logits().flatten(0, 1), LABELS.flatten(), REWARDS, cu_seqlens=OFFSETS_THERE, shift=True, **AS
        ),
    ),
    "weighted_logprob_loss": (8, lambda: ck.weighted_logprob_loss(logits(), LABELS, COEFFICIENTS, **AS)),
    "linear_conspo_loss, stored": (8, lambda: ck.linear_conspo_loss(*head(), LABELS, REWARDS, GROUP, **AS)),
    "linear_conspo_loss, two tiles": (
        20, lambda: ck.linear_conspo_loss(*head(), LABELS, REWARDS, GROUP, workspace_mib=2, **AS)
    ),
    "linear_conspo_loss, rewards on the CPU": (
        20, lambda: ck.linear_conspo_loss(*head(), LABELS, ON_CPU, GROUP, workspace_mib=2, **AS)
    ),
    "linear_conspo_loss, rollouts left out": (
        28, lambda: ck.linear_conspo_loss(*head(), LABELS, ON_CPU * REACHED, GROUP, workspace_mib=2, **AS)
    ),
    "linear_conspo_loss, frozen": (
        20, lambda: ck.linear_conspo_loss(*head(True), LABELS, REWARDS, GROUP, workspace_mib=2, **AS)
    ),
    "linear_conspo_loss, fp32 logits": (
        20, lambda: ck.linear_conspo_loss(*head(), LABELS, REWARDS, GROUP, logits_dtype=torch.float32, **AS)
    ),
    "linear_weighted_score_loss": (
        10, lambda: ck.linear_weighted_score_loss(*head(), LABELS, REWARDS, workspace_mib=2, **AS)
    ),
    "linear_weighted_logprob_loss": (
        10, lambda: ck.linear_weighted_logprob_loss(*head(), LABELS, COEFFICIENTS, workspace_mib=2, **AS)
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_launches(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    most, call = CALLS[name]
    launches = launches_of(monkeypatch, lambda: call().backward())
    assert len(other_than_gemms(launches)) <= most, [it.name for it in launches]
    assert pageable(launches) == []


def test_the_count_sees_what_it_should(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fill, a copy from pageable memory, a GEMM; and that a value is asked for."""

    def call() -> None:
        x = torch.where(REWARDS == 0, 0.0, REWARDS)
        x += ON_CPU.to(DEVICE, non_blocking=True)
        torch.mm(x[:, None], x[None])

    launches = launches_of(monkeypatch, call)
    assert [it.name for it in launches] == ["eq", "scalar_tensor", "where", "_to_copy", "add_", "mm"]
    assert [it.name for it in pageable(launches)] == ["_to_copy"]
    with pytest.raises(RuntimeError, match="meta"):
        launches_of(monkeypatch, lambda: REWARDS.sum().item())


def linear(monkeypatch: pytest.MonkeyPatch, **options: object) -> list[Launch]:
    def call() -> None:
        ck.linear_weighted_score_loss(*head(), LABELS, REWARDS, workspace_mib=2, **AS, **options).backward()  # type: ignore[call-overload]

    return launches_of(monkeypatch, call)


def test_sums_over_tiles_begin_with_a_write(monkeypatch: pytest.MonkeyPatch) -> None:
    """dW in fp32 over two tiles of rows: one GEMM writes it, one adds to it, and it is filled by nobody."""
    launches = linear(monkeypatch)
    assert [it.name for it in launches if it.kind == "gemm"] == ["mm", "mm", "mm", "mm", "mm", "addmm"]
    assert not [it for it in launches if it.name in ("zero_", "fill_", "zeros", "new_zeros")]


@pytest.mark.parametrize("allowed", [True, False])
def test_gemms_do_not_sum_in_16_bits(allowed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever torch is told, where a result is in 16 bits; and it is told the same again afterwards."""
    settings = torch.backends.cuda.matmul
    before = settings.allow_bf16_reduced_precision_reduction
    settings.allow_bf16_reduced_precision_reduction = allowed
    try:
        launches = linear(monkeypatch)
        assert settings.allow_bf16_reduced_precision_reduction == allowed
    finally:
        settings.allow_bf16_reduced_precision_reduction = before
    narrow = [it for it in launches if it.name == "mm" and set(it.dtypes) == {torch.bfloat16}]
    assert narrow
    assert not any(it.reduced for it in narrow)


def test_products_of_two_threads_do_not_sum_in_16_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first that ends does not switch the setting back on under the other."""
    settings = SimpleNamespace(allow_bf16_reduced_precision_reduction=True)
    monkeypatch.setattr(torch.backends.cuda, "matmul", settings)
    second_is_in, first_is_over = threading.Event(), threading.Event()
    seen: list[bool] = []
    x = torch.empty(1, 1, dtype=torch.bfloat16)

    def second(a: Tensor) -> Tensor:
        second_is_in.set()
        assert first_is_over.wait(10)
        seen.append(settings.allow_bf16_reduced_precision_reduction)
        return a

    def first(a: Tensor) -> Tensor:
        other.start()
        assert second_is_in.wait(10)
        seen.append(settings.allow_bf16_reduced_precision_reduction)
        return a

    other = threading.Thread(target=lambda: gemm._summed_in_fp32(second, x))
    gemm._summed_in_fp32(first, x)
    first_is_over.set()
    other.join()
    assert seen == [False, False]
    assert settings.allow_bf16_reduced_precision_reduction


def test_gemms_leave_both_flags_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    """Newer versions of torch set two at once: whether cuBLAS may split a sum comes with it."""

    class Settings:
        flags = (True, False)
        allow_bf16_reduced_precision_reduction = property(
            lambda self: self.flags[0],
            lambda self, value: setattr(self, "flags", (value, True) if isinstance(value, bool) else value),
        )
        allow_bf16_reduced_precision_reduction_split_k = property(lambda self: self.flags[1])

    settings, seen = Settings(), []
    monkeypatch.setattr(torch.backends.cuda, "matmul", settings)
    gemm._summed_in_fp32(lambda a: seen.append(settings.flags) or a, torch.empty(1, 1, dtype=torch.bfloat16))
    assert seen == [(False, False)]
    assert settings.flags == (True, False)


def test_the_gradient_of_weight_is_added_unrounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """In phase 2 too: dW leaves its GEMMs in fp32, and one launch adds it to the buffer."""
    buffer = torch.empty(VOCAB, HIDDEN, device=DEVICE)
    launches = linear(monkeypatch, weight_grad=buffer)
    assert "addcmul_" in [it.name for it in launches[-2:]]
    assert not [it for it in launches if it.name == "copy_"]  # no sum is rounded


def test_compiled_launchers() -> None:
    """Registers and spills of what `benchmarks.compiled` does not call; one binary for all slices, tiles and sizes."""
    result = json.loads(python("tests/support/compiled_launchers.py", "sm_90"))
    known = {case: {kernel for it, kernel, *_ in result["rows"] if it == case} for case, *_ in result["rows"]}
    for case in ("known, bf16", "known, bf16, odd", "known, fp32"):
        assert known[case] == {"_forward_backward_kernel"}
    for case in ("known, bf16, elsewhere", "known, bf16, softcap", "known, fp32, softcap", "known, three launches"):
        assert "_forward_backward_kernel" not in known[case]  # it would take as long as three launches
    for case, kernel, num_warps, registers, spills in result["rows"]:
        assert registers * num_warps * 32 <= 65_536, (case, kernel, registers)
        assert spills == 0, (case, kernel)
        if kernel == "_forward_backward_kernel":
            assert num_warps == 32
            assert registers > 32, case  # one row per multiprocessor, as `row_fits_cache` counts
    assert result["binaries"] == {
        "labels": [1, 1, 12], "labels, masked": [1, 1, 12], "labels, packed": [1, 1, 12], "tile": [3, 3, 36]
    }  # fmt: skip
