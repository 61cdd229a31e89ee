"""Operations of the fused-linear functions, as `FlopCounterMode` counts them, held against the GEMMs that are made."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import conspo_kernels as ck
from conspo_kernels.ops import registration
from conspo_kernels.ops.linear_logprob import linear_logprob
from conspo_kernels.values import LogitTransform

ROLLOUTS, LENGTH, HIDDEN, VOCAB = 4, 5, 6, 50
PRODUCTS = {"mm", "addmm", "addmm_"}
TILES = {"workspace_mib": 2.0**-10}


class Gemms(TorchDispatchMode):
    """Operations of the products that PyTorch is asked for."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.__name__.partition(".")[0] in PRODUCTS:
            a, b = [x for x in args if isinstance(x, Tensor) and x.dim() == 2][-2:]
            self.total += 2 * a.shape[0] * a.shape[1] * b.shape[1]
        return func(*args, **(kwargs or {}))


REWARDS = torch.tensor([1.0, 0.0, 1.0, 1.0])  # the second group is not valid
WEIGHTS = torch.tensor([0.5, 0.0, 0.0, -0.5])
CALLS: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "none": lambda x, w, b, y: ck.linear_token_logprobs(x.detach(), w.detach(), y) + x.sum(),  # type: ignore[operator]
    "store": lambda x, w, b, y: ck.linear_token_logprobs(x, w, y, bias=b),
    "store, groups": lambda x, w, b, y: ck.linear_conspo_loss(x, w, y, REWARDS, 2),
    "recompute": lambda x, w, b, y: ck.linear_token_logprobs(x, w, y, **TILES),
    "recompute, groups": lambda x, w, b, y: ck.linear_conspo_loss(x, w, y, REWARDS, 2, bias=b, **TILES),
    "recompute, few gradients": lambda x, w, b, y: ck.linear_token_logprobs(x, w, y, **TILES)[:2],  # type: ignore[index]
    "into a buffer": lambda x, w, b, y: ck.linear_token_logprobs(x, w, y, weight_grad=torch.zeros(VOCAB, HIDDEN)),
    "invariant": lambda x, w, b, y: ck.linear_token_logprobs(x, w, y, batch_invariant=True, **TILES),
    "frozen": lambda x, w, b, y: ck.linear_token_logprobs(x, w.detach(), y),
    "frozen, invariant": lambda x, w, b, y: ck.linear_token_logprobs(x, w.detach(), y, batch_invariant=True, **TILES),
    "head alone": lambda x, w, b, y: ck.linear_token_logprobs(x.detach(), w, y),
    "known": lambda x, w, b, y: ck.linear_weighted_score_loss(x, w, y, WEIGHTS, bias=b, **TILES),
    "known, frozen": lambda x, w, b, y: ck.linear_weighted_score_loss(x, w.detach(), y, WEIGHTS),
    "known, into a buffer": lambda x, w, b, y: ck.linear_weighted_score_loss(
        x, w, y, WEIGHTS, weight_grad=torch.zeros(VOCAB, HIDDEN)
    ),
}  # type: ignore[dict-item]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_counted_as_made(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    labels = torch.randint(VOCAB, (ROLLOUTS, LENGTH))
    labels[:, 0] = -100
    leaves = [
        torch.randn(*size).to(dtype).requires_grad_()
        for size in ((ROLLOUTS, LENGTH, HIDDEN), (VOCAB, HIDDEN), (VOCAB,))
    ]

    def step() -> None:
        CALLS[name](*leaves, labels).sum().backward()

    with FlopCounterMode(display=False) as counter:
        step()
    monkeypatch.setattr(registration, "_dispatch_modes", lambda: 0)  # the ops' insides are seen
    with Gemms() as gemms:
        step()
    assert counter.get_total_flops() == gemms.total > 0


def test_tokens_at_places() -> None:
    """On a GPU the host says which tokens take part."""
    hidden, weight = torch.empty(20, HIDDEN, device="meta"), torch.empty(VOCAB, HIDDEN, device="meta")
    labels, places = torch.empty(20, dtype=torch.int64, device="meta"), torch.empty(7, dtype=torch.int64, device="meta")
    transform = LogitTransform().to_numbers()
    for given, number in ((None, 20), (places, 7)):
        with FlopCounterMode(display=False) as counter:
            linear_logprob(
                hidden, weight, None, labels, given, None, torch.float32, transform, False, "none", 2**20, "torch", 0,
                "", False,
            )  # fmt: skip
        assert counter.get_total_flops() == 2 * number * VOCAB * HIDDEN


LATER = """
import sys
import torch
import conspo_kernels as ck
assert "torch.utils.flop_counter" not in sys.modules and "triton" not in sys.modules
from torch.utils.flop_counter import FlopCounterMode, flop_registry
for _ in range(2):
    with FlopCounterMode(display=False) as counter:
        ck.linear_token_logprobs(torch.randn(3, 4), torch.randn(5, 4), torch.zeros(3, dtype=torch.long))
    assert counter.get_total_flops() == 2 * 3 * 4 * 5
assert torch.ops.conspo.linear_logprob in flop_registry
"""


def test_a_counter_that_is_imported_later() -> None:
    """Importing the library imports neither the counter nor Triton, and the first count is right."""
    result = subprocess.run([sys.executable, "-c", LATER], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
