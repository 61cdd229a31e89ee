"""The notebook for newcomers runs from top to bottom in a kernel of its own, and what is stored of it is one run."""

from __future__ import annotations

import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

REPOSITORY = Path(__file__).resolve().parents[2]
NOTEBOOK = REPOSITORY / "examples" / "quickstart.ipynb"
MAX_BYTES = 200_000  # with two pictures
LIMIT = 300  # seconds for a cell: all of them take about 15 on two quiet cores


@pytest.fixture
def notebook() -> nbformat.NotebookNode:
    return nbformat.read(NOTEBOOK, as_version=4)


def outputs(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def pictures(notebook: nbformat.NotebookNode) -> int:
    return sum("image/png" in output.get("data", {}) for output in outputs(notebook))


def test_the_notebook_runs(notebook: nbformat.NotebookNode, tmp_path: Path) -> None:
    """Its cells hold the gradient against the reference, and the training curve against what it has to reach."""
    pytest.importorskip("matplotlib")
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "IPYTHONDIR": str(tmp_path)}
    stored = pictures(notebook)
    client = NotebookClient(notebook, timeout=LIMIT, kernel_name="python3", record_timing=False)
    client.execute(cwd=str(NOTEBOOK.parent), env=environment)
    assert [output for output in outputs(notebook) if output.get("name") == "stderr"] == []
    assert pictures(notebook) == stored == 2


def test_what_is_stored_is_one_run(notebook: nbformat.NotebookNode) -> None:
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert all(output.output_type != "error" for output in outputs(notebook))
    assert NOTEBOOK.stat().st_size < MAX_BYTES
