"""Numbers as a user has them: NumPy's become Python's, of which ops and their schemas know."""

from __future__ import annotations

from numbers import Integral, Real
from typing import Any


def plain(value: Any) -> Any:
    """A scalar of NumPy, an integer or a floating-point number, as Python's; anything else as it is."""
    if type(value) in (int, float) or not isinstance(value, Real):
        return value
    if not hasattr(value, "item"):
        return value
    return int(value) if isinstance(value, Integral) else float(value)
