"""The package as a kernel for the Hugging Face Hub: pure Python and Triton, in the layout that `kernels` loads.

    python hub/build.py OUT        # OUT/build/torch-universal, OUT/README.md
    kernels.get_local_kernel(Path("OUT"))

Everything is copied from the package at the time of the call; nothing of it is kept in the repository. Ops are
registered under a name of the build's own, so that the kernel and an installed conspo_kernels live in one process.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent / "conspo_kernels"
CARD = Path(__file__).resolve().parent / "CARD.md"
NAME = "conspo-kernels"
# Commands and adapters for trainers: not kernels.
LEFT_OUT = ("__main__.py", "gradcheck", "integrations")
NAMESPACE = re.compile(r'^NAMESPACE = "conspo"', re.MULTILINE)


def sources() -> list[Path]:
    """The Python files of the kernel, relative to the package."""
    files = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))
    return [path for path in files if path.parts[0] not in LEFT_OUT]


def digest(files: Sequence[Path]) -> str:
    """Of names and contents: the same sources give the same build."""
    whole = hashlib.sha256()
    for path in files:
        whole.update(f"{path.as_posix()}\0".encode() + (PACKAGE / path).read_bytes())
    return whole.hexdigest()[:12]


def build(out: Path) -> Path:
    """Write the kernel below `out`; its variant's folder."""
    files = sources()
    identity = f"conspo_kernels_{digest(files)}"
    variant = out / "build" / "torch-universal"
    shutil.rmtree(variant, ignore_errors=True)
    for path in files:
        text = (PACKAGE / path).read_text(encoding="utf-8")
        if path.name == "registration.py":
            text, replaced = NAMESPACE.subn(f'NAMESPACE = "{identity}"', text)
            assert replaced == 1, "registration.py has no NAMESPACE"
        target = variant / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8")
    metadata = {
        "id": identity, "name": NAME, "version": 1, "license": "Apache-2.0", "python-depends": [],
        "backend": {"type": "cuda"},
    }  # fmt: skip
    (variant / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")
    shutil.copy(CARD, out / "README.md")
    return variant


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("out", type=Path, help="folder of the kernel's repository")
    variant = build(parser.parse_args(argv).out)
    print(f"{len(list(variant.rglob('*.py')))} files in {variant}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
