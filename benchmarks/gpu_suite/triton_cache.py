"""The folder that Triton caches in, seen from outside of Triton."""

from __future__ import annotations

from pathlib import Path


def binaries(folder: Path) -> int:
    """Of an NVIDIA or an AMD GPU, in a folder that Triton caches in."""
    return sum(1 for end in ("cubin", "hsaco") for _ in folder.glob(f"*/*.{end}")) if folder.is_dir() else 0
