"""The two ways in which a command can fail, each told in one line.

`BadInput` is what the user can mend by typing something else; it is raised before any compilation
and ends the command with status 2. `Failed` is what happened while running; it ends with status 1.
"""

from __future__ import annotations

import difflib
import errno
import reprlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from mukv.core.names import shortened

LONGEST_VALUE = 160
"""Characters of a value, a name or a path that an error shows."""
LONGEST_PHRASE = 480
"""Characters of what would have been allowed."""
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = LONGEST_VALUE
_SHORT.maxlist = _SHORT.maxtuple = _SHORT.maxdict = _SHORT.maxset = 20


class BadInput(ValueError):
    """A field, file or flag was given a value that can't work."""

    status = 2

    def __init__(self, where: str, given: object, allowed: str, nearest: str | None = None):
        """where: the field or file; given: its value; allowed: what would work, as a phrase, in
        which `backquotes` hold names of fields. What is long is shown in part."""
        self.where, self.given, self.allowed, self.nearest = where, given, allowed, nearest
        hint = f"; did you mean {shown(nearest)}?" if nearest else ""
        allowed = shortened(allowed, LONGEST_PHRASE)
        super().__init__(f"{shortened(where, LONGEST_VALUE)}: got {shown(given)}; {allowed}{hint}")


class Failed(RuntimeError):
    """Something went wrong while running: the message says what, where, and what is safe."""

    status = 1

    def __init__(self, message: str):
        super().__init__(shortened(message, 6 * LONGEST_VALUE))


def shown(value: object) -> str:
    """A value as an error shows it: in part where it is long. Never raises."""
    try:
        return shortened(_SHORT.repr(value), LONGEST_VALUE)
    except Exception:
        # A number beyond Python's limit of digits, or an object whose `repr` fails.
        return f"a value of type {type(value).__name__}"


def nearest_name(name: str, names: Iterable[str]) -> str | None:
    """The one of `names` that `name` was most likely meant to be, if any is near."""
    if len(name) > LONGEST_VALUE:
        return None
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
