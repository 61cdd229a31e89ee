"""The table of launches covers what is compiled for, every candidate is right, and the search times each of them."""

from __future__ import annotations

import pytest
import torch

from benchmarks import autotune
from benchmarks.autotune import CANDIDATES, KERNELS, forced, search
from benchmarks.compiled import TARGETS
from conspo_kernels import token_logprobs
from conspo_kernels.backends.triton import launch as launches
from conspo_kernels.backends.triton.launch import TABLE, Launch, family

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(params=list(TARGETS))
def target(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(launches, "architecture", lambda _: request.param)
    return str(request.param)


def test_table(target: str) -> None:
    """A row for each target, of what a search may find too; a tile is a whole number of loads."""
    row = TABLE[family(DEVICE)]
    assert set(row) == {*KERNELS, "heavy forward", "forward_backward"}
    assert {row[kernel] for kernel in KERNELS} <= set(CANDIDATES)
    wave = 64 if target.startswith("gfx") else 32
    assert row["forward_backward"].num_warps * wave == 1024


def test_tiles_are_whole_loads() -> None:
    assert all(launch.lanes % (32 * launch.num_warps) == 0 for launch in CANDIDATES)


@pytest.mark.parametrize("launch", CANDIDATES, ids=str)
def test_candidates(launch: Launch) -> None:
    """Rows longer than a tile and shorter, with edges; values and gradients as PyTorch has them."""
    for vocab_size, softcap in ((9001, None), (37, 5.0)):
        logits = torch.randn(1, 2, vocab_size, device=DEVICE, requires_grad=True)
        labels = torch.randint(vocab_size, (1, 2), device=DEVICE)
        result = []
        for implementation in ("triton", "torch"):
            with forced("forward", launch, DEVICE), forced("backward", launch, DEVICE), forced("heavy", launch, DEVICE):
                logprobs = token_logprobs(logits, labels, softcap=softcap, implementation=implementation)
                result.append((logprobs, *torch.autograd.grad(logprobs.sum(), logits)))
        for ours, theirs in zip(*result, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kernel", KERNELS)
def test_search(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With made-up times: each candidate is run as it is named, and nothing stays forced."""
    monkeypatch.setattr(autotune, "SCRATCH_BYTES", 100)
    launched: list[Launch] = []

    def seconds(run: object) -> float:
        run()  # type: ignore[operator]
        launched.append(TABLE[family(DEVICE)][kernel])
        return 1.0 if launched[-1] == Launch(512, 8) else 2.0

    monkeypatch.setattr(autotune, "seconds", seconds)
    before = TABLE[family(DEVICE)][kernel]
    times = search(kernel, 33, torch.float32, DEVICE)
    assert launched == list(times) == list(CANDIDATES)
    assert TABLE[family(DEVICE)][kernel] == before


def test_the_row_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    times = dict.fromkeys(CANDIDATES, 2.0) | {Launch(512, 8): 1.0}
    monkeypatch.setattr(autotune, "search", lambda *_: times)
    lines = [line.partition("  # ms: ") for line in autotune.row(33, torch.float32, DEVICE)]
    assert [line for line, *_ in lines] == [f'"{kernel}": Launch(512, 8),' for kernel in KERNELS]
    assert all("(512, 8) 1000.000" in comment for *_, comment in lines)
