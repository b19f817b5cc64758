"""The two exceptions of a command that fails; each message is one line.

`BadInput` is an error that the user corrects by typing something else. It is raised before any
compilation and ends the command with exit status 2. `Failed` is an error at run time and ends the
command with exit status 1.
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
"""Maximum number of characters of a value, a name or a path in an error."""
LONGEST_PHRASE = 480
"""Maximum number of characters of the allowed values in an error."""
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = LONGEST_VALUE
_SHORT.maxlist = _SHORT.maxtuple = _SHORT.maxdict = _SHORT.maxset = 20


class BadInput(ValueError):
    """The value of a field, file or flag is not allowed."""

    status = 2

    def __init__(self, where: str, given: object, allowed: str, nearest: str | None = None):
        """Build the message "where: got given; allowed; did you mean nearest?".

        where: the field, file or flag
        given: its value
        allowed: phrase that says which values are allowed; names of fields stand in `backquotes`
        nearest: the allowed name that is nearest to `given`; None for no suggestion

        Long values and phrases are shortened.
        """
        self.where, self.given, self.allowed, self.nearest = where, given, allowed, nearest
        hint = f"; did you mean {shown(nearest)}?" if nearest else ""
        allowed = shortened(allowed, LONGEST_PHRASE)
        super().__init__(f"{shortened(where, LONGEST_VALUE)}: got {shown(given)}; {allowed}{hint}")


class Failed(RuntimeError):
    """An error at run time. The message says what failed, where, and which data is safe."""

    status = 1

    def __init__(self, message: str):
        super().__init__(shortened(message, 6 * LONGEST_VALUE))


def shown(value: object) -> str:
    """Return `repr(value)`, shortened, for an error message. Never raises."""
    try:
        return shortened(_SHORT.repr(value), LONGEST_VALUE)
    except Exception:
        # An integer beyond Python's limit of digits, or an object whose `repr` fails.
        return f"a value of type {type(value).__name__}"


def nearest_name(name: str, names: Iterable[str]) -> str | None:
    """Return the one of `names` that is most similar to `name`, whatever the case of letters; None
    if none is similar."""
    if len(name) > LONGEST_VALUE:
        return None
    lower = {known.lower(): known for known in names}
    matches = difflib.get_close_matches(name.lower(), lower, n=1, cutoff=0.6)
    # difflib finds half of a short word different if two of its letters are swapped.
    swapped = [known for known in lower if sorted(known) == sorted(name.lower())]
    return lower[[*matches, *swapped][0]] if matches or swapped else None


def unknown_name(where: str, given: str, names: Iterable[str]) -> BadInput:
    """Return the error for a name that is not in a table.

    where: the field or flag. names: the allowed names.
    """
    names = sorted(names)
    return BadInput(where, given, f"allowed: {', '.join(names)}", nearest_name(given, names))


@contextmanager
def telling_disk_errors(path: Path) -> Iterator[None]:
    """Convert an OSError inside the block to a one-line error about `path`.

    Raises Failed for a full disk, and BadInput for a folder that can't be written, a path that
    another file or folder occupies, and a name that is too long. Other errors pass unchanged.
    """
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise Failed(f"{path}: the disk is full; nothing was left half-written") from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT):
            raise BadInput(
                str(path), "a folder that can't be written", "choose another folder"
            ) from error
        if error.errno in (errno.ENOTDIR, errno.EEXIST, errno.ENOTEMPTY, errno.EISDIR):
            raise BadInput(
                str(path), "a file or folder in the way", "choose another path"
            ) from error
        if error.errno == errno.ENAMETOOLONG:
            raise BadInput(str(path), "a name that is too long", "choose a shorter one") from error
        raise
