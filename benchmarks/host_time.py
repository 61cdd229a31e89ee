"""What a call costs the host: a batch so small that dispatch, checks and the autograd graph are all that is timed.

8 rollouts x 16 tokens x V 64 on one CPU thread, forward and backward, beside the same loss in eager PyTorch.

`--launches`: what it costs the host of a GPU, whose launches are stubbed: kernels are specialised, looked up and
launched as there, but for the driver's last call. By the table of `backends/triton/direct.py`, and by Triton alone.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.timing.measure import Call, interleaved
from conspo_kernels import conspo_loss, linear_conspo_loss, linear_weighted_score_loss, weighted_score_loss

EAGER = "eager from logits"
OURS = "conspo_kernels"
ROLLOUTS, LENGTH, VOCAB, HIDDEN, GROUP = 8, 16, 64, 32, 4
REPEATS = 200  # of a few hundred microseconds
STEPS = 20  # that are timed at once, where a processor's clock is read
# Of the time of eager PyTorch.
LIMITS = {"conspo_loss": 1.4, "linear_conspo_loss": 2.7, "linear_weighted_score_loss": 1.8, "weighted_score_loss": 1.4}


def losses() -> dict[str, Callable[[], Tensor]]:
    """Each loss of one tiny batch; the leaves are the same in every call."""
    generator = torch.Generator().manual_seed(0)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator).requires_grad_()

    logits, hidden, weight = draw(ROLLOUTS, LENGTH, VOCAB), draw(ROLLOUTS, LENGTH, HIDDEN), draw(VOCAB, HIDDEN)
    labels = torch.randint(VOCAB, (ROLLOUTS, LENGTH), generator=generator)
    rewards, weights = torch.tensor([1.0, 0, 0, 1, 0, 1, 1, 0]), torch.linspace(-1, 1, ROLLOUTS)
    positive = rewards.view(-1, GROUP) > 0.5

    def eager() -> Tensor:
        logprobs = torch.log_softmax(logits, -1).gather(-1, labels[..., None])[..., 0]
        scores = logprobs.mean(1).view(-1, GROUP)
        negatives = torch.where(positive, -torch.inf, scores).logsumexp(1, keepdim=True)
        return ((F.softplus(negatives - scores) * positive).sum(1) / positive.sum(1)).mean()

    return {
        EAGER: eager,
        "conspo_loss": lambda: conspo_loss(logits, labels, rewards, GROUP),
        "linear_conspo_loss": lambda: linear_conspo_loss(hidden, weight, labels, rewards, GROUP),
        "linear_weighted_score_loss": lambda: linear_weighted_score_loss(hidden, weight, labels, weights),
        "weighted_score_loss": lambda: weighted_score_loss(logits, labels, weights),
    }


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def measure_host(repeats: int = REPEATS) -> Iterator[dict[str, Any]]:
    """A row per loss, and one for eager PyTorch; `times_eager` is what the limits are about."""

    def step(loss: Callable[[], Tensor]) -> Call:
        return Call(lambda: None, lambda _: loss().backward())

    with one_thread():
        calls = {name: step(loss) for name, loss in losses().items()}
        timings = interleaved(calls, torch.device("cpu"), repeats, warmups=20)
    for name, timing in timings.items():
        ratio = timing.median / timings[EAGER].median
        row = {
            "op": f"host time, {name}", "shape": f"{ROLLOUTS} x {LENGTH} x {VOCAB}, one thread", "dtype": "float32",
            "provider": EAGER if name == EAGER else OURS, "plain": True, "status": "timed", "ok": True,
            "times_eager": ratio, **timing.fields(),
        }  # fmt: skip
        if name != EAGER:
            row["note"] = f"{ratio:.2f} of eager PyTorch's time, limit {LIMITS[name]}"
        yield row


def measure_launches(repeats: int = REPEATS) -> Iterator[tuple[str, float, float]]:
    """The loss, and microseconds of a processor for a step: launched directly, and by Triton."""
    from benchmarks.simulation.stubbed_driver import Driver, stubbed
    from conspo_kernels.backends import registry
    from conspo_kernels.ops import label_alignment

    def step(directly: bool, loss: Callable[[], Tensor]) -> float:
        with stubbed(driver, directly):
            loss().backward()  # "auto" is chosen anew
            started = time.process_time()
            for _ in range(STEPS):
                loss().backward()
        return (time.process_time() - started) / STEPS * 1e6

    driver = Driver()
    # Nothing writes the labels, which would be looked at on a CPU.
    on_gpu = (
        mock.patch.dict(registry.PREFERRED, cpu="triton"), mock.patch.object(label_alignment, "NOT_CHECKED", VOCAB)
    )  # fmt: skip
    with one_thread(), on_gpu[0], on_gpu[1]:
        for name in ("conspo_loss", "weighted_score_loss"):
            loss = losses()[name]
            samples = [(step(True, loss), step(False, loss)) for _ in range(repeats // STEPS + 1)][1:]
            yield name, statistics.median(a for a, _ in samples), statistics.median(b for _, b in samples)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--launches", action="store_true", help="of a GPU's host, launches stubbed")
    if parser.parse_args().launches:
        for name, directly, by_triton in measure_launches():
            print(f"{name:40} {directly:7.0f} us, by Triton {by_triton:7.0f} us: {directly / by_triton:.2f}")
        return
    for row in measure_host():
        print(f"{row['op']:40} {row['seconds']['median'] * 1e6:7.0f} us  {row['times_eager']:.2f}")


if __name__ == "__main__":
    main()
