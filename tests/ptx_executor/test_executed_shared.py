"""The tests that all implementations share, with Triton's kernels compiled and executed on the CPU.

Of the files in `conftest.EXECUTED` Triton's cases run here and not under the interpreter.
"""

from __future__ import annotations

import re

import pytest
from conftest import EXECUTED
from processes import REPOSITORY, python

# One process for a target: cases share its kernels, parsed and compiled, and what it imports.
GROUPS = (
    ("sm_90", ("test_linear.py", "test_loss.py", "test_margin.py", "test_objective.py")),
    ("sm_100", ("test_inplace.py", "test_ops.py", "test_policy_gradient.py", "test_token_logprob.py")),
)


def test_nothing_is_spared_that_is_not_executed() -> None:
    assert {file for _, files in GROUPS for file in files} == EXECUTED


@pytest.mark.parametrize(("target", "files"), GROUPS, ids=[files[0] for _, files in GROUPS])
def test_shared_cases(target: str, files: tuple[str, ...]) -> None:
    paths = [str(next(REPOSITORY.glob(f"tests/*/{file}"))) for file in files]
    options = ("-q", "-p", "no:cacheprovider", "-k", "triton")
    output = python("-m", "pytest", *options, *paths, CONSPO_COMPILED=target, CUDA_VISIBLE_DEVICES="")
    closing = output.splitlines()[-1]
    passed = re.match(r"(\d+) passed, \d+ deselected", closing)  # and none was skipped
    assert passed is not None, closing
    assert int(passed.group(1)) >= 60, closing
