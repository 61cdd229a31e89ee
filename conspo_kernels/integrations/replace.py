"""Functions and classes of another package, replaced wherever loaded modules hold them, and restored."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any


class Replacement:
    """In every loaded module that holds an original, under whatever name, another object: until `undo`, or in a `with`.

    `from package import function` copies the reference, so a module that was loaded before has its own. One that is
    loaded later takes the new object from the module it imports it from.

    Args:
        pairs: (original, what takes its place); no module may hold the latter yet, as `undo` would take it away.
        within: the package whose modules are meant; "": all modules.
    """

    def __init__(self, pairs: Iterable[tuple[Any, Any]], within: str = "") -> None:
        self._pairs, self._within = list(pairs), within
        _rebind({id(original): new for original, new in self._pairs}, within)

    def undo(self) -> None:
        """The originals in every module that holds what replaced them, modules loaded since included."""
        _rebind({id(new): original for original, new in self._pairs}, self._within)

    def __enter__(self) -> Replacement:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()


def _rebind(by_id: dict[int, Any], within: str) -> None:
    """Every name that refers to a key, by its id, refers to the value."""
    for module_name, module in list(sys.modules.items()):
        if within and module_name.partition(".")[0] != within:
            continue
        for name, value in list(getattr(module, "__dict__", {}).items()):
            if id(value) in by_id:
                setattr(module, name, by_id[id(value)])
