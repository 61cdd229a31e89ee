"""The example of a training loop: DDP and FSDP2, with accumulation, give the gradient of one process and one batch."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import ranks
import torch
from torch import Tensor

REPOSITORY = Path(__file__).resolve().parents[2]
NUM_ROLLOUTS = 14
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


RUNS = [(parallel, micro_batch) for parallel in ("ddp", "fsdp2") for micro_batch in (2, 7)]


@functools.cache
def on_ranks() -> dict[tuple[str, int], list[tuple[Tensor, dict[str, Tensor]]]]:
    """What each run gives on each of two ranks; the processes are started once for all of them."""
    result = ranks.run(2, several)
    return {run: [of_rank[i] for of_rank in result] for i, run in enumerate(RUNS)}


def several(rank: int, size: int) -> list[tuple[Tensor, dict[str, Tensor]]]:
    return [gradients(rank, size, parallel, micro_batch) for parallel, micro_batch in RUNS]


def gradients(rank: int, size: int, parallel: str, micro_batch: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Of the step's loss, after the trainer's own reduction."""
    sys.path.insert(0, str(REPOSITORY / "examples"))
    import custom_loop

    torch.manual_seed(0)
    model = custom_loop.wrapped(custom_loop.Policy().double(), parallel if size > 1 else "")
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(custom_loop.LETTERS, (NUM_ROLLOUTS, 6), generator=generator)
    lengths = torch.randint(2, 7, (NUM_ROLLOUTS, 1), generator=generator)
    mask = (torch.arange(6) >= 2) & (torch.arange(6) < lengths)
    rewards = torch.randint(0, 2, (NUM_ROLLOUTS,), generator=generator).double()
    prompt_ids = torch.randint(0, 3, (NUM_ROLLOUTS,), generator=generator)
    places = torch.randperm(NUM_ROLLOUTS, generator=generator)[rank::size]
    loss, _metrics = custom_loop.accumulate(
        model, ids[places], mask[places], rewards[places], prompt_ids[places], micro_batch, 0.3
    )
    grads = {}
    for name, parameter in model.named_parameters():
        grad = parameter.grad
        assert grad is not None, name
        grads[name.removeprefix("module.")] = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
    return loss, grads


@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
def test_gradients_of_ranks_are_those_of_one_process(parallel: str) -> None:
    torch.use_deterministic_algorithms(False)
    loss, grads = gradients(0, 1, "", NUM_ROLLOUTS)
    for micro_batch in (2, 7):
        for value, result in on_ranks()[parallel, micro_batch]:
            assert (value - loss).abs() <= 1e-12
            assert result.keys() == grads.keys()
            for name, exact in grads.items():
                assert (result[name] - exact).abs().max() <= 1e-12 * max(1.0, exact.abs().max().item()), name


@pytest.mark.parametrize(
    ("launcher", "options"),
    [([], []), (TORCHRUN, []), (TORCHRUN, ["--parallel", "fsdp2"])],
    ids=["one process", "ddp", "fsdp2"],
)
def test_it_runs(launcher: list[str], options: list[str]) -> None:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, *launcher, "examples/custom_loop.py", "--steps", "2", *options], stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, cwd=REPOSITORY, env=environment, start_new_session=True,
    )  # fmt: skip
    try:
        out, err = process.communicate(timeout=ranks.LIMIT)
    finally:
        with contextlib.suppress(ProcessLookupError):  # the launcher's children too, if any are left
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, err
    assert "step   1  solved" in out
