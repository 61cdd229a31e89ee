"""Softcaps in the compiled kernels: the PTX is executed, its approximate instructions off by as much as they may be."""

from __future__ import annotations

import json

import pytest
from processes import python

SOFTCAPS = (20.0, 30.0, 50.0, 1000.0)

# sm_80: sm_90 does the same arithmetic. "up" and "down" move every approximate result by its whole allowed error.
EXECUTED = """
import json, sys
import torch
from conspo_kernels import token_logprobs
from ptx_executor import compiled

dtype = getattr(torch, sys.argv[1])
rows, vocab_size = 8, 531

def evaluate(logits, accumulate, softcap):
    y = softcap * torch.tanh(logits.to(accumulate) / softcap)
    logp = torch.where(logits == -torch.inf, -torch.inf, y).log_softmax(-1)
    return logp.gather(-1, labels[..., None])[..., 0], -(logp.exp() * logp.masked_fill(logp == -torch.inf, 0)).sum(-1)

found = []
for softcap in (20.0, 30.0, 50.0, 1000.0):
    torch.manual_seed(0)
    labels = torch.randint(0, vocab_size, (1, rows))
    at_label = labels[..., None]
    flat = torch.rand(1, rows, vocab_size) * 100 - 50
    peaked = (torch.randn(1, rows, vocab_size) * 2).scatter(-1, at_label, torch.rand(1, rows, 1) * 35 + 15)
    pair = torch.full((1, rows, vocab_size), -50.0).scatter(-1, at_label, torch.rand(1, rows, 1) * 100 - 50)
    pair[..., 7] = torch.rand(rows) * 100 - 50
    masked = flat.clone()
    masked[..., ::3] = -torch.inf
    cases = {
        "flat": flat,
        "peaked": peaked,
        "pair": pair,
        "small": torch.randn(1, rows, vocab_size) * 0.3,
        "masked": masked.scatter(-1, at_label, 3.0),
        "saturated": flat.sign() * softcap * 3,
    }
    for name, logits in cases.items():
        logits = logits.to(dtype)
        leaf = logits.double().requires_grad_()
        exact = evaluate(leaf, torch.float64, softcap)
        (exact_grad,) = torch.autograd.grad(exact[0].sum() + 0.1 * exact[1].sum(), leaf)
        eager = evaluate(logits, torch.float32, softcap)
        for perturb in (1, "up", "down"):
            z = logits.clone().requires_grad_()
            with compiled("sm_80", perturb=perturb, races=False):
                actual = token_logprobs(z, labels, softcap=softcap, return_entropy=True, implementation="triton")
                (grad,) = torch.autograd.grad(actual[0].sum() + 0.1 * actual[1].sum(), z)
            # 1 - p of a label with p = 1 - 1e-7 is p's own error, eager's too: 4 units of ex2's allowed one
            wrong = ((grad.double() - exact_grad).abs() - 2**-20).relu() / exact_grad.abs().amax(-1, keepdim=True)
            found.append({
                "softcap": softcap, "name": name, "perturb": perturb,
                "errors": [(a - e).abs().max().item() for a, e in zip(actual, exact)],
                "eager": [(a - e).abs().max().item() for a, e in zip(eager, exact)],
                "size": [e.abs().max().item() for e in exact],
                "above": actual[0].max().item(), "grad": wrong.max().item(),
                "masked": grad[logits == -torch.inf].abs().sum().item(),
            })
print(json.dumps(found))
"""


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_accuracy_of_softcaps(dtype: str) -> None:
    """|logits| <= 50. Twice eager's error counts in fp32: in bf16 eager is off by 0.1."""
    rows = json.loads(python("-c", EXECUTED, dtype))
    assert len(rows) == len(SOFTCAPS) * 6 * 3
    for row in rows:
        for error, eager, size in zip(row["errors"], row["eager"], row["size"], strict=True):
            floor = 8 * 2**-23 * max(1.0, size)  # as in tolerance.py
            assert error <= 2 * eager + floor or error <= 1e-5, row
        if row["softcap"] <= 50:
            assert row["errors"][0] <= 1e-5, row
        assert row["above"] <= 1e-6, row  # log2 of 1, off by its own allowed error
        assert row["grad"] <= (2**-8 if dtype == "bfloat16" else 1e-5), row
        assert row["masked"] == 0, row
