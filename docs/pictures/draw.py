"""The pictures of the documentation: what the loss does, and what it costs on a CPU, from the committed results.

    python docs/pictures/draw.py      # writes the PNG files beside it

Needs matplotlib only.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # before pyplot is imported: there may be no display
import matplotlib.pyplot as plt
from matplotlib.patches import FancyArrowPatch, Rectangle

HERE = Path(__file__).resolve().parent
RESULTS = HERE.parent.parent / "benchmarks" / "results" / "cpu-xeon-2-cores"
OURS, OTHER, LIMIT = "#1f77b4", "#9a9a9a", "#d62728"
RIGHT, WRONG, PALE = "#2a9d5c", "#c8553d", "#dfe8f1"
MIB = 2**20


def idea(path: Path) -> None:
    """Vocabulary -> one score per rollout -> group -> one coefficient per token -> vocabulary."""
    figure, ax = plt.subplots(figsize=(11, 3.5))
    ax.set_xlim(0, 110)
    ax.set_ylim(0, 38)
    ax.axis("off")
    rows = [(26, 9, RIGHT), (20, 6, WRONG), (14, 11, WRONG), (8, 7, RIGHT)]  # y, tokens, color
    for y, tokens, color in rows:
        for x, color_in, edge in ((2, PALE, "#7f9bb8"), (86, PALE, "#7f9bb8")):
            for i in range(3):  # a row of logits, drawn thrice for depth
                ax.add_patch(Rectangle((x + 0.5 * i, y - 0.4 * i), 18, 3.2, facecolor=color_in, edgecolor=edge, lw=0.6))
        ax.add_patch(Rectangle((32, y), 5, 3, facecolor=color, edgecolor="none"))
        for i in range(tokens):
            ax.add_patch(Rectangle((67 + 1.2 * i, y + 0.4), 1.0, 2.2, facecolor=color, edgecolor="none", alpha=0.85))
    ax.add_patch(Rectangle((45, 7), 14, 23, facecolor="#f4efe6", edgecolor="#b8a888", lw=0.8))
    ax.text(52, 20.5, "InfoNCE", ha="center", va="center", fontsize=11)
    ax.text(52, 16.2, "right against\nwrong rollouts\nof one prompt", ha="center", va="center", fontsize=8)
    arrows = ((22, 31), (38, 44.5), (59.5, 66.3), (80.5, 85.5))
    for start, stop in arrows:
        ax.add_patch(FancyArrowPatch((start, 18.5), (stop, 18.5), arrowstyle="-|>", mutation_scale=13, color="#444444"))
    titles = (
        (11, "logits [tokens, vocabulary]"), (34.5, "one score\nper rollout"), (52, "group"),
        (73, "one coefficient\nper token"), (96, "gradient [tokens, vocabulary]"),
    )  # fmt: skip
    for x, title in titles:
        ax.text(x, 33.8, title, ha="center", va="center", fontsize=9.5)
    notes = (
        (26.5, "one read,\nno softmax\nin memory"), (62.9, "mean over\ntokens"), (83, "one read,\none write,\nin place")
    )  # fmt: skip
    for x, note in notes:
        ax.text(x, 4.2, note, ha="center", va="center", fontsize=8, color="#444444")
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=130, bbox_inches="tight", facecolor="white")
    plt.close(figure)


def rows_of(name: str, op: str, shape: str) -> list[dict[str, Any]]:
    """Timed rows of an op, the fastest first; `limit` rows are what a copy or the bare GEMMs take."""
    rows = json.loads((RESULTS / name).read_text(encoding="utf-8"))["rows"]
    timed = [row for row in rows if row["op"] == op and row["shape"] == shape and row.get("seconds")]
    return sorted(timed, key=lambda row: row["seconds"]["median"])


def bars(ax: Any, rows: list[dict[str, Any]], value: str) -> None:
    """One bar per provider, its number at its end, and the limit as a line."""
    drawn = [row for row in rows if not row["provider"].startswith("limit")]
    limits = [row for row in rows if row["provider"].startswith("limit")]
    numbers = [row["seconds"]["median"] * 1e3 if value == "ms" else row["peak_bytes"] / MIB for row in drawn]
    names = [row["provider"].replace("selective_log_softmax", "").strip() for row in drawn]
    colors = [OURS if name == "conspo_kernels" else OTHER for name in names]
    places = list(range(len(drawn)))[::-1]
    ax.barh(places, numbers, color=colors, height=0.7)
    ax.set_yticks(places, names)
    for place, number in zip(places, numbers, strict=True):
        ax.text(number, place, f"  {number:,.0f}", va="center", fontsize=9)
    if value == "ms" and limits:
        limit = limits[0]["seconds"]["median"] * 1e3
        ax.axvline(limit, color=LIMIT, linewidth=1.2)
        ax.text(limit, len(drawn) - 0.35, f" {limits[0]['provider']} of the logits", color=LIMIT, fontsize=8)
    ax.set_xlim(0, max(numbers) * 1.18)
    ax.spines[["top", "right"]].set_visible(False)


def speed(path: Path) -> None:
    """Time and memory of log-probabilities and their gradient, beside the rivals of one run."""
    rows = rows_of("logits.json", "forward + in-place backward", "256 x 151,936 float32")
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 2.9), constrained_layout=True)
    bars(left, rows, "ms")
    left.set_xlabel("ms (less is better)")
    left.set_title("time: log-probabilities and gradient", fontsize=10, pad=16)
    bars(right, rows, "MiB")
    right.set_yticklabels([])
    right.set_xlabel("MiB beyond the logits (less is better)")
    right.set_title("peak memory", fontsize=10, pad=16)
    _save(figure, path)


def main() -> None:
    idea(HERE / "idea.png")
    speed(HERE / "speed.png")


if __name__ == "__main__":
    main()
