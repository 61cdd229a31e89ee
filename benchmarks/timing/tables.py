"""Tables of text and JSON files, with nothing but the standard library: a bare GPU machine has no more."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def markdown(headers: Sequence[str], lines: Sequence[Sequence[object]], text_columns: int = 1) -> str:
    """A table for people and for Markdown; the first columns are aligned left, the rest right. None is empty."""
    cells = [["" if cell is None else str(cell).replace("|", "/") for cell in line] for line in (headers, *lines)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(headers))]

    def row(line: Sequence[str]) -> str:
        padded = [
            cell.ljust(width) if i < text_columns else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        return f"| {' | '.join(padded)} |"

    rule = ["-" * width if i < text_columns else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    return "\n".join([row(cells[0]), f"| {' | '.join(rule)} |", *map(row, cells[1:])])


def quartiles(seconds: dict[str, Any]) -> str:
    """Of a row's `seconds`, in ms."""
    return "timed once" if seconds["repeats"] == 1 else f"{seconds['low'] * 1e3:.3g} to {seconds['high'] * 1e3:.3g}"


def write(path: Path, report: Any) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".partial")
    temporary.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)
