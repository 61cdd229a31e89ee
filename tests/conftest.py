"""Where the tests run: Triton's kernels on the GPU where there is one, else under its interpreter; memory poisoned."""

from __future__ import annotations

import ast
import importlib.util
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import skips
import torch

from benchmarks.interpreter import hasten

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton defines the kernels, so before their import

# torch keeps traced backwards on disk, by the traced program: after a change of an op's arguments they are another's.
os.environ.setdefault("TORCHINDUCTOR_AUTOGRAD_CACHE", "0")

IMPLEMENTATIONS = ("torch", "triton", "native")

# A bare machine with a GPU has torch, Triton, numpy and pytest: there the files of property tests are not collected,
# and the last lines of the report say so. In CI nothing is left out: they fail at their import.
PROPERTY_TESTS = importlib.util.find_spec("hypothesis") is not None


def _imports_hypothesis(path: Path) -> bool:
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    return any(isinstance(node, ast.ImportFrom) and node.module == "hypothesis" for node in nodes)


collect_ignore: list[str] = []
if PROPERTY_TESTS:
    from hypothesis import settings

    # `pytest --hypothesis-profile=long` looks further, and elsewhere each time.
    settings.register_profile("repeatable", max_examples=100, deadline=None, derandomize=True)
    settings.register_profile("long", max_examples=1000, deadline=None)
    settings.load_profile("repeatable")
elif not os.environ.get("CI"):
    collect_ignore = [
        path.name for path in sorted(Path(__file__).parent.glob("test_*.py")) if _imports_hypothesis(path)
    ]


START = time.monotonic()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--stop-after", type=float, metavar="SECONDS", help="skip what would begin later: a summary, not a killed run"
    )


def pytest_runtest_setup(item: pytest.Item) -> None:
    limit = item.config.getoption("--stop-after")
    if limit is not None and time.monotonic() - START > limit:
        pytest.skip("out of time")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if collect_ignore:
        terminalreporter.write_line(f"not collected, hypothesis is not installed: {', '.join(collect_ignore)}")


if os.environ.get("TRITON_INTERPRET") == "1":
    hasten()


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(skips)


def pytest_sessionstart() -> None:
    """Who asked for the native kernels to be built wants them tested, not skipped."""
    from conspo_kernels.backends import native

    if os.environ.get("CONSPO_BUILD") == "cpu" and native.OBSTACLE is not None:
        pytest.exit(f"CONSPO_BUILD=cpu, but {native.OBSTACLE}", returncode=1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """`-m gpu` selects, beside what is marked, every case that Triton's kernels run."""
    for item in items:
        callspec = getattr(item, "callspec", None)
        if callspec is not None and callspec.params.get("implementation") == "triton":
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    """torch.empty gives NaN (and the largest integer): whatever a kernel leaves unwritten is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.manual_seed(0)
    yield
    torch.use_deterministic_algorithms(False)


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
    return torch.device("cuda" if implementation == "triton" and torch.cuda.is_available() else "cpu")
