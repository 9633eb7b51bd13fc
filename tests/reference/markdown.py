"""What the generated pages have in common."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

WRITTEN = "<!-- Written by `make reference` from the code. -->\n"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Cells hold Markdown, in one line; what would end a cell is escaped."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


def code(value: object) -> str:
    return f"`{value}`"


def prose(docstring: str) -> str:
    """A docstring as Markdown: its double backticks are single ones there."""
    return re.sub(r"``(.+?)``", r"`\1`", docstring, flags=re.DOTALL)
