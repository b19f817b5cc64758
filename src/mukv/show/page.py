"""Make a self-contained HTML page: tables and pictures are embedded."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

from mukv.core.names import printable
from mukv.storage.files import write_atomic

STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }
h1, h2, h3 { line-height: 1.2; }
h2 { margin-top: 2.5rem; border-bottom: 1px solid #8886; }
.wide { overflow-x: auto; margin: 1.5rem 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 0.9rem; }
th, td { padding: 0.25rem 0.7rem; border-bottom: 1px solid #8883; text-align: right; }
th:first-child, td:first-child, td.text { text-align: left; }
caption { caption-side: bottom; text-align: left; padding: 0.4rem 0; color: #888; }
figure { margin: 1.5rem 0; }
img { max-width: 100%; height: auto; background: white; border-radius: 4px; }
figcaption, .note { color: #888; font-size: 0.9rem; }
h1, h2, h3, p, th, td, caption, figcaption { white-space: pre-wrap; }
"""


@dataclass
class Page:
    """An HTML page whose parts are added from top to bottom; all text is escaped."""

    title: str
    parts: list[str] = field(default_factory=list)

    def heading(self, text: str, level: int = 2) -> None:
        self.parts.append(f"<h{level}>{shown(text)}</h{level}>")

    def text(self, text: str) -> None:
        self.parts.append(f"<p>{shown(text)}</p>")

    def note(self, text: str) -> None:
        """Add a note in small print, such as one on missing data."""
        self.parts.append(f'<p class="note">{shown(text)}</p>')

    def table(
        self, columns: Sequence[str], rows: Iterable[Sequence[object]], caption: str | None = None
    ) -> None:
        """Add a table. The first column is a name; cells that begin like a number are
        right-aligned.
        """
        head = "".join(f"<th>{shown(column)}</th>" for column in columns)
        body = "".join("<tr>" + "".join(map(_cell, row)) + "</tr>" for row in rows)
        below = "" if caption is None else f"<caption>{shown(caption)}</caption>"
        self.parts.append(
            f'<div class="wide"><table>{below}<thead><tr>{head}</tr></thead>'
            f"<tbody>{body}</tbody></table></div>"
        )

    def picture(self, picture: Path | bytes, caption: str) -> None:
        """Embed a PNG."""
        content = picture.read_bytes() if isinstance(picture, Path) else picture
        data = base64.b64encode(content).decode()
        self.parts.append(
            f'<figure><img alt="{shown(caption)}" src="data:image/png;base64,{data}">'
            f"<figcaption>{shown(caption)}</figcaption></figure>"
        )

    def html(self) -> str:
        """Return the whole page."""
        return (
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{shown(self.title)}</title><style>{STYLE}</style></head>\n"
            f"<body><h1>{shown(self.title)}</h1>\n" + "\n".join(self.parts) + "\n</body></html>\n"
        )

    def save(self, path: Path) -> None:
        write_atomic(path, self.html())


def shown(text: object) -> str:
    """Escape a text for HTML; control characters become escapes."""
    return escape(printable(text))


def _cell(cell: object) -> str:
    text = str(cell)
    number = not text or text[0] in "+-." or text[0].isdecimal()
    return f"<td>{shown(text)}</td>" if number else f'<td class="text">{shown(text)}</td>'
