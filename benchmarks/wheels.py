"""Packages for one run from a folder of wheels, where nothing may be installed or no registry is reached."""

from __future__ import annotations

import site
import tempfile
import zipfile
from pathlib import Path


def use(folder: Path) -> list[str]:
    """Unpack a folder's wheels into a temporary one at the end of the module path: what is installed goes before."""
    wheels = sorted(folder.glob("*.whl"))
    if not wheels:
        raise FileNotFoundError(f"no wheels in {folder}")
    unpacked = Path(tempfile.mkdtemp(prefix="wheels-"))
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(unpacked)
    for library in (*unpacked.glob("*.data/purelib"), *unpacked.glob("*.data/platlib"), unpacked):
        site.addsitedir(str(library))  # .pth files too, which some packages need
    return [wheel.name for wheel in wheels]
