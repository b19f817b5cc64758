"""Build a byte-level token file of prose: the docstrings of the Python standard library.

    python reproductions/concept-model/prose.py

There is one document for each module's docstrings and for each help topic, 2.4 MB, in the token
file that the comparisons of this folder use. Code has more literal repetition than prose.
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
    """Yield one document per module or help topic, from docstrings longer than `SHORTEST` that are
    new.
    """
    root, seen = Path(sysconfig.get_path("stdlib")), set[str]()
    for path in sorted(root.rglob("*.py")):
        if "site-packages" in path.parts:
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, ValueError):  # test data
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
