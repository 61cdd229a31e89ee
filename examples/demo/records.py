"""The files a run leaves: `metrics.jsonl` line by line, `summary.json` whole or not at all."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


def replace_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a file beside `path`, then move it there: a reader never sees half a file."""
    temporary = path.with_name(f".{path.stem}.partial{path.suffix}")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    replace_atomically(path, lambda temporary: temporary.write_text(json.dumps(value, indent=2) + "\n"))


class StepLog:
    """One JSON object per step, flushed as it is written, and kept for the plot."""

    def __init__(self, path: Path) -> None:
        self.rows: list[dict[str, float]] = []
        self._file = path.open("w", encoding="utf-8")

    def add(self, row: Mapping[str, float]) -> None:
        # NaN is no JSON; a step whose groups are all right or all wrong has no score gap to report.
        line = json.dumps({name: value if math.isfinite(value) else None for name, value in row.items()}) + "\n"
        self._file.write(line)
        self._file.flush()
        self.rows.append(dict(row))

    def close(self) -> None:
        self._file.close()
