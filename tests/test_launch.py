"""The table of launches covers what is compiled for, every candidate is right, and the search takes the fastest."""

from __future__ import annotations

import pytest
import torch

from benchmarks.compiled import TARGETS
from conspo_kernels import token_logprobs
from conspo_kernels.backends.triton import launch as launches
from conspo_kernels.backends.triton.launch import CANDIDATES, TABLE, Launch, forced, launch_of, search

KERNELS = ("forward", "backward", "heavy")


def test_table() -> None:
    """A row per target, for each kernel, of what a search may find too; a tile is a whole number of loads."""
    assert set(TABLE) == set(TARGETS)
    for row in TABLE.values():
        assert set(row) == set(KERNELS)
        assert set(row.values()) <= set(CANDIDATES)
    assert all(launch.lanes % (32 * launch.num_warps) == 0 for launch in CANDIDATES)


@pytest.mark.parametrize("launch", CANDIDATES, ids=str)
def test_candidates(launch: Launch) -> None:
    """Rows longer than a tile and shorter, with edges; values and gradients as PyTorch has them."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for vocab_size, softcap in ((9001, None), (37, 5.0)):
        logits = torch.randn(1, 2, vocab_size, device=device, requires_grad=True)
        labels = torch.randint(vocab_size, (1, 2), device=device)
        result = []
        for implementation in ("triton", "torch"):
            with forced(launch):
                logprobs = token_logprobs(logits, labels, softcap=softcap, implementation=implementation)
                result.append((logprobs, *torch.autograd.grad(logprobs.sum(), logits)))
        for ours, theirs in zip(*result, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_nothing_is_searched_unless_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launches, "search", lambda *_: pytest.fail("searched"))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    monkeypatch.delenv("CONSPO_AUTOTUNE", raising=False)
    assert launch_of("forward", torch.zeros(1, device=device)) in CANDIDATES
    monkeypatch.setenv("CONSPO_AUTOTUNE", "1")
    assert launch_of("forward", torch.zeros(1)) == TABLE["sm_90"]["forward"]  # there is nothing to time on a CPU


@pytest.mark.parametrize("kernel", KERNELS)
def test_search(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With made-up times: each candidate is run as it is named, the fastest is kept, no random number is used up."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    monkeypatch.setattr(launches, "SCRATCH_BYTES", 100)
    launched: list[Launch] = []

    def seconds(run: object) -> float:
        run()  # type: ignore[operator]
        launched.append(launch_of(kernel, torch.zeros(1)))
        return 1.0 if launched[-1] == Launch(512, 8) else 2.0

    monkeypatch.setattr(launches, "seconds", seconds)
    state = torch.get_rng_state()
    search.cache_clear()
    for _ in range(2):
        assert search(kernel, 33, torch.float32, device) == Launch(512, 8)
    search.cache_clear()
    assert launched == list(CANDIDATES)
    assert torch.equal(torch.get_rng_state(), state)
