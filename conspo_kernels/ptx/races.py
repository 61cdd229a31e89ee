"""Races, found in what a launch's accesses have written down."""

from __future__ import annotations

from .memory import Memory


def check_races(memory: Memory, kernel: str) -> None:
    """Raise Fault where two threads touch the same bytes, one of them storing, with nothing that orders them."""
    del memory, kernel
