"""Write and read provenance.json: version, devices and data fingerprint of a run."""

from __future__ import annotations

import json
import platform
import time
from pathlib import Path
from typing import Any

import jax

from mukv.core.errors import BadInput
from mukv.core.version import VERSION, commit
from mukv.data.feed import Origin
from mukv.storage.checkpoint import Checkpoints

FILE = "provenance.json"


def record(origin: Origin) -> dict[str, Any]:
    """Return the content of provenance.json, which is written before the first step."""
    device = jax.devices()[0]
    return {
        "mukv": VERSION,
        "commit": commit(),
        "jax": jax.__version__,
        "python": platform.python_version(),
        "devices": f"{jax.device_count()} x {device.device_kind} ({device.platform})",
        "processes": jax.process_count(),
        "data_fingerprint": origin.fingerprint,
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def noted(folder: Path, key: str) -> str | None:
    """Return the text of a key in a folder's provenance.json; None if it can't be read."""
    try:
        found = json.loads((folder / FILE).read_text("utf-8"))[key]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return found if isinstance(found, str) else None


def is_untrained(folder: Path) -> bool:
    """Whether a run directory was made by `mukv import` or `mukv convert`, not by training."""
    return any(noted(folder, key) for key in ("imported_from", "converted_from"))


def began_with(folder: Path, origin: Origin) -> str | None:
    """Return the fingerprint of the data that a run began with.

    origin: the present data, whose fingerprint the message of an error contains

    If the fingerprint can't be read, returns None if the run has no checkpoint, and raises BadInput
    if it has one.
    """
    path, found = folder / FILE, noted(folder, "data_fingerprint")
    if found is not None:
        return found
    with Checkpoints(folder / "checkpoints", read_only=True) as checkpoints:
        if checkpoints.latest() is None:
            return None
    given = "missing" if not path.exists() else "something in the way, or damaged"
    raise BadInput(
        f"{path}: data_fingerprint",
        given,
        "the fingerprint of the data that the run began with; if data.path still has it, write "
        f"{json.dumps({'data_fingerprint': origin.fingerprint})} into this file",
    )
