"""A test that is skipped because something is missing fails where CI judges; one that needs a GPU does not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = """
import pytest

@pytest.mark.skipif(True, reason="needs a GPU")
def test_of_a_gpu(): ...

def test_of_a_package():
    pytest.importorskip("no_such_package")

@pytest.mark.leave_out(where=lambda parameters: parameters["x"] == 1)
@pytest.mark.parametrize("x", [1, 2])
def test_of_parameters(x):
    assert x == 2
"""
MODULE = "import pytest\npytest.importorskip('no_such_package')\n"


@pytest.mark.parametrize("ci", [False, True], ids=["by hand", "CI"])
def test_skips(ci: bool, tmp_path: Path) -> None:
    (tmp_path / "test_some.py").write_text(TESTS)
    (tmp_path / "test_module.py").write_text(MODULE)
    environment = {name: value for name, value in os.environ.items() if name not in ("CI", "PYTEST_ADDOPTS")}
    environment |= {"PYTHONPATH": str(Path(__file__).parents[1] / "support"), **({"CI": "true"} if ci else {})}
    command = [sys.executable, "-m", "pytest", "-p", "skips", "-p", "no:cacheprovider", "--rootdir", str(tmp_path)]
    result = subprocess.run(
        [*command, "--continue-on-collection-errors", str(tmp_path)],
        capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=120,
    )  # fmt: skip
    closing = result.stdout.splitlines()[-1]
    if ci:
        assert result.returncode == 1, result.stdout
        assert "1 failed, 1 passed, 1 skipped, 1 deselected" in closing
        assert "1 error" in closing
        assert "a skip, which CI takes for a failure: could not import 'no_such_package'" in result.stdout
    else:
        assert result.returncode == 0, result.stdout
        assert "1 passed, 3 skipped, 1 deselected" in closing
