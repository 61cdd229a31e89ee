"""Tests with the frameworks' own code, in the environment that `make integrations` makes.

The batch and its expected gradient are those of `tests`. Some packages import CUDA builds at their top that no CPU has
and that nothing here calls: `stubs` puts empty modules in their place.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from unittest import mock

TESTS = Path(__file__).resolve().parent.parent / "tests"
sys.path += [str(TESTS / "support"), str(TESTS / "integrations")]


@contextmanager
def stubs(*names: str) -> Iterator[None]:
    """Modules of these names of which every attribute exists and does nothing, until the block ends."""
    with mock.patch.dict(sys.modules, {name: mock.MagicMock() for name in names}):
        kept = dict(sys.modules)
        yield
        loaded = {name: module for name, module in sys.modules.items() if name not in kept}
    sys.modules.update(loaded)  # what the block imported stays, the stubs go


def without_init(name: str) -> None:
    """A subpackage whose modules can be imported, and whose own __init__, which imports them all, is not run."""
    top, *rest = name.split(".")
    spec = importlib.util.find_spec(top)
    assert spec is not None
    assert spec.origin is not None
    module = ModuleType(name)
    module.__path__ = [str(Path(spec.origin).parent.joinpath(*rest))]
    sys.modules[name] = module
