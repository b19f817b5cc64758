"""Read the texts and token ids that a command line names, and check them against a model."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from mukv.core.errors import BadInput
from mukv.data.tokens import TokenFile
from mukv.runs.loaded import Model
from mukv.runs.resolve import open_corpus
from mukv.storage.files import require_regular_file

STANDARD_INPUT = Path("-")


def ids(text: str, where: str) -> list[int]:
    """Parse token ids from a text such as "1,2,3".

    where: name of the option, for messages

    Raises BadInput for a text that is not a list of whole numbers.
    """
    try:
        # A comma at the end is allowed.
        return [int(part) for part in text.strip().removesuffix(",").split(",")] if text else []
    except ValueError:
        raise BadInput(where, text, "whole numbers with commas between, such as 1,2,3") from None


def texts(paths: Iterable[Path], where: str, empty: bool = False) -> list[str]:
    """Read UTF-8 text files; the path - is standard input.

    where: name of the option, for messages
    empty: whether a text may be empty

    Raises BadInput for files that can't be read or are not UTF-8, for a text that is empty and may
    not be, and if - is given twice.
    """
    paths = list(paths)
    if paths.count(STANDARD_INPUT) > 1:
        raise BadInput(where, "-", "standard input once: it can be read only once")
    return [_text(path, where, empty) for path in paths]


def _text(path: Path, where: str, empty: bool = False) -> str:
    if path == STANDARD_INPUT:
        found = _standard_input()
    else:
        require_regular_file(path, where)
        try:
            found = path.read_bytes()
        except OSError as error:
            raise BadInput(where, str(path), f"a readable file ({error.strerror})") from None
    try:
        text = found if isinstance(found, str) else found.decode("utf-8")
    except UnicodeDecodeError as error:
        allowed = f"UTF-8 text; byte {error.start} is not part of any"
        raise BadInput(where, str(path), allowed) from None
    if not text and not empty:
        raise BadInput(where, str(path), "a text that is not empty")
    return text


def _standard_input() -> bytes | str:
    """Read standard input as bytes, so that the locale does not choose its encoding. If sys.stdin
    was replaced by a stream without `buffer`, read text."""
    stream = getattr(sys.stdin, "buffer", sys.stdin)
    return stream.read() if stream is not None else b""


def rows_of_text(model: Model, path: Path) -> list[np.ndarray]:
    """Encode a text file as one document; returns one row of ids [token]."""
    return [np.asarray(model.encode(_text(path, "--text")))]


def rows_of_ids(path: Path) -> list[np.ndarray]:
    """Read rows of token ids from a .npy file: integers [token] or [row token]. Raises BadInput for
    any other file."""
    require_regular_file(path, "--tokens")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about headers that older versions of Python wrote
            with path.open("rb") as file:
                found = np.load(file, allow_pickle=False)
    except OSError as error:
        raise BadInput("--tokens", str(path), f"a readable file ({error})") from None
    except Exception:
        # Other files make numpy's parsers raise errors of any kind, MemoryError included.
        raise BadInput(
            "--tokens", str(path), "an array written by numpy.save, of numbers"
        ) from None
    if not isinstance(found, np.ndarray):
        raise BadInput("--tokens", str(path), "one array, written by numpy.save")
    if found.ndim not in (1, 2) or found.dtype.kind not in "iu" or not found.size:
        given = f"{found.dtype} of shape {found.shape}"
        raise BadInput("--tokens", given, "whole numbers of shape [token] or [row token]")
    return list(np.atleast_2d(found))


def window(model: Model, length: int | None) -> int:
    """Return the window length in tokens: `length`, or if it is None the length of training rows,
    but at most the model's context. Raises BadInput for a length below 2 or above the model's
    context."""
    if length is None:
        return min(model.run.train.length, model.network.context or model.run.train.length)
    if length < 2:
        raise BadInput("--length", length, "at least 2 tokens")
    if model.network.context is not None and length > model.network.context:
        raise BadInput("--length", length, f"the model's context is {model.network.context} tokens")
    return length


def corpus(model: Model) -> TokenFile:
    """Open the token file that a model was trained on. Raises BadInput if it can't be opened."""
    try:
        return open_corpus(model.run, model.tokenizer)
    except BadInput as error:
        raise BadInput(
            "MODEL", str(model.run.data.path), f"{error}; give a text with --text or --tokens"
        ) from None


def check_ids(model: Model, ids: np.ndarray) -> None:
    """Raise BadInput for ids that the model does not have."""
    worst = int(ids.min() if ids.min() < 0 else ids.max())
    if not 0 <= worst < model.network.vocab_size:
        raise BadInput("tokens", worst, f"token ids go from 0 to {model.network.vocab_size - 1}")
