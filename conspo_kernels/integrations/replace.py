"""A function of another package, replaced wherever that package's modules hold it, and restored."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any


class Replacement:
    """In every loaded module that holds `original` under its name, another function in its place.

    `from package import function` copies the reference, so a module that was loaded before has its own. One that is
    loaded later takes the new function from the module it imports it from.

    Args:
        name: the name that the modules hold it under.
        original: the function.
        function: what takes its place.
    """

    def __init__(self, name: str, original: Callable[..., Any], function: Callable[..., Any]) -> None:
        self._name, self._original = name, original

        # A function of its own: who imported `function` itself under this name keeps it when this is undone.
        @functools.wraps(function)
        def in_its_place(*arguments: Any, **options: Any) -> Any:
            return function(*arguments, **options)

        self._function = in_its_place
        _rebind(name, original, in_its_place)

    def undo(self) -> None:
        """The original in every module that holds the replacement, modules loaded since included."""
        _rebind(self._name, self._function, self._original)


def _rebind(name: str, old: Callable[..., Any], new: Callable[..., Any]) -> None:
    for module in list(sys.modules.values()):
        if getattr(module, "__dict__", {}).get(name) is old:
            setattr(module, name, new)
