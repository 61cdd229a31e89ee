"""fp32 logits of 16-bit operands: the gradient is written over them, in 16 bits, and no byte more is needed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import conspo_kernels as ck
from benchmarks.simulation.simulated_gpu import simulated
from conspo_kernels.backends import eager, native
from conspo_kernels.backends.registry import backend_for
from conspo_kernels.linear import modes, tiles
from conspo_kernels.linear.tiles import Head, RowSelection, rounded_over, second_halves
from conspo_kernels.values import IGNORED, LogitRows, LogitTransform

NARROW = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
TOKENS, HIDDEN, VOCAB = 64, 2, 3000


def rows_of(vocab_size: int, padding: int, softcap: float | None, device: torch.device) -> LogitRows:
    """Five rows, the second ignored, from one buffer whose rows have padding that is NaN."""
    generator = torch.Generator().manual_seed(vocab_size)
    buffer = torch.full((5 * (vocab_size + padding),), torch.nan)
    logits = buffer.as_strided((5, vocab_size), (vocab_size + padding, 1))
    logits.copy_(torch.randn(5, vocab_size, generator=generator) * 3)
    labels = torch.tensor([[0, IGNORED, vocab_size - 1, vocab_size // 2, vocab_size + 3]], device=device)
    logits = buffer.to(device).as_strided(logits.shape, logits.stride())
    return LogitRows(logits[None], labels, LogitTransform(0.7, 1.3, softcap))


def over(rows: LogitRows, dtype: torch.dtype) -> tuple[LogitRows, Tensor]:
    """A copy of the logits, in memory like theirs, and room for their gradient in it."""
    z = rows.logits[0]
    copy = torch.empty(z.shape[0] * z.stride(0), device=z.device).as_strided(z.shape, z.stride()).copy_(z)
    return rows._replace(logits=copy[None]), second_halves(copy, dtype)[None]


def same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))


# A row of one, two and many tiles, each with and without a part of one; and, natively, of several parts.
@NARROW
@pytest.mark.parametrize("softcap", [None, 5.0], ids=["", "softcap"])
@pytest.mark.parametrize("vocab_size", [1, 2, 31, 300, 2048, 2500, 20_483, 70_001])
def test_the_gradient_over_the_logits_has_the_bits_of_one_elsewhere(
    vocab_size: int, softcap: float | None, dtype: torch.dtype, implementation: str, device: torch.device
) -> None:
    backend = backend_for(implementation, device)
    rows = rows_of(vocab_size, -vocab_size % 64, softcap, device)
    coefficients = torch.tensor([[1.0, 2.0, -0.5, 0.0, 0.25]], device=device)
    statistics = backend.token_logprob_forward(rows, True)
    for incoming in (
        statistics.incoming(coefficients),
        statistics.incoming(coefficients, coefficients.flip(1)),
    ):
        elsewhere = torch.full(rows.logits.shape, torch.nan, dtype=dtype, device=device)
        backend.token_logprob_backward(elsewhere, rows, incoming)
        copy, room = over(rows, dtype)
        backend.token_logprob_backward(room, copy, incoming)
        assert same(room, elsewhere)
        if implementation != "triton":  # the interpreter truncates
            wide = torch.empty_like(rows.logits)
            backend.token_logprob_backward(wide, rows, incoming)
            assert same(wide.to(dtype), elsewhere)
    copy, room = over(rows, dtype)
    logprobs = backend.token_logprob_forward_backward(room, copy, coefficients)
    elsewhere = torch.full(rows.logits.shape, torch.nan, dtype=dtype, device=device)
    assert same(logprobs, backend.token_logprob_forward_backward(elsewhere, rows, coefficients))
    assert same(room, elsewhere)


@NARROW
@pytest.mark.skipif(native.OBSTACLE is not None, reason=str(native.OBSTACLE))
@pytest.mark.parametrize("threads", [1, 4, 8])  # of five rows
@pytest.mark.parametrize("instruction_set", native.instruction_sets())
def test_every_instruction_set_and_number_of_threads(instruction_set: str, threads: int, dtype: torch.dtype) -> None:
    """No thread overwrites what another one reads: a row of three parts has one thread."""
    rows = rows_of(70_001, 63, None, torch.device("cpu"))
    coefficients = torch.tensor([[1.0, 2.0, -0.5, 0.0, 0.25]])
    before = torch.get_num_threads(), native.instruction_set()
    try:
        native._C.set_instruction_set(instruction_set)
        torch.set_num_threads(threads)
        wide = torch.empty_like(rows.logits)
        native.token_logprob_forward_backward(wide, rows, coefficients)
        copy, room = over(rows, dtype)
        native.token_logprob_forward_backward(room, copy, coefficients)
    finally:
        torch.set_num_threads(before[0])
        native._C.set_instruction_set(before[1])
    assert same(room, wide.to(dtype))


@NARROW
@pytest.mark.parametrize("padding", [0, 5])
@pytest.mark.parametrize("number", [1, 2, 3, 8, 13])
def test_rounded_over_itself(number: int, padding: int, dtype: torch.dtype) -> None:
    z = torch.randn(number * (7 + padding)).as_strided((number, 7), (7 + padding, 1))
    expected, address = z.to(dtype), z.data_ptr()
    out = rounded_over(z, dtype)
    assert torch.equal(out, expected)
    assert (out.data_ptr(), out.stride()) == (address, z.stride())


def of_mode(mode: str, bias: bool, **more: Any) -> Callable[[torch.device], list[Tensor]]:
    """A step forward and backward of bf16 operands: its loss and gradients."""

    def step(device: torch.device) -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)

        def draw(*size: int) -> Tensor:
            return torch.randn(size, generator=generator).bfloat16().to(device)

        hidden, weight = draw(4, TOKENS // 4, HIDDEN).requires_grad_(), draw(VOCAB, HIDDEN).requires_grad_()
        number = draw(VOCAB).requires_grad_() if bias else None
        weights = torch.tensor([0.5, -0.5, 0.25, -0.25]).to(device)
        rewards = (weights > 0).float()
        labels = (torch.arange(TOKENS) * 7).view(4, -1).to(device)
        arguments: dict[str, Any] = {"bias": number, "logits_dtype": torch.float32, **more}
        if mode == "frozen":
            weight = weight.detach()
            arguments["bias"] = None if number is None else number.detach()
        if mode == "known":
            loss = ck.linear_weighted_score_loss(hidden, weight, labels, weights, **arguments)
        else:
            loss = ck.linear_conspo_loss(hidden, weight, labels, rewards, 2, **arguments)
        assert isinstance(loss, Tensor)
        loss.backward()
        return [loss.detach(), *(x.grad for x in (hidden, weight, number) if x is not None and x.grad is not None)]

    return step


MODES = pytest.mark.parametrize("mode", ["store", "recompute", "known", "frozen"])
BIAS = pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])


def mib(mode: str, itemsize: int = 4) -> float:
    """Of all logits, or of a quarter of them."""
    return (1.01 if mode == "store" else 0.26) * TOKENS * (VOCAB + 64) * itemsize / 2**20


@MODES
@BIAS
@pytest.mark.parametrize("implementation", ["native", "torch"])
def test_results_are_those_of_gradients_elsewhere(
    mode: str, bias: bool, implementation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = of_mode(mode, bias, implementation=implementation, workspace_mib=mib(mode))
    results = step(torch.device("cpu"))

    def elsewhere(z: Tensor, dtype: torch.dtype) -> Tensor:
        return z.new_empty(z.shape, dtype=dtype)

    monkeypatch.setattr(tiles, "second_halves", elsewhere)
    monkeypatch.setattr(modes, "second_halves", elsewhere)
    monkeypatch.setattr(tiles, "rounded_over", lambda z, dtype: z.to(dtype))
    for ours, theirs in zip(results, step(torch.device("cpu")), strict=True):
        assert torch.equal(ours, theirs)


class Allocated(TorchDispatchMode):
    """The most bytes that tensors made within hold at one time."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, Tensor):
                storage = x.untyped_storage()
                self.sizes[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.sizes = {key: it for key, it in self.sizes.items() if not it[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.sizes.values()))
        return result


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Modes see what ops do inside."""
    from conspo_kernels.ops import registration

    monkeypatch.setattr(registration, "_dispatch_modes", lambda: 0)


@MODES
@BIAS
@pytest.mark.parametrize("where", ["native", "torch", "simulated"])
def test_four_bytes_per_logit(mode: str, bias: bool, where: str, seen: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """With one tile for all logits, what is allocated beside it is a small part: a gradient of 2 bytes was half."""
    monkeypatch.setattr(eager, "CHUNK_ELEMENTS", VOCAB)  # of which it has copies
    logits = TOKENS * (VOCAB + 64) * 4
    implementation = "triton" if where == "simulated" else where
    step = of_mode(mode, bias, implementation=implementation, workspace_mib=1.01 * logits / 2**20)
    if where == "simulated":
        with simulated() as memory:
            step(torch.device("cuda"))
            peak = memory.peak
    else:
        with Allocated() as allocated:
            step(torch.device("cpu"))
        peak = allocated.peak
    assert 0.9 * logits <= peak <= logits + 12 * (VOCAB + TOKENS) * (HIDDEN + 1)  # operands, gradients, fp32 sums


def test_what_a_tile_may_have() -> None:
    """A workspace holds as many fp32 logits as its bytes are by four."""
    hidden, weight = torch.empty(8192, 64, dtype=torch.bfloat16), torch.empty(1000, 64, dtype=torch.bfloat16)
    problem = RowSelection(hidden, torch.zeros(8192, dtype=torch.long), None).problem(Head(weight, None, torch.float32))
    assert problem.tile_bytes(10, 1000) == 10 * 1000 * 4
