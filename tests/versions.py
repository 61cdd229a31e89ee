"""The library with other releases of torch, Triton and numpy: an environment per row, made, tested and removed. Run as

    python tests/versions.py [ROW ...] [--keep] [--folder build/versions]

A row is named after its torch, and its numpy where two rows share a torch. The sources are copied and the extension is
built in the copy, as each release of torch has its own binary interface. What a step prints is in FOLDER/ROW/STEP.log.
Exit codes: 0, or 1 where a step fails.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

REPOSITORY = Path(__file__).resolve().parent.parent
FOLDERS = ("conspo_kernels", "csrc", "benchmarks", "examples", "ptx_executor", "tests")
FILES = ("pyproject.toml", "setup.py", "README.md", "LICENSE")


class Row(NamedTuple):
    """torch, triton: releases.  numpy: what pip is asked for."""

    torch: str
    triton: str
    numpy: str


ROWS = {
    "2.11.0-numpy2.3": Row("2.11.0", "3.6.0", "numpy==2.3.*"),
    "2.11.0": Row("2.11.0", "3.6.0", "numpy==2.4.*"),
    "2.13.0": Row("2.13.0", "3.7.1", "numpy==2.4.*"),
    "2.14.1": Row("2.14.1", "3.8.0", "numpy==2.4.*"),
    "2.15.0": Row("2.15.0", "3.9.0", "numpy==2.4.*"),
}

GRADCHECK = ["-m", "conspo_kernels", "gradcheck"]
PYTEST = ["-m", "pytest", "-q", "-p", "no:cacheprovider"]
# By name: arguments of Python, and variables of the environment. Triton's interpreter is slow, so it has a little.
STEPS: dict[str, tuple[list[str], dict[str, str]]] = {
    "info": (["-m", "conspo_kernels", "info"], {}),
    "quick": ([*PYTEST, "-n", "2", "--dist", "worksteal", "@tests/quick.txt"], {}),
    "gradcheck": ([*GRADCHECK, "--implementation", "native", "torch"], {}),
    "interpreter": (
        [*GRADCHECK, "--implementation", "triton", "--op", "conspo_loss_from_scores", "conspo_loss", "--dtype", "fp32"],
        {"TRITON_INTERPRET": "1"},
    ),
    "kernels": ([*PYTEST, "tests/test_launch.py"], {}),
    "compile": ([*PYTEST, "tests/test_compile.py"], {}),
    "ranks": ([*PYTEST, "tests/test_ranks.py"], {}),
    "machine code": ([*PYTEST, "tests/test_compiled.py", "tests/test_counted.py"], {}),
}


class Outcome(NamedTuple):
    passed: bool
    seconds: float


def run(command: list[str], log: Path, **options: object) -> Outcome:
    start = time.perf_counter()
    with log.open("w") as file:
        done = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, check=False, **options)  # type: ignore[call-overload]
    return Outcome(done.returncode == 0, time.perf_counter() - start)


def set_up(row: Row, folder: Path) -> Outcome:
    """An environment with the row's packages, and the sources with their extension."""
    shutil.rmtree(folder, ignore_errors=True)
    source = folder / "source"
    source.mkdir(parents=True)
    for name in FOLDERS:
        shutil.copytree(REPOSITORY / name, source / name, ignore=shutil.ignore_patterns("_C*.so", "__pycache__"))
    for name in FILES:
        shutil.copy(REPOSITORY / name, source)
    subprocess.run([sys.executable, "-m", "venv", str(folder / "venv")], check=True)
    packages = [f"torch=={row.torch}", f"triton=={row.triton}", row.numpy, "setuptools>=77,<82", "ninja"]
    packages += ["pytest>=8.2", "pytest-xdist", "hypothesis"]
    pip = [str(python(folder)), "-m", "pip", "install", "-q", "--only-binary", ":all:", *packages]
    installed = run(pip, folder / "install.log")
    if not installed.passed:
        return installed
    build = [str(python(folder)), "setup.py", "-q", "build_ext", "--inplace"]
    environment = {**os.environ, "CONSPO_BUILD": "cpu", "CONSPO_WERROR": "1", "PATH": path_of(folder)}
    built = run(build, folder / "build.log", cwd=source, env=environment)
    return Outcome(built.passed, installed.seconds + built.seconds)


def python(folder: Path) -> Path:
    return folder / "venv" / "bin" / "python"


def path_of(folder: Path) -> str:
    return os.pathsep.join([str(python(folder).parent), os.environ.get("PATH", "")])  # ninja is there


def tested(row: Row, folder: Path, steps: list[str]) -> dict[str, Outcome]:
    """The outcome of each step; nothing is tested where the set-up failed."""
    outcomes = {"set-up": set_up(row, folder)}
    if outcomes["set-up"].passed:
        for step in steps:
            arguments, variables = STEPS[step]
            environment = {**os.environ, "CONSPO_BUILD": "cpu", "OMP_NUM_THREADS": "1", "PATH": path_of(folder)}
            environment |= {"PYTHONPATH": ".", **variables}
            log = folder / f"{step.replace(' ', '-')}.log"
            outcomes[step] = run([str(python(folder)), *arguments], log, cwd=folder / "source", env=environment)
    return outcomes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", default=list(ROWS), metavar="ROW", help=", ".join(ROWS))
    parser.add_argument("--steps", nargs="*", choices=STEPS, default=list(STEPS))
    parser.add_argument("--folder", type=Path, default=REPOSITORY / "build" / "versions")
    parser.add_argument("--keep", action="store_true", help="keep the environments, 5 GB each")
    arguments = parser.parse_args()
    if unknown := set(arguments.rows) - set(ROWS):
        parser.error(f"rows are {', '.join(ROWS)}, got {', '.join(sorted(unknown))}")
    failed = False
    print(f"Python {sys.version.split()[0]}\n{'torch':8}{'Triton':8}{'numpy':14}steps (seconds)", flush=True)
    for name in arguments.rows:
        row, folder = ROWS[name], arguments.folder.resolve() / name
        outcomes = tested(row, folder, arguments.steps)
        words = [f"{step} {'ok' if it.passed else 'FAILED'} ({it.seconds:.0f})" for step, it in outcomes.items()]
        print(f"{row.torch:8}{row.triton:8}{row.numpy:14}{', '.join(words)}", flush=True)
        failed |= not all(it.passed for it in outcomes.values())
        if not arguments.keep:
            shutil.rmtree(folder / "venv", ignore_errors=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
