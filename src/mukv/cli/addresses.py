"""Give commands the local copies of the object store addresses (s3://, gs://) that were typed."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from mukv.core.errors import BadInput
from mukv.storage.copies import Copy, fetched
from mukv.storage.objects import address


def with_copies(params: Mapping[str, Any], first: str | None, copies: ExitStack) -> dict[str, Any]:
    """Return the arguments and options of a command with the paths of copies for addresses.

    first: name of the first argument; None if the command takes none

    What the command writes to `--out`, or without it into the folder of its first argument, is sent
    to the store while the command runs and when `copies` is closed. Raises BadInput for an address
    that several processes would write to.
    """
    beside = "out" in params and params["out"] is None

    def copied(value: Any, written: bool) -> Any:
        if isinstance(value, list | tuple):
            return type(value)(copied(each, False) for each in value)
        url = address(value) if isinstance(value, str | Path) else None
        if url is None:
            return value
        if written and params.get("distributed") is not None:
            allowed = "a folder that all processes share, such as a bucket that is mounted"
            raise BadInput("--out", url, allowed)
        if not written:
            return type(value)(fetched(url))
        return type(value)(copies.enter_context(Copy(url).written()))

    return {
        name: copied(value, name == "out" or (beside and name == first))
        for name, value in params.items()
    }
