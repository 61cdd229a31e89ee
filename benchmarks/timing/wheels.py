"""Packages for one run from a folder of wheels, where nothing may be installed or no registry is reached.

python -m benchmarks.timing.wheels --out DIR --python 3.12  # where a registry is: the rivals' wheels for Linux
python -m benchmarks.run --suite gpu --wheels DIR ...  # where the GPU is
"""

from __future__ import annotations

import argparse
import atexit
import platform
import shutil
import site
import subprocess
import sys
import tempfile
import zipfile
from importlib import metadata
from pathlib import Path

# Of the rivals, by the names of their distributions.
DISTRIBUTIONS = ("trl", "liger-kernel", "fla-core", "cut-cross-entropy", "verl", "flash-attn", "quack-kernels")
# Those whose kernels need PyTorch, Triton, transformers and einops only; a few MB. flash-attn has no wheels.
LIGHT = ("trl", "liger-kernel", "fla-core", "einops", "cut-cross-entropy", "verl")
# CuTe's compiler, 100 MB: for quack, and for what Liger runs on sm_90.
CUTE = (
    "quack-kernels", "nvidia-cutlass-dsl", "nvidia-cutlass-dsl-libs-base", "nvidia-cutlass-dsl-libs-cu13",
    "apache-tvm-ffi", "torch-c-dlpack-ext",
)  # fmt: skip
GLIBC = (28, 27, 24, 17)  # of manylinux, newest first


def versions() -> dict[str, str]:
    """Versions of the rivals that are installed."""
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


def command(distribution: str, folder: Path, python: str) -> list[str]:
    """pip's, for one wheel without what it depends on."""
    platforms = [f"manylinux_2_{minor}_x86_64" for minor in GLIBC] + ["manylinux2014_x86_64"]
    return [
        sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--dest", str(folder),
        "--implementation", "cp", "--python-version", python, *(f"--platform={it}" for it in platforms), distribution,
    ]  # fmt: skip


def collect(distributions: tuple[str, ...], folder: Path, python: str) -> list[str]:
    """Download each; the names of those that there is no wheel of."""
    folder.mkdir(parents=True, exist_ok=True)
    missing = []
    for name in distributions:
        done = subprocess.run(command(name, folder, python), capture_output=True, text=True, check=False)
        if done.returncode:
            missing.append(name)
            print(f"{name}: none: {(done.stderr.strip().splitlines() or ['no reason given'])[-1]}")
    for wheel in sorted(folder.glob("*.whl")):
        print(f"{wheel.stat().st_size / 2**20:8.1f} MiB  {wheel.name}")
    print(f"{sum(wheel.stat().st_size for wheel in folder.glob('*.whl')) / 2**20:8.1f} MiB  in all")
    return missing


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the wheels")
    parser.add_argument("--python", default=platform.python_version().rpartition(".")[0], help="version they are for")
    parser.add_argument("--cute", action="store_true", help="quack and CuTe's compiler too, 100 MB")
    arguments = parser.parse_args()
    wanted = LIGHT + CUTE * arguments.cute
    return 1 if collect(wanted, arguments.out, arguments.python) else 0


if __name__ == "__main__":
    sys.exit(main())
