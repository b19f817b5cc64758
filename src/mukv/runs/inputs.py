"""What a command line gives a model to read."""

from __future__ import annotations

import sys
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
    """Token ids from "1,2,3"."""
    try:
        return [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise BadInput(where, text, "whole numbers with commas between, such as 1,2,3") from None


def texts(paths: Iterable[Path], where: str) -> list[str]:
    """The texts of UTF-8 files; - is standard input, read once. where: names them in messages.
    Raises BadInput."""
    paths = list(paths)
    if paths.count(STANDARD_INPUT) > 1:
        raise BadInput(where, "-", "standard input once: it can be read only once")
    return [_text(path, where) for path in paths]


def _text(path: Path, where: str) -> str:
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
    if not text:
        raise BadInput(where, str(path), "a text that is not empty")
    return text


def _standard_input() -> bytes | str:
    """Bytes, so that they are UTF-8 wherever this runs; what stands in for it may have none."""
    stream = getattr(sys.stdin, "buffer", sys.stdin)
    return stream.read() if stream is not None else b""


def rows_of_text(model: Model, path: Path) -> list[np.ndarray]:
    """A text file as the ids of one document."""
    return [np.asarray(model.encode(_text(path, "--text")))]


def rows_of_ids(path: Path) -> list[np.ndarray]:
    """Rows of ids from a .npy file."""
    require_regular_file(path, "--tokens")
    try:
        found = np.load(path, allow_pickle=False)
    except OSError as error:
        raise BadInput("--tokens", str(path), f"a readable file ({error})") from None
    except Exception:
        # A foreign file takes numpy's parsers to errors of any kind, lack of memory among them.
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
    """Tokens that are read at once: as asked for, or as in training."""
    if length is None:
        return min(model.run.train.length, model.network.context or model.run.train.length)
    if length < 2:
        raise BadInput("--length", length, "at least 2 tokens")
    if model.network.context is not None and length > model.network.context:
        raise BadInput("--length", length, f"the model's context is {model.network.context} tokens")
    return length


def corpus(model: Model) -> TokenFile:
    """What a model was trained on. Raises BadInput where it is not here."""
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
