"""The library with other releases of torch, Triton and numpy, an environment for each. `make versions` runs it, or

    nox --list
    nox --session 'versions(2.15.0)' -- quick compile       # one row, two steps; without names all steps

A row is named after its torch, and its numpy where two rows share a torch. The sources are copied and the extension is
built in the copy, as each release of torch has its own binary interface. An environment takes 5 GB, so it is removed at
the end; `--reuse-venv yes` keeps it. `--force-python 3.13` takes another Python.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import nox
from nox.command import CommandFailed

REPOSITORY = Path(__file__).resolve().parent
FOLDERS = ("conspo_kernels", "csrc", "benchmarks", "examples", "ptx_executor", "tests")
FILES = ("noxfile.py", "pyproject.toml", "setup.py", "README.md", "LICENSE")

nox.options.envdir = "build/nox"
nox.options.default_venv_backend = "venv"

GRADCHECK = ("-m", "conspo_kernels", "gradcheck")
PYTEST = ("-m", "pytest", "-q", "-p", "no:cacheprovider")
# By name: arguments of Python, and variables of the environment. Triton's interpreter is slow, so it has a little.
STEPS: dict[str, tuple[tuple[str, ...], dict[str, str]]] = {
    "info": (("-m", "conspo_kernels", "info"), {}),
    "quick": ((*PYTEST, "-n", "2", "--dist", "worksteal", "@tests/quick.txt"), {}),
    "gradcheck": ((*GRADCHECK, "--implementation", "native", "torch"), {}),
    "interpreter": (
        (*GRADCHECK, "--implementation", "triton", "--op", "conspo_loss_from_scores", "conspo_loss", "--dtype", "fp32"),
        {"TRITON_INTERPRET": "1"},
    ),
    "executed": (  # what the row's Triton compiles
        (*GRADCHECK, "--implementation", "triton", "--compiled", "sm_90", "--dtype", "bf16", "fp32"),
        {},
    ),
    "executed-kernels": ((*PYTEST, "tests/ptx_executor/test_executed.py"), {}),
    "kernels": ((*PYTEST, "tests/backends/test_launch.py"), {}),
    "compile": ((*PYTEST, "tests/ops/test_compile.py"), {}),
    "ranks": ((*PYTEST, "tests/ops/test_ranks.py"), {}),
    "machine-code": ((*PYTEST, "tests/backends/test_compiled.py", "tests/backends/test_counted.py"), {}),
}


@nox.session
@nox.parametrize(
    ("torch", "triton", "numpy"),
    [
        nox.param("2.11.0", "3.6.0", "2.3", id="2.11.0-numpy2.3"),
        nox.param("2.11.0", "3.6.0", "2.4", id="2.11.0"),
        nox.param("2.13.0", "3.7.1", "2.4", id="2.13.0"),
        nox.param("2.14.1", "3.8.0", "2.4", id="2.14.1"),
        nox.param("2.15.0", "3.9.0", "2.4", id="2.15.0"),
    ],
)
def versions(session: nox.Session, torch: str, triton: str, numpy: str) -> None:
    """Every step of a row is run, also after one that failed."""
    if unknown := set(session.posargs) - set(STEPS):
        session.error(f"steps are {', '.join(STEPS)}, got {', '.join(sorted(unknown))}")
    session.install(
        "--only-binary", ":all:", f"torch=={torch}", f"triton=={triton}", f"numpy=={numpy}.*",
        "setuptools>=77,<82", "ninja", "pytest>=8.2", "pytest-xdist", "hypothesis",
    )  # fmt: skip
    session.chdir(copied_sources(Path(session.create_tmp())))
    environment = {"CONSPO_BUILD": "cpu", "CONSPO_WERROR": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": "."}
    session.run("python", "setup.py", "-q", "build_ext", "--inplace", env=environment)
    failed = []
    for step in session.posargs or STEPS:
        arguments, variables = STEPS[step]
        try:
            session.run("python", *arguments, env=environment | variables)
        except CommandFailed:
            failed.append(step)
    if not session.virtualenv.reuse_existing:
        shutil.rmtree(session.virtualenv.location)
    if failed:
        session.error(f"failed: {', '.join(failed)}")


def copied_sources(folder: Path) -> Path:
    """A checkout in the folder, without the extension of another torch."""
    sources = folder / "sources"
    shutil.rmtree(sources, ignore_errors=True)
    for name in FOLDERS:
        shutil.copytree(REPOSITORY / name, sources / name, ignore=shutil.ignore_patterns("_C*.so", "__pycache__"))
    for name in FILES:
        shutil.copy(REPOSITORY / name, sources)
    return sources
