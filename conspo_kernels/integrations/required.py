"""Packages that only some users have: imported when they are needed, with an error that says how to get them."""

from __future__ import annotations

import importlib
import importlib.metadata
import re
from types import ModuleType

# The oldest version of each that will do. A pre-release counts as the release that it comes before.
MINIMUM = {"transformers": "5.0", "trl": "1.16", "verl": "0.9"}


def required(package: str) -> ModuleType:
    """The package, imported.

    Args:
        package: a name of MINIMUM: of the module, on the index, and of the extra of conspo-kernels that installs it.

    Raises:
        ImportError: it is missing, cannot be imported, or is too old. The message names the extra.
    """
    minimum, remedy = MINIMUM[package], f"pip install 'conspo-kernels[{package}]'"
    try:
        module = importlib.import_module(package)
    except ImportError as error:
        raise ImportError(f"{package} >= {minimum} is needed and cannot be imported ({error}): {remedy}") from error
    version = _version(module, package)
    if _release(version) < _release(minimum):
        raise ImportError(f"{package} >= {minimum} is needed, got {version}: {remedy}")
    return module


def _version(module: ModuleType, package: str) -> str:
    version = getattr(module, "__version__", None)
    return version if isinstance(version, str) else importlib.metadata.version(package)


def _release(version: str) -> tuple[int, ...]:
    """The numbers that order releases, without zeros at the end: "5.0" and "5.0.0rc1" are the same."""
    match = re.match(r"\d+(\.\d+)*", version)
    if match is None:
        raise ImportError(f"not a version: {version!r}")
    return tuple(int(part) for part in re.sub(r"(\.0+)+$", "", match[0]).split("."))
