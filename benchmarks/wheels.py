"""Packages for one run from a folder of wheels, where nothing may be installed or no registry is reached."""

from __future__ import annotations

import atexit
import shutil
import site
import tempfile
import zipfile
from importlib import metadata
from pathlib import Path

# Of the rivals, by the names of their distributions.
DISTRIBUTIONS = ("trl", "liger-kernel", "cut-cross-entropy", "verl", "flash-attn", "quack-kernels")


def versions() -> dict[str, str]:
    """Of the rivals that are here."""
    installed = {str(it.metadata["Name"]).lower().replace("_", "-"): it.version for it in metadata.distributions()}
    return {name: installed[name] for name in DISTRIBUTIONS if name in installed}


def use(folder: Path) -> list[str]:
    """Unpack a folder's wheels into a temporary one at the end of the module path: what is installed goes before."""
    wheels = sorted(folder.glob("*.whl"))
    if not wheels:
        raise FileNotFoundError(f"no wheels in {folder}")
    unpacked = Path(tempfile.mkdtemp(prefix="wheels-"))
    atexit.register(shutil.rmtree, unpacked, ignore_errors=True)
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(unpacked)
    for library in (*unpacked.glob("*.data/purelib"), *unpacked.glob("*.data/platlib"), unpacked):
        site.addsitedir(str(library))  # .pth files too, which some packages need
    return [wheel.name for wheel in wheels]
