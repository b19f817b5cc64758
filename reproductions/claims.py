"""Check every figure on a finding's page against its results.

    python reproductions/claims.py            # figures that pages lack, and figures without a claim
    python reproductions/claims.py shared-kv  # all sentences that a folder's page must contain

A folder's claims.py has `said()`, sentences and tables with figures computed from the results, and
`GIVEN`, sentences whose figures are settings or results of others. Each must be on the page, and
the rest of the page must have no decimal number, percentage, factor or table.
tests/test_reproductions.py checks that.
"""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
FIGURE = re.compile(
    r"[-+±]?\d[\d,]*\.\d+|[-+±]?\d[\d,]*(?= (?:%|times|x|points)(?![\w]))|\|[^|\n]*\d[^|\n]*\|"
)
"""Pattern of figures that need a claim: decimal numbers, percentages, factors, cells of tables."""


def read(claims: str, name: str = "results.json") -> Any:
    """Read results beside a claims.py (its __file__)."""
    return json.loads((Path(claims).parent / name).read_text())


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Format a table in Markdown. Bold marks are ignored, because pages may have bold cells."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines).replace("| --- ", "|---")


def percent(share: float, digits: int = 0) -> str:
    return f"{100 * share:.{digits}f} %"


def beyond(share: float, interval: Sequence[float] | None = None) -> str:
    """Format steps or bytes relative to those of another variant, with an interval."""
    ends = "" if interval is None else " ({:+.0f} to {:+.0f})".format(*(100 * x for x in interval))
    return f"{100 * share:+.0f} %{ends}"


def plain(page: str) -> str:
    """Return a page without code, pictures, targets of links, emphasis and line breaks."""
    page = re.sub(r"^```.*?^```", "", page, flags=re.M | re.S)
    page = re.sub(r"^    .*$", "", page, flags=re.M)
    page = re.sub(r"^!\[.*$", "", page, flags=re.M)
    page = re.sub(r"\]\([^)]*\)", "]", page)
    return flat(page)


def flat(text: str) -> str:
    text = re.sub(r"\|[ -]*---[-| ]*\|", "|", text.replace("**", ""))
    text = re.sub(r"\s*\|\s*", "|", text)
    return re.sub(r"\|+", lambda bars: bars.group()[:2], re.sub(r"\s+", " ", text)).strip()


def faults(page: str, claims: Iterable[str]) -> list[str]:
    """Return the claims that a page lacks, and its figures without a claim."""
    rest, found = plain(page), []
    for claim in sorted(map(flat, claims), key=len, reverse=True):
        if not re.search("[A-Za-z]{3}", claim):
            found.append(f"no words: {claim}")
        elif claim not in rest:
            found.append(f"not on the page: {claim}")
        else:
            # Each claim matches one place; remove its text, but keep its borders.
            rest = rest.replace(claim, " ... ", 1)
    rest = re.sub(r"`[^`]*`", "`...`", rest)
    for figure in FIGURE.finditer(rest):
        around = rest[max(figure.start() - 40, 0) : figure.end() + 30]
        found.append(f"no claim has: {figure.group()} in: ...{around}...")
    return found


def of(folder: Path) -> list[str]:
    """Return all that the page of a folder must contain."""
    if str(HERE) not in sys.path:
        sys.path.insert(0, str(HERE))
    name = f"claims_of_{folder.name.replace('-', '_')}"
    path = folder / ("claims.py" if folder != HERE else "overview.py")
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return [*module.said(), *module.GIVEN]


def folders() -> list[Path]:
    """Return the folders of all pages: those of the findings, and that of the overview."""
    return [HERE, *sorted(page.parent for page in HERE.glob("*/README.md"))]


def main() -> None:
    if asked := sys.argv[1:]:
        print("\n\n".join(of(HERE / asked[0])))
        return
    for folder in folders():
        for fault in faults((folder / "README.md").read_text(), of(folder)):
            print(f"{folder.name}: {fault}")


if __name__ == "__main__":
    main()
