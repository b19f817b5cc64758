"""The version of the package, and the commit of its source."""

from __future__ import annotations

import subprocess
from pathlib import Path

VERSION = "0.1.0"
"""The version's only definition: the build and `mukv.__version__` read it here."""


def commit() -> str | None:
    """Return the git commit of the source; None outside a git checkout."""
    folder = Path(__file__).parent
    try:
        found = subprocess.run(
            ["git", "-C", str(folder), "rev-parse", "HEAD"],
            capture_output=True,
            text=True,
            timeout=5,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip()
