"""What may be skipped: a test that needs a GPU, where there is none. Nothing else, where CI judges a change.

A test that needs a package which is not installed is skipped on a user's machine. In CI (the variable `CI` is set) that
skip is a failure: else a part of the library could go untested in silence. Combinations of parameters that mean
nothing, or that Triton's interpreter would take minutes for, are no skips: `leave_out` takes them away at collection.
"""

from __future__ import annotations

import os
from collections.abc import Generator
from typing import Any

import pytest

NEEDS_GPU = "needs a GPU"


def _judged(report: Any) -> Any:
    """The report, turned into a failure if it is of a skip that CI does not allow."""
    if os.environ.get("CI") and report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2].removeprefix("Skipped: ")
        if reason != NEEDS_GPU:
            report.outcome = "failed"
            report.longrepr = f"a skip, which CI takes for a failure: {reason}"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, Any, Any]:
    return _judged((yield))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, Any, Any]:
    return _judged((yield))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Take away what `@pytest.mark.leave_out(where=function)` says by a test's parameters."""

    def left_out(item: pytest.Item) -> bool:
        return any(mark.kwargs["where"](item.callspec.params) for mark in item.iter_markers("leave_out"))  # type: ignore[attr-defined]

    config.hook.pytest_deselected(items=[item for item in items if left_out(item)])
    items[:] = [item for item in items if not left_out(item)]
