"""Python in a process of its own, at the root of the repository."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]


def python(*arguments: str) -> str:
    """In a process of its own: Triton's interpreter, which the other tests want, is chosen once per process."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": str(REPOSITORY)}
    result = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env=environment, cwd=REPOSITORY, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout
