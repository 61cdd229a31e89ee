"""Equations of the site: LaTeX becomes MathML when the site is built, so a page downloads nothing to show it.

`pymdownx.arithmatex` finds `$...$` and `$$...$$` outside of code. GitHub renders the same signs in the sources.
"""

from __future__ import annotations

import html
import re
from typing import Any

from latex2mathml.converter import convert

FOUND = re.compile(r'<(div|span) class="arithmatex">\\[\[(](.*?)\\[\])]</\1>', re.DOTALL)


def on_page_content(content: str, **_: Any) -> str:
    """A hook of mkdocs: the page's HTML with MathML in place of LaTeX."""
    return FOUND.sub(_mathml, content)


def _mathml(match: re.Match[str]) -> str:
    tag, latex = match[1], html.unescape(match[2]).strip()
    block = tag == "div"
    mathml = convert(latex, display="block" if block else "inline")
    if "\\" in mathml or "<mi>&</mi>" in mathml:  # latex2mathml prints what it does not know
        raise ValueError(f"latex2mathml does not know all of {latex!r}: {mathml}")
    return f'<div class="equation">{mathml}</div>' if block else mathml
