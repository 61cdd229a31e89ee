"""The documentation holds: its code runs, its links lead somewhere, and every public name has an entry.

The Python blocks of a page run top to bottom in one namespace, as a reader would paste them.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch

import conspo_kernels
from conspo_kernels.backends import registry

REPOSITORY = Path(__file__).resolve().parents[2]
PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
NAMES = [str(page.relative_to(REPOSITORY)) for page in PAGES]
NEEDS = {"trl": (3, 11)}  # Python, of what a page's code imports
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")
MAX_README_LINES = 130
MAX_CODE_COLUMNS = 112  # what the site shows without scrolling in a window of 1,440 pixels


def blocks(page: Path) -> Iterator[tuple[int, str]]:
    """Line number and source of each Python block."""
    text = page.read_text(encoding="utf-8")
    for match in FENCE.finditer(text):
        if match[1] == "python":
            yield text.count("\n", 0, match.start(2)) + 1, match[2]


@pytest.mark.leave_out(where=lambda p: sys.version_info < NEEDS.get(p["page"].stem, (3,)))
@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_the_code_of_a_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # what a block writes is not left here
    torch.manual_seed(0)
    namespace: dict[str, object] = {"__name__": f"page_{page.stem}"}
    for line, source in blocks(page):
        with mock.patch.dict(os.environ), mock.patch.dict(registry.BACKENDS):  # what a page sets is not the next one's
            exec(compile("\n" * (line - 1) + source, str(page), "exec"), namespace)  # a traceback names the page's line


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links_lead_somewhere(page: Path) -> None:
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    for target in LINK.findall(text):
        if not re.match(r"https?:|#|mailto:", target):
            assert (page.parent / target.split("#")[0]).exists(), f"{page.name}: {target}"


@pytest.mark.parametrize("page", PAGES[1:], ids=NAMES[1:])
def test_code_fits_the_page(page: Path) -> None:
    blocks_of_page = FENCE.findall(page.read_text(encoding="utf-8"))
    wide = [line for _, block in blocks_of_page for line in block.splitlines() if len(line) > MAX_CODE_COLUMNS]
    assert not wide


def test_every_public_name_has_an_entry() -> None:
    entries = set(re.findall(r"^::: conspo_kernels\.(\w+)$", (REPOSITORY / "docs/api.md").read_text(), re.MULTILINE))
    assert entries == set(conspo_kernels.__all__)


def test_every_public_name_has_a_docstring_with_its_parts() -> None:
    for name in conspo_kernels.__all__:
        documented = getattr(conspo_kernels, name)
        assert documented.__doc__, name
        if not isinstance(documented, type):
            for part in ("Args", "Returns", "Raises", "Cost", "Source"):
                assert re.search(rf"^\s*(?:\w+, )*{part}\b.*:", documented.__doc__, re.MULTILINE), f"{name}: no {part}"


def test_the_readme_is_a_page() -> None:
    assert len((REPOSITORY / "README.md").read_text(encoding="utf-8").splitlines()) <= MAX_README_LINES
