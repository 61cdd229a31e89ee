"""The compiled kernels, executed on the CPU by `ptx_executor`: values, gradients, and planted faults.

What is executed stands in `executed.py`, which runs in processes of its own.
"""

from __future__ import annotations

import json
import re
from typing import Any

import executed
import pytest
import torch
import triton
from processes import REPOSITORY, python

from benchmarks.compiled import CASES
from ptx_executor.driver import TARGETS

# Of a gradient, relative to the largest of its row: a rounding to its dtype.
GRADIENT = {"bf16": 2.0**-8, "fp32": 1e-6, "fp64": 1e-12}


def run(*arguments: str) -> Any:
    return json.loads(python("tests/support/executed.py", *arguments))


@pytest.mark.parametrize("target", TARGETS)
def test_every_kernel_in_every_case(target: str) -> None:
    result = run("cases", target)
    assert result.keys() == CASES.keys()
    for case, row in result.items():
        dtype, errors = case.removeprefix("known, ")[:4], dict(row["errors"])
        if ", V " in case:
            three = ["_statistics_kernel", "_combine_kernel", "_backward_kernel"]
            assert row["kernels"] == (["_forward_backward_kernel"] if case.startswith("known") else three), case
            assert errors.pop("gradient") <= GRADIENT[dtype], (case, row)
            assert all(error <= (1e-12 if dtype == "fp64" else 1e-5) for error in errors.values()), (case, row)
            assert len(errors) == (2 if "entropy" in case else 1)
        else:
            expected = ["_forward_kernel", "_backward_kernel"] if case in ("padded", "packed") else ["_kernel"]
            assert row["kernels"] == expected, case
            assert all(error <= 1e-6 for error in errors.values()), (case, row)


def test_every_row_of_the_versions_executes_compiled_cases() -> None:
    """Each Triton writes another PTX: `make versions` runs what it writes for every case, in bf16 and fp32."""
    text = (REPOSITORY / "noxfile.py").read_text(encoding="utf-8")
    step = re.search(r'"executed": \((.*?)\{(.*?)\},\n', text, re.DOTALL)
    assert step is not None
    assert '"--implementation", "triton", "--compiled", "sm_90", "--dtype", "bf16", "fp32"' in step[1]
    assert "TRITON_INTERPRET" not in step[2]
    assert set(re.findall(r'nox\.param\("[\d.]+", "([\d.]+)"', text)) >= {"3.6.0", "3.7.1", "3.8.0", "3.9.0"}


def test_machine_code_in_the_cache_is_not_executed() -> None:
    """Its PTX is, where that is asked for; where it is not, the kernels are compiled without machine code."""
    assert run("compiled_before", "sm_90") == [2, 2, 4]


def test_planted_faults() -> None:
    result = run("faults")
    assert result["none"] == ""
    assert "global load: outside of the memory that was passed" in result["mask"]
    assert "20004 bytes from the start of logits_ptr, which has 20004" in result["mask"]
    assert "global load: address not a multiple of 16" in result["hint"]
    assert result["constant"] > 100 * GRADIENT["fp32"] > 100 * result["no constant"] / 10
    assert len(result["barriers, over"]) == 3  # of the last logits of a row, of the tile with a part, of whole tiles
    assert all("memory race" in fault for fault in result["barriers, over"])
    release = tuple(map(int, triton.__version__.split(".")[:2]))
    for kernel in ("statistics", "scores"):
        assert len(result[f"barriers, {kernel}"]) == (3 if release >= (3, 8) else 5)  # 3.8 merges sums with fewer
        for fault in result[f"barriers, {kernel}"]:  # without any one of them
            assert "shared memory race" in fault
            assert "no barrier between them" in fault


@pytest.mark.parametrize("target", ["sm_100"])
def test_hostile_inputs(target: str) -> None:
    """Odd sizes and strides, all dtypes, in place, nothing at all; approximate instructions are perturbed."""
    gradients = {"bfloat16": 2.0**-8, "float16": 2.0**-11, "float32": 2e-6, "float64": 1e-13}
    for row in run("hostile", target):
        assert row["untouched"], row  # what lies around the rows
        errors = dict(row["errors"])
        assert errors.pop("gradient") <= gradients[row["dtype"]], row
        assert all(error <= (1e-13 if row["dtype"] == "float64" else 1e-5) for error in errors.values()), row


@pytest.mark.parametrize("target", ["sm_90"])
def test_lanes_that_hold_a_row_agree_on_its_last_bit(target: str) -> None:
    """5, 10 and 19 chunks, without and with entropy. Where a compiler may fuse products with sums, `_rounded` keeps it
    from it: a product that is unrounded on one side of a shuffle only is a fault of the executor.
    """
    assert run("combines", target) == {"launched": [""] * 6, "fused": [""] * 6}
    assert run("reductions", target) == [""] * 4


def check_far_labels(result: dict[str, list[float]]) -> None:
    for vocab_size, (numbers, error, largest) in result.items():
        assert numbers == 0, vocab_size  # all are NaN
        assert error <= 2.0**-9, vocab_size  # of probabilities, in bf16
        assert largest <= 0, vocab_size  # no entry has the label's own term


def test_labels_beyond_32_bits() -> None:
    """2^40 + 3 is no lane 3: in the executor, and where the tests run Triton's kernels."""
    check_far_labels(run("far_labels_executed", "sm_90"))
    check_far_labels(executed.far_labels("cuda" if torch.cuda.is_available() else "cpu"))
