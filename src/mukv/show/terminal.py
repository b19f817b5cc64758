"""Consoles of rich, configured in one place to print text unchanged.

By default rich interprets `[x]` as markup and `:x:` as an emoji, so that a path may lose a part or
end a command with an error. Styles are given as an argument or as `Text`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from rich.console import Console as RichConsole
from rich.console import RenderableType
from rich.progress import TextColumn
from rich.table import Table
from rich.text import Text

from mukv.core.names import printable

LINES = "\n\t"
"""Control characters that a text of several lines may have; in a name they are escaped."""


WIDE = 200
"""Columns of an output that is no terminal, such as a file, where tables keep a line per row."""


class Console(RichConsole):
    """A console that prints every text and table cell unchanged, except escaped
    control characters.
    """

    def __init__(self, stderr: bool = False, quiet: bool = False, **options: Any) -> None:
        """options: further arguments of rich's Console"""
        fixed = {"markup": False, "emoji": False, "highlight": False}
        super().__init__(stderr=stderr, quiet=quiet, **{**options, **fixed})
        if not self.is_terminal and "width" not in options and "COLUMNS" not in os.environ:
            self.width = WIDE

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(printable(text, keep=LINES), **options)

    def say(self, text: str, style: str | None = None) -> None:
        """Print a line without wrapping, so that paths can be copied."""
        self.print(printable(text), style=style, soft_wrap=True)


class OneLineTable(Table):
    """A table whose cells have one line each, so that a name with a line break is one row."""

    def add_row(self, *cells: RenderableType | None, **options: Any) -> None:
        shown = (printable(cell) if isinstance(cell, str) else cell for cell in cells)
        super().add_row(*shown, **options)


def styled(*parts: str | tuple[str, str], keep: str = "") -> Text:
    """Join texts, some of them with a style: `styled("a ", ("b", "bold"))`.

    keep: control characters that are not escaped, such as LINES
    """
    shown = (part if isinstance(part, tuple) else (part, "") for part in parts)
    return Text.assemble(*((printable(text, keep), style) for text, style in shown))


def table(
    text: Sequence[str],
    numbers: Sequence[str],
    title: str | None = None,
    caption: str | None = None,
) -> Table:
    """Make a table without rules: text columns left-aligned, number columns right-aligned, nothing
    cut.
    """
    made = OneLineTable(title=title, caption=caption, box=None, pad_edge=False, padding=(0, 1))
    for name in text:
        made.add_column(name, overflow="fold")
    for name in numbers:
        made.add_column(name, justify="right", overflow="fold")
    return made


def column(field: str, style: str = "none") -> TextColumn:
    """Make a column of a progress bar from a field such as "task.description"."""
    return TextColumn(f"{{{field}}}", style=style, markup=False)
