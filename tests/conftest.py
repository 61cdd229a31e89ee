"""Where the tests run: Triton's kernels on the GPU where there is one, else under its interpreter; memory poisoned."""

from __future__ import annotations

import ast
import importlib.util
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import processes
import pytest
import skips
import torch
from processor_time import ProcessorTime

from benchmarks.simulation.interpreter import hasten

# `CONSPO_COMPILED=sm_90 pytest`: Triton's kernels are compiled for that GPU, and their PTX is executed on the CPU.
COMPILED = os.environ.get("CONSPO_COMPILED")
if COMPILED:
    os.environ["TRITON_INTERPRET"] = "0"
elif not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton defines the kernels, so before their import

# torch keeps traced backwards on disk, by the traced program: after a change of an op's arguments they are another's.
os.environ.setdefault("TORCHINDUCTOR_AUTOGRAD_CACHE", "0")

IMPLEMENTATIONS = ("torch", "triton", "native")

# A bare machine with a GPU has torch, Triton, numpy and pytest: there the files that import anything else are not
# collected, and the last lines of the report say so. In CI nothing is left out: they fail at their import.
TESTS = Path(__file__).parent
EXAMPLES = TESTS.parent / "examples"
FOLDERS = (TESTS / "support", EXAMPLES, EXAMPLES / "recipes")
OPTIONAL = {
    "hypothesis", "transformers", "trl", "peft", "matplotlib", "yaml", "kernels", "datasets", "tqdm", "nbclient",
    "nbformat",
}  # fmt: skip


def missing_packages(path: Path, seen: set[Path] | None = None) -> set[str]:
    """Packages of OPTIONAL that are not installed and that a file, or a file of ours that it imports, imports."""
    seen = set() if seen is None else seen
    if path in seen:
        return set()
    seen.add(path)
    modules: set[str] = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            modules.add(node.module)
    imported = {name.split(".")[0] for name in modules}
    missing = {name for name in imported & OPTIONAL if importlib.util.find_spec(name) is None}
    for local in (folder / f"{name.replace('.', '/')}.py" for folder in FOLDERS for name in modules):
        if local.exists():
            missing |= missing_packages(local, seen)
    return missing


collect_ignore: list[str] = []
if sys.version_info < (3, 11):  # TRL 1.16, which these train with, needs it
    collect_ignore += [str(p.relative_to(TESTS)) for p in sorted(TESTS.glob("*/test_trl*.py"))]
if not os.environ.get("CI"):
    collect_ignore += [str(p.relative_to(TESTS)) for p in sorted(TESTS.glob("*/test_*.py")) if missing_packages(p)]

if importlib.util.find_spec("hypothesis") is not None:
    from hypothesis import settings

    # `pytest --hypothesis-profile=long` looks further, and elsewhere each time.
    settings.register_profile("repeatable", max_examples=100, deadline=None, derandomize=True)
    settings.register_profile("long", max_examples=1000, deadline=None)
    settings.load_profile("repeatable")


START = time.monotonic()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--stop-after", type=float, metavar="SECONDS", help="skip what would begin later: a summary, not a killed run"
    )
    parser.addoption("--processor-time", action="store_true", help="processor seconds of tests and folders, at the end")


def pytest_runtest_setup(item: pytest.Item) -> None:
    limit = item.config.getoption("--stop-after")
    if limit is not None and time.monotonic() - START > limit:
        pytest.skip("out of time")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if collect_ignore:
        terminalreporter.write_line(
            f"not collected, they need packages that are not installed: {', '.join(collect_ignore)}"
        )


if os.environ.get("TRITON_INTERPRET") == "1":
    hasten()


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(skips)
    if config.getoption("--processor-time"):
        config.pluginmanager.register(ProcessorTime())


def pytest_sessionstart() -> None:
    """Who asked for the native kernels to be built wants them tested, not skipped."""
    from conspo_kernels.backends import native

    if os.environ.get("CONSPO_BUILD") == "cpu" and native.OBSTACLE is not None:
        pytest.exit(f"CONSPO_BUILD=cpu, but {native.OBSTACLE}", returncode=1)


def pytest_collection_finish() -> None:
    processes.collect_seldom()


# Whose tests are processes of half a minute: begun first, they keep no worker waiting at the end.
LONGEST = {"test_executed_shared.py", "test_executed.py", "test_launches.py", "test_counted.py"}

# Their cases of Triton run as compiled code (`test_executed_shared.py`), which takes half of the interpreter's time.
EXECUTED = {
    "test_inplace.py",
    "test_linear.py",
    "test_loss.py",
    "test_margin.py",
    "test_objective.py",
    "test_ops.py",
    "test_policy_gradient.py",
    "test_token_logprob.py",
}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """`-m gpu` selects, beside what is marked, every case that Triton's kernels run.

    Of a session that executes the compiled kernels, the interpreter is spared the same cases.
    """
    for item in items:
        callspec = getattr(item, "callspec", None)
        if callspec is not None and callspec.params.get("implementation") == "triton":
            item.add_marker(pytest.mark.gpu)
    if os.environ.get("TRITON_INTERPRET") == "1" and any(item.path.name == "test_executed_shared.py" for item in items):
        spared = [item for item in items if item.path.name in EXECUTED and item.get_closest_marker("gpu")]
        config.hook.pytest_deselected(items=spared)
        items[:] = [item for item in items if item not in set(spared)]
    items.sort(key=lambda item: item.path.name not in LONGEST)


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    """torch.empty gives NaN (and the largest integer): whatever a kernel leaves unwritten is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.manual_seed(0)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def _compiled_kernels() -> Iterator[None]:
    """With CONSPO_COMPILED, what the tests launch is executed as PTX."""
    if not COMPILED:
        yield
        return
    from ptx_executor import compiled

    with compiled(COMPILED):
        yield


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request: pytest.FixtureRequest) -> str:
    if request.param == "native":
        from conspo_kernels.backends import native

        if native.OBSTACLE is not None:
            pytest.skip(native.OBSTACLE)
    return request.param


@pytest.fixture
def device(implementation: str) -> torch.device:
    """The GPU for Triton where there is one; the CPU otherwise."""
    on_gpu = implementation == "triton" and torch.cuda.is_available() and not COMPILED
    return torch.device("cuda" if on_gpu else "cpu")
