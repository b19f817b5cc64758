"""Prose to read byte by byte: what the Python standard library says about itself.

    python reproductions/concept-model/prose.py

One document of each module's docstrings and one of each help topic, 2.4 MB, as a token file where
the comparisons of this folder look for it. Code repeats itself to the letter; prose less.
"""

from __future__ import annotations

import ast
import json
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

from mukv.data.build import build_tokens

OUT = Path("runs/concept-model/prose")
SHORTEST = 80
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def documents() -> Iterator[str]:
    """Each docstring once; those shorter than `SHORTEST` characters say little."""
    root, seen = Path(sysconfig.get_path("stdlib")), set[str]()
    for path in sorted(root.rglob("*.py")):
        if "site-packages" in path.parts:
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, ValueError):  # files that tests read on purpose
            continue
        said = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, DOCUMENTED)]
        new = [text for text in said if text and len(text) > SHORTEST and text not in seen]
        new = list(dict.fromkeys(new))
        seen.update(new)
        if new:
            yield "\n\n".join(new)
    yield from topics.values()


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "prose.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents()))
        tokens = build_tokens([str(path)], OUT)
        print(OUT, tokens.fingerprint)


if __name__ == "__main__":
    main()
