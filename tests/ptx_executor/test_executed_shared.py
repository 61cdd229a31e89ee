"""The tests that all implementations share, with Triton's kernels compiled and executed on the CPU.

Of the files in `conftest.EXECUTED` Triton's cases run here and not under the interpreter.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
from conftest import EXECUTED
from processes import REPOSITORY

# One process for a target: cases share its kernels, parsed and compiled, and what it imports.
GROUPS = (
    ("sm_90", ("test_linear.py", "test_loss.py", "test_margin.py", "test_objective.py")),
    ("sm_100", ("test_inplace.py", "test_ops.py", "test_policy_gradient.py", "test_token_logprob.py")),
)


def test_nothing_is_spared_that_is_not_executed() -> None:
    assert {file for _, files in GROUPS for file in files} == EXECUTED


@pytest.mark.parametrize(("target", "files"), GROUPS, ids=[files[0] for _, files in GROUPS])
def test_shared_cases(target: str, files: tuple[str, ...]) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment |= {"CONSPO_COMPILED": target, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "triton"]
    result = subprocess.run(
        [*command, *(str(next(REPOSITORY.glob(f"tests/*/{file}"))) for file in files)],
        capture_output=True, text=True, env=environment, cwd=REPOSITORY, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    closing = result.stdout.splitlines()[-1]
    passed = re.match(r"(\d+) passed, \d+ deselected", closing)  # and none was skipped
    assert passed is not None, closing
    assert int(passed.group(1)) >= 60, closing
