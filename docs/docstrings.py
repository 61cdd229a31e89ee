"""Docstrings as the site shows them: `Returns:`, `Cost:` and `Source:` are paragraphs.

Griffe takes `Cost: text` with indented lines below it for a box with its first line as the title, and the words before
a colon in `Returns:` for a type. Lines are joined here, on the way into the site; the sources keep the form that reads
well in an editor.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

WORDS = r"Cost\b[^:\n]*|Source|Returns, Raises|Args, Returns, Raises|Cost, Returns, Raises, Source"
PARAGRAPH = re.compile(rf"^(({WORDS}): *\S|Returns:$)")
ARGS = re.compile(r"^Args:\n((?:    .*\n?)+)", re.MULTILINE)
ENTRY = re.compile(r"^    \S.*\n?(?:     .*\n?)*", re.MULTILINE)
POINTER = re.compile(r"\w+(?:, \w+)+: as\s|(?:Others|All|As)\b")  # to the arguments of another function


def joined(text: str) -> str:
    """The docstring with each of these paragraphs on one line, its word in bold."""
    lines: list[str] = []
    inside = False
    for line in ARGS.sub(_pointers_as_sentences, text).splitlines():
        if inside and line.startswith("    "):
            lines[-1] += " " + line.strip()
            continue
        inside = PARAGRAPH.match(line) is not None
        word, _, rest = line.partition(":")
        lines.append(f"**{word}:**{rest}" if inside else line)
    return "\n".join(lines)


def _pointers_as_sentences(match: re.Match[str]) -> str:
    """Of `Args:`, what only points to another function is a sentence, and no row of the table."""
    entries = [" ".join(entry.split()) for entry in ENTRY.findall(match[1])]
    pointers = [entry for entry in entries if POINTER.match(entry)]
    rows = [entry for entry in ENTRY.findall(match[1]) if not POINTER.match(entry.lstrip())]
    parts = [f"**Arguments:** {' '.join(pointers)}\n"] if pointers else []
    return "\n".join([*parts, *(["Args:\n" + "".join(rows)] if rows else [])])


class Docstrings(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = joined(obj.docstring.value)
