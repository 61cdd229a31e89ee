"""What a GPU has to pass beyond the shared cases: real sizes, streams, no synchronisation, memory, the gradient check.

Without a GPU the same tests run on tiny shapes on a simulated one (`benchmarks/simulation/simulated_gpu.py`), so that
what they say is known to run; what fills a GPU's memory is skipped.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

import pytest
import torch
from torch import Tensor

from benchmarks.simulation.simulated_gpu import simulated
from benchmarks.timing.logits_path import OPS, OURS, Exact, Inputs, call, candidates, errors
from benchmarks.timing.measure import peak_bytes
from benchmarks.timing.shapes import GEMMA, GPT2, QWEN, Shape
from conspo_kernels import (
    conspo_loss,
    linear_conspo_loss,
    linear_token_logprobs,
    linear_weighted_logprob_loss,
    linear_weighted_score_loss,
    token_logprobs,
    weighted_logprob_loss,
    weighted_score_loss,
)
from conspo_kernels.__main__ import main
from conspo_kernels.ops import devices, ranks

pytestmark = pytest.mark.gpu
ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda")
TIMED = [op for op in OPS.values() if not op.known]  # what Triton has
Outputs = TypeVar("Outputs", bound=tuple[Tensor, ...])
needs_gpu = pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
needs_second_device = pytest.mark.skipif(ON_GPU and torch.cuda.device_count() < 2, reason="needs a GPU")  # another one


@pytest.fixture(autouse=True)
def _gpu() -> Iterator[None]:
    torch.use_deterministic_algorithms(False)  # filling new memory with NaN is an allocation and a launch too
    if ON_GPU:
        yield
        return
    with simulated():
        yield


def size(real: int, tiny: int) -> int:
    return real if ON_GPU else tiny


@pytest.mark.parametrize("op", TIMED, ids=lambda op: op.name)
@pytest.mark.parametrize(
    ("vocab_size", "dtype"),
    [
        (QWEN, torch.bfloat16), (GEMMA, torch.bfloat16), (GPT2, torch.bfloat16), (GPT2, torch.float16),
        (QWEN, torch.float32),
    ],
    ids=str,
)  # fmt: skip
def test_model_sizes(op: object, vocab_size: int, dtype: torch.dtype) -> None:
    """Against fp64, at the sizes that are timed."""
    inputs = Inputs.from_shape(
        Shape(8, size(64, 1), size(vocab_size, 1000 + vocab_size % 2), dtype, group_size=4), DEVICE
    )
    ours = candidates(op, inputs, "triton")[OURS]  # type: ignore[arg-type]
    result = errors(op, ours, inputs, Exact.from_inputs(inputs))  # type: ignore[arg-type]
    assert result.ok, result


def test_views_of_model_size() -> None:
    """Rows that are strided, start anywhere and have an odd length are read in place."""
    base = torch.randn(2, size(513, 3), size(QWEN, 500) + 7, device=DEVICE).bfloat16()
    view = base[:, 1:, 3:-1]
    labels = torch.randint(view.shape[-1], view.shape[:2], device=DEVICE)
    logits = view.detach().requires_grad_()
    logprobs = token_logprobs(logits, labels, implementation="triton")
    (grad,) = torch.autograd.grad(logprobs.sum(), logits)
    rows = slice(-2, None)
    exact = view[:, rows].double().log_softmax(-1)
    picked = exact.gather(-1, labels[:, rows, None])[..., 0]
    assert (logprobs[:, rows] - picked).abs().max() <= 1e-5
    expected = -exact.exp()
    expected.scatter_add_(-1, labels[:, rows, None], torch.ones_like(picked)[..., None])
    assert (grad[:, rows].double() - expected).abs().max() <= 2**-8


@needs_gpu
def test_more_than_2_to_the_31_logits() -> None:
    """The last rows of 16,384 x 151,936, 5 GB."""
    logits = torch.empty(1, 16_384, QWEN, dtype=torch.bfloat16, device=DEVICE).normal_()
    labels = torch.randint(QWEN, logits.shape[:2], device=DEVICE)
    leaf = logits.requires_grad_()
    logprobs = token_logprobs(leaf, labels, implementation="triton")
    (grad,) = torch.autograd.grad(logprobs.sum(), leaf)
    exact = logits[:, -2:].detach().double().log_softmax(-1)
    assert (logprobs[:, -2:] - exact.gather(-1, labels[:, -2:, None])[..., 0]).abs().max() <= 1e-5
    expected = -exact.exp()
    expected.scatter_add_(-1, labels[:, -2:, None], torch.ones_like(expected[..., :1]))
    assert (grad[:, -2:].double() - expected).abs().max() <= 2**-8


def test_a_bad_label_is_not_read() -> None:
    labels = torch.tensor([[0, 10**12, -5]], device=DEVICE)
    logits = torch.randn(1, 3, 100, device=DEVICE, requires_grad=True)
    logprobs = token_logprobs(logits, labels)
    assert logprobs.isnan().tolist() == [[False, True, True]]
    logprobs.nansum().backward()
    torch.cuda.synchronize()


def loss_of(logits: Tensor, labels: Tensor, rewards: Tensor, groups: int | Tensor, **more: object) -> Tensor:
    loss = conspo_loss(logits, labels, rewards, groups, implementation="triton", **more)  # type: ignore[arg-type]
    assert isinstance(loss, Tensor)
    return loss


class Batch(NamedTuple):
    """Everything that a step is given; it lies on the device before the step begins."""

    logits: Tensor
    labels: Tensor
    rewards: Tensor
    ids: Tensor
    offsets: Tensor | None

    @classmethod
    def make(cls, where: str, packed: bool) -> Batch:
        """Rewards, ids and offsets on the CPU or "beside" the logits."""
        torch.manual_seed(0)
        vocab_size = size(10_000, 50)
        beside = DEVICE if where == "beside" else torch.device("cpu")
        sizes = (12,) if packed else (4, 3)
        return cls(
            logits=torch.randn(*sizes, vocab_size, device=DEVICE, requires_grad=True),
            labels=torch.randint(vocab_size, sizes, device=DEVICE),
            rewards=torch.tensor([1.0, 0.0, 0.0, 1.0], device=beside),
            ids=torch.tensor([3, 5, 3, 5], device=beside),
            offsets=torch.tensor([0, 3, 6, 9, 12], device=beside) if packed else None,
        )

    def step(self) -> tuple[Tensor, Tensor]:
        """One loss and gradient."""
        logits, labels, rewards, ids, offsets = self
        loss = loss_of(logits * 1, labels, rewards, ids, cu_seqlens=offsets, shift=True, margin=0.1)
        return loss, torch.autograd.grad(loss, logits)[0]


@contextlib.contextmanager
def no_waiting() -> Iterator[None]:
    """Within, what makes the host wait for the device is an error."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_waiting_is_seen() -> None:
    x = torch.ones(3, device=DEVICE)
    assert x.is_cuda
    assert not torch.zeros(3).is_cuda
    for wait in (lambda: x.sum().item(), lambda: x.nonzero(), lambda: torch.tensor([1.0], device=DEVICE), x.cpu):
        with no_waiting(), pytest.raises(RuntimeError, match="synchronizing"):
            wait()


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_rewards_ids_and_offsets_anywhere(packed: bool) -> None:
    for ours, other in zip(Batch.make("cpu", packed).step(), Batch.make("beside", packed).step(), strict=True):
        assert torch.equal(ours, other)


@pytest.mark.parametrize("where", ["cpu", "beside"])
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_no_synchronisation(packed: bool, where: str) -> None:
    """Everything warmed up: nothing waits, wherever rewards and ids lie."""
    batch = Batch.make(where, packed)
    batch.step()
    with no_waiting():
        loss, grad = batch.step()
    assert loss.isfinite()
    assert grad.isfinite().all()


class LinearBatch(NamedTuple):
    hidden: Tensor
    weight: Tensor
    labels: Tensor
    rewards: Tensor
    mode: str

    @classmethod
    def make(cls, mode: str) -> LinearBatch:
        """Everything beside the hidden states."""
        torch.manual_seed(0)
        vocab_size = size(10_000, 50)
        hidden = torch.randn(4, 3, 16, device=DEVICE, requires_grad=True)
        weight = torch.randn(vocab_size, 16, device=DEVICE, requires_grad=mode != "frozen")
        labels = torch.randint(vocab_size, (4, 3), device=DEVICE)
        return cls(hidden, weight, labels, torch.tensor([1.0, 0.0, 0.0, 1.0], device=DEVICE), mode)

    def step(self) -> tuple[Tensor, ...]:
        """One fused-linear loss and its gradients."""
        hidden, weight, labels, rewards, mode = self
        mib = {"store": 512, "recompute": 2.0**-10}.get(mode, 512)
        more = {"workspace_mib": mib, "implementation": "triton"}
        if mode == "known":
            loss = linear_weighted_score_loss(hidden, weight, labels, rewards - 0.5, **more)  # type: ignore[arg-type]
        else:
            loss = linear_conspo_loss(hidden, weight, labels, rewards, 2, **more)  # type: ignore[arg-type]
        assert isinstance(loss, Tensor)
        return loss, *torch.autograd.grad(loss, [x for x in (hidden, weight) if x.requires_grad])


@pytest.mark.parametrize("mode", ["recompute", "store", "known", "frozen"])
def test_fused_linear_without_synchronisation(mode: str) -> None:
    batch = LinearBatch.make(mode)
    before = batch.step()
    with no_waiting():
        result = batch.step()
    assert all(x.isfinite().all() for x in result)
    assert all(torch.equal(ours, other) for ours, other in zip(result, before, strict=True))


def test_another_stream() -> None:
    batch = Batch.make("beside", False)
    expected = batch.step()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        result = batch.step()
    torch.cuda.current_stream().wait_stream(stream)
    assert all(torch.equal(ours, other) for ours, other in zip(result, expected, strict=True))


SKIPPING = ("conspo_loss", "synchronize", "weighted_score_loss", "weighted_logprob_loss", "token_logprobs")


@needs_second_device
@pytest.mark.parametrize("call", SKIPPING)
@pytest.mark.parametrize("mode", ["store", "recompute", "frozen"])
def test_tokens_are_left_out_on_the_device_of_the_tensors(call: str, mode: str) -> None:
    """Whichever device is the current one: rewards, weights and offsets on the CPU say which tokens take part."""
    hidden, weight, labels, _rewards, _mode = LinearBatch.make(mode)
    masked = labels.index_fill(1, torch.zeros(1, dtype=torch.int64, device=DEVICE), -100)
    rewards, weights = torch.tensor([1.0, 0.0, 1.0, 1.0]), torch.tensor([0.5, 0.0, 0.0, -0.5])
    more: dict[str, Any] = {"workspace_mib": 512 if mode == "store" else 2.0**-10, "implementation": "triton"}

    def step() -> tuple[Tensor, ...]:
        if call == "conspo_loss":
            loss = linear_conspo_loss(hidden, weight, labels, rewards, 2, **more)
        elif call == "synchronize":
            loss = linear_conspo_loss(hidden, weight, masked, rewards.to(DEVICE), 2, synchronize=True, **more)
        elif call == "weighted_score_loss":
            loss = linear_weighted_score_loss(hidden, weight, labels, weights, **more)
        elif call == "weighted_logprob_loss":
            loss = linear_weighted_logprob_loss(hidden, weight, labels, weights[:, None].expand(4, 3), **more)
        else:
            loss = linear_token_logprobs(hidden, weight, masked, synchronize=True, **more).sum()
        return loss, *torch.autograd.grad(loss, [x for x in (hidden, weight) if x.requires_grad])

    expected = step()
    with torch.cuda.device(1):
        result = step()
    assert all(torch.equal(ours, other) for ours, other in zip(result, expected, strict=True))


@needs_second_device
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_logits_beside_another_current_device(packed: bool) -> None:
    batch, weights = Batch.make("cpu", packed), torch.tensor([0.5, 0.0, 0.0, -0.5])

    def step() -> tuple[Tensor, ...]:
        leaf = batch.logits.detach().requires_grad_()
        loss = weighted_score_loss(leaf, batch.labels, weights, cu_seqlens=batch.offsets, implementation="triton")
        loss = loss + token_logprobs(leaf, batch.labels, return_entropy=True, implementation="triton")[1].sum()
        return *batch.step(), loss, torch.autograd.grad(2 * loss, leaf)[0]

    expected = step()
    with torch.cuda.device(1):
        result = step()
    assert all(torch.equal(ours, other) for ours, other in zip(result, expected, strict=True))


def test_ids_in_pinned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """What goes to other ranks is first copied by the host: its owner may fill that memory again at once."""
    copied: list[int] = []
    scores, rewards = torch.randn(4, device=DEVICE), torch.tensor([1.0, 0.0, 0.0, 1.0], pin_memory=True)
    ids = torch.tensor([3, 5, 3, 5], pin_memory=True)

    class OneRank:
        size, rank = staticmethod(lambda: 1), staticmethod(lambda: 0)

    def staged(x: Tensor, dtype: torch.dtype) -> Tensor:
        copied.append(x.data_ptr())
        return stage(x, dtype)

    stage = devices.staged
    monkeypatch.setattr(devices, "staged", staged)
    monkeypatch.setattr(ranks, "resolved", lambda _: OneRank())
    monkeypatch.setattr(ranks.dist, "all_gather", lambda parts, x, group: parts[0].copy_(x))
    _scores, all_rewards, _counts, all_ids, _indices = ranks.gather_rollouts(scores, rewards, None, ids, 0, "", 1.0)
    assert torch.equal(all_ids.cpu(), ids)
    assert torch.equal(all_rewards.cpu(), rewards)
    assert ids.data_ptr() in copied


def captured(run: Callable[[], Outputs]) -> tuple[torch.cuda.CUDAGraph, Outputs]:
    """A graph of a call that has been warmed up, and the tensors that replays fill."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()
    return graph, result


def test_cuda_graph() -> None:
    """Loss and backward captured; margin, logits and rewards are live in replays."""
    vocab_size = size(1000, 50)
    logits = torch.randn(4, 8, vocab_size, device=DEVICE)
    labels = torch.randint(vocab_size, (4, 8), device=DEVICE)
    rewards = torch.tensor([1.0, 0.0, 0.0, 1.0], device=DEVICE)
    margin = torch.zeros((), device=DEVICE)

    def run() -> tuple[Tensor, ...]:
        leaf = logits.detach().requires_grad_()
        loss = loss_of(leaf, labels, rewards, 2, margin=margin)
        return loss.detach(), torch.autograd.grad(loss, leaf)[0]

    graph, result = captured(run)
    margin.fill_(0.7)
    logits.mul_(1.5)
    rewards.copy_(1 - rewards)
    graph.replay()
    assert all(torch.equal(ours, other) for ours, other in zip(result, run(), strict=True))


def test_cuda_graph_of_packed_ids() -> None:
    """Ids and offsets on the device are live too."""
    batch = Batch.make("beside", True)

    def run() -> tuple[Tensor, ...]:
        loss, grad = batch.step()
        return loss.detach(), grad

    graph, result = captured(run)
    assert batch.offsets is not None
    batch.offsets.copy_(torch.tensor([0, 2, 6, 9, 11], device=DEVICE))
    batch.ids.copy_(torch.tensor([1, 1, 2, 2], device=DEVICE))
    graph.replay()
    assert all(torch.equal(ours, other) for ours, other in zip(result, run(), strict=True))


@pytest.mark.parametrize("mode", ["recompute", "store", "known", "frozen"])
def test_cuda_graph_of_hidden_states(mode: str) -> None:
    batch = LinearBatch.make(mode)

    def run() -> tuple[Tensor, ...]:
        return tuple(x.detach() for x in batch.step())

    graph, result = captured(run)
    batch.rewards.copy_(1 - batch.rewards)
    batch.hidden.detach().mul_(1.5)
    graph.replay()
    assert all(torch.equal(ours, other) for ours, other in zip(result, run(), strict=True))


ON_CPU = ("rewards", "ids", "offsets", "weights", "coefficients", "rollouts left out")


@pytest.mark.parametrize("what", ON_CPU)
def test_cuda_graph_of_the_host(what: str) -> None:
    """What lies on the CPU would have the values of the capture in every replay: it raises."""
    batch, linear = Batch.make("beside", what == "offsets"), LinearBatch.make("store")
    logits, labels, rewards, ids, _offsets = batch
    on_cpu: dict[str, Tensor] = {"rewards": rewards.cpu(), "ids": ids.cpu(), "weights": rewards.cpu() - 0.5}
    on_cpu |= {"coefficients": torch.ones(labels.shape), "offsets": torch.tensor([0, 3, 6, 9, 12])}
    calls: dict[str, Callable[[], Any]] = {
        "rewards": lambda: loss_of(logits, labels, on_cpu["rewards"], ids),
        "ids": lambda: loss_of(logits, labels, rewards, on_cpu["ids"]),
        "offsets": lambda: loss_of(logits, labels, rewards, ids, cu_seqlens=on_cpu["offsets"]),
        "weights": lambda: weighted_score_loss(logits, labels, on_cpu["weights"]),
        "coefficients": lambda: weighted_logprob_loss(logits, labels, on_cpu["coefficients"]),
        "rollouts left out": lambda: linear_weighted_score_loss(*linear[:3], on_cpu["weights"]),
    }
    calls[what]()
    with pytest.raises(ValueError, match="while it is captured"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        calls[what]()


@pytest.mark.parametrize("op", TIMED, ids=lambda op: op.name)
def test_memory(op: object) -> None:
    """Beyond the gradient, where it is new: a few numbers per token and chunk of its row."""
    inputs = Inputs.from_shape(Shape(4, size(256, 4), size(QWEN, 5000), torch.bfloat16, group_size=4), DEVICE)
    ours = candidates(op, inputs, "triton")[OURS]  # type: ignore[arg-type]
    timed = call(op, ours, inputs)  # type: ignore[arg-type]
    timed.run(timed.prepare())
    gradient = 0 if op.inplace or not op.backward else inputs.logits.nbytes  # type: ignore[attr-defined]
    assert peak_bytes(timed, DEVICE) <= gradient + inputs.labels.numel() * 256 + 2**14


def test_gradcheck_command(capsys: pytest.CaptureFixture[str]) -> None:
    # Interpreted, test_commands.py has every function in every dtype.
    what = ["--shape", "small", "wide", "model"] if ON_GPU else ["--op", "linear_conspo_loss", "--dtype", "bf16"]
    assert main(["gradcheck", "--device", DEVICE.type, "--implementation", "triton", "--json", *what]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["triton_interpreted"] is not ON_GPU
