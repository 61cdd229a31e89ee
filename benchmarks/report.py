"""Tables and plots from the JSON files of `benchmarks.run`.

python -m benchmarks.report RESULTS.json ... --out DIR    # or a folder of them; report.md, and PNGs where matplotlib is
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from benchmarks.timing.rows import Row, outlasted
from benchmarks.timing.tables import markdown, quartiles

ENVIRONMENT = (
    "commit",
    "sources",
    "gpu",
    "cpu",
    "cpu_capability",
    "threads",
    "torch",
    "triton",
    "triton_interpreted",
    "cuda",
    "smi",
    "rivals",
)


def load(paths: Sequence[Path]) -> list[dict[str, Any]]:
    """The reports with rows of ops among files and folders, each with its own path."""
    files = [file for path in paths for file in (sorted(path.glob("*.json")) if path.is_dir() else [path])]
    reports = []
    for file in files:
        content = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(content, dict) and any("op" in row and "provider" in row for row in content.get("rows", [])):
            reports.append({**content, "path": str(file)})
    return reports


def line(row: Row) -> list[str | None]:
    """A provider's row: times in ms, memory in MiB, rates in G/s."""
    seconds = row.get("seconds")
    if seconds is None:
        return [row["provider"], row.get("note", row.get("status")), *[None] * 8]
    rate = row.get("bytes_per_second", row.get("operations_per_second"))
    unit = "GB/s" if "bytes_per_second" in row else "GFLOP/s"
    fraction = row.get("copy_fraction", row.get("gemm_fraction"))
    return [
        row["provider"],
        f"{seconds['median'] * 1e3:.3g}" + "!" * bool(outlasted(row)),
        quartiles(seconds),
        f"{row['times_ours']:.2f}" if "times_ours" in row else None,
        f"{row['peak_bytes'] / 2**20:.1f}" if "peak_bytes" in row else None,
        f"{rate / 1e9:,.1f} {unit}" if rate else None,
        f"{fraction:.0%}" if fraction else None,
        f"{row['wall_seconds']['median'] * 1e6:.0f} us" if "wall_seconds" in row else None,
        f"{row['host_seconds'] * 1e6:.0f} us" if "host_seconds" in row else None,
        f"{row['sm_mhz']} MHz" if "sm_mhz" in row else None,
    ]


def key(row: Row) -> tuple[str, str]:
    return row["op"], row["shape"]


def sections(report: dict[str, Any]) -> Iterator[str]:
    """Markdown: what the machine was, then a table for each op and shape."""
    environment = report["environment"]
    yield f"# {report['suite']}: {Path(report['path']).name}"
    facts = {name: environment[name] for name in ENVIRONMENT if environment.get(name) not in (None, "", {})}
    if rivals := facts.get("rivals"):
        facts["rivals"] = ", ".join(f"{package} {version}" for package, version in rivals.items())
    yield "\n".join(f"- {name}: {fact}" for name, fact in facts.items())
    headers = ["provider", "ms", "quartiles", "x ours", "peak MiB", "rate", "of limit", "wall", "host", "SM clock"]
    for (op, shape), rows in groupby(sorted(report["rows"], key=key), key):
        lines = [line(row) for row in rows]
        used = [i for i in range(len(headers)) if any(cells[i] for cells in lines)]
        yield f"## {op}, {shape}"
        if first := next((row for row in report["rows"] if key(row) == (op, shape) and "bytes" in row), None):
            yield f"{first['bytes'] / 1e9:,.4g} GB to move at least, {first['operations'] / 1e9:,.4g} GFLOP."
        yield markdown([headers[i] for i in used], [[cells[i] for i in used] for cells in lines])
    yield (
        "ms: medians, interleaved. of limit: of what a copy, or the bare GEMMs, reach in the same run. host: until a "
        "call was queued. !: the GPU had begun by then, so that the time may be the host's."
    )


def plots(report: dict[str, Any], out: Path) -> list[Path]:
    """Bars of time, memory and share of the limit per op and shape; lines over N and V where these vary."""
    import matplotlib

    matplotlib.use("Agg")
    stem = Path(report["path"]).stem
    files = []
    timed = [row for row in report["rows"] if "seconds" in row]
    for op, group in groupby(sorted(timed, key=key), lambda row: row["op"]):
        rows = list(group)
        name = f"{stem}-{op.replace(' + ', '-').replace(', ', '-').replace(' ', '_')}"
        files.append(bars(op, rows, out / f"{name}.png"))
        files += [
            lines(op, rows, axis, out / f"{name}-{axis}.png") for axis in ("tokens", "vocab_size") if series(rows, axis)
        ]
    return files


def bars(op: str, rows: list[Row], path: Path) -> Path:
    """A bar per shape and provider: time and memory, where less is better, and the share of the limit."""
    import matplotlib.pyplot as plt

    rows = sorted(rows, key=lambda row: (row["shape"], -row["seconds"]["median"]))
    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    values = (
        ("ms", [row["seconds"]["median"] * 1e3 for row in rows]),
        ("peak MiB", [row.get("peak_bytes", 0) / 2**20 for row in rows]),
        ("% of limit", [100 * row.get("copy_fraction", row.get("gemm_fraction", 0.0)) for row in rows]),
    )
    labels = [f"{row['shape']}: {row['provider']}" for row in rows]
    colors = [f"C{shapes.index(row['shape']) % 10}" for row in rows]
    figure, panels = plt.subplots(1, 3, figsize=(15, 1.2 + 0.17 * len(rows)), sharey=True)
    for panel, (label, widths) in zip(panels, values, strict=True):
        panel.barh(range(len(rows)), widths, color=colors)
        panel.set_xlabel(label)
    panels[0].set_yticks(range(len(rows)), labels, fontsize=6)
    panels[0].set_xscale("log")  # rivals and shapes lie orders of magnitude apart
    figure.suptitle(op)
    figure.tight_layout()
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)
    return path


def series(rows: list[Row], axis: str) -> list[list[Row]]:
    """Rows that differ in one axis only, where there are two points at least; limits and odd logits left out."""
    other = {"tokens": "vocab_size", "vocab_size": "tokens"}[axis]
    plain = [row for row in rows if row.get("plain") and axis in row and not row["provider"].startswith("limit")]

    def alike(row: Row) -> tuple[str, ...]:
        return tuple(str(row.get(name)) for name in ("provider", "dtype", other, "hidden_size"))

    groups = [list(group) for _, group in groupby(sorted(plain, key=lambda row: (alike(row), row[axis])), alike)]
    return [group for group in groups if len({row[axis] for row in group}) > 1]


def lines(op: str, rows: list[Row], axis: str, path: Path) -> Path:
    """Time over an axis, both logarithmic."""
    import matplotlib.pyplot as plt

    other = {"tokens": "vocab_size", "vocab_size": "tokens"}[axis]
    figure, panel = plt.subplots(figsize=(7, 4.5))
    for group in series(rows, axis):
        label = f"{group[0]['provider']}, {group[0]['dtype']}, {other} {group[0][other]:,}"
        panel.loglog([row[axis] for row in group], [row["seconds"]["median"] * 1e3 for row in group], "o-", label=label)
    values = sorted({row[axis] for group in series(rows, axis) for row in group})
    panel.set_xticks(values, [f"{value:,}" for value in values])
    panel.minorticks_off()
    panel.set_xlabel(axis)
    panel.set_ylabel("ms")
    panel.set_title(op)
    panel.legend(fontsize=6)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+", help="files, or folders of them")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--no-plots", action="store_true", help="tables only")
    arguments = parser.parse_args()
    reports = load(arguments.results)
    if not reports:
        parser.error("no file with rows of benchmarks.run among these")
    arguments.out.mkdir(parents=True, exist_ok=True)
    texts = []
    for report in reports:
        texts.append("\n\n".join(sections(report)))
        if arguments.no_plots:
            continue
        try:
            files = plots(report, arguments.out)
        except ImportError as error:
            print(f"no plots: {error}")
            continue
        texts.append("\n".join(f"![{file.stem}]({file.name})" for file in files))
    (arguments.out / "report.md").write_text("\n\n".join(texts) + "\n", encoding="utf-8")
    print(f"{arguments.out / 'report.md'}")


if __name__ == "__main__":
    main()
