"""The two ways in which a command can fail, each told in one line.

`BadInput` is what the user can mend by typing something else; it is raised before any compilation
and ends the command with status 2. `Failed` is what happened while running; it ends with status 1.
"""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path


class BadInput(ValueError):
    """A field, file or flag was given a value that can't work."""

    status = 2

    def __init__(self, where: str, given: object, allowed: str, nearest: str | None = None):
        """where: the field or file; given: its value; allowed: what would work, as a phrase."""
        self.where, self.given, self.allowed, self.nearest = where, given, allowed, nearest
        hint = f"; did you mean {nearest!r}?" if nearest else ""
        super().__init__(f"{where}: got {given!r}; {allowed}{hint}")


class Failed(RuntimeError):
    """Something went wrong while running: the message says what, where, and what is safe."""

    status = 1


def nearest_name(name: str, names: Iterable[str]) -> str | None:
    """The one of `names` that `name` was most likely meant to be, if any is near."""
    matches = difflib.get_close_matches(name, list(names), n=1, cutoff=0.6)
    return matches[0] if matches else None


def unknown_name(where: str, given: str, names: Iterable[str]) -> BadInput:
    """The error for a name that is not in a table."""
    names = sorted(names)
    return BadInput(where, given, f"allowed: {', '.join(names)}", nearest_name(given, names))


@contextmanager
def telling_disk_errors(path: Path) -> Iterator[None]:
    """Turn what the file system refuses into one clear line about `path`."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise Failed(f"{path}: the disk is full; nothing was left half-written") from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT):
            raise BadInput(str(path), "a folder that can't be written", "choose another") from error
        if error.errno in (errno.ENOTDIR, errno.EEXIST, errno.ENOTEMPTY, errno.EISDIR):
            raise BadInput(str(path), "something in the way", "choose another path") from error
        if error.errno == errno.ENAMETOOLONG:
            raise BadInput(str(path), "a name that is too long", "a shorter one") from error
        raise
