"""What a command line gives a model to read, and how its answer is shown while it comes."""

from __future__ import annotations

import codecs
from pathlib import Path
from typing import TextIO

import numpy as np

from mukv.core.errors import BadInput
from mukv.data.tokenizer import AnyTokenizer
from mukv.loaded import Model


def ids(text: str, where: str) -> list[int]:
    """Token ids from "1,2,3"."""
    try:
        return [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise BadInput(where, text, "whole numbers with commas between, such as 1,2,3") from None


def rows_of_text(model: Model, path: Path) -> list[np.ndarray]:
    """A text file as the ids of one document."""
    try:
        text = path.read_bytes().decode("utf-8")
    except OSError as error:
        raise BadInput("--text", str(path), f"a readable file ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise BadInput(
            "--text", str(path), f"UTF-8 text; byte {error.start} is not part of any"
        ) from None
    if not text:
        raise BadInput("--text", str(path), "a text that is not empty")
    return [np.asarray(model.encode(text))]


def rows_of_ids(path: Path) -> list[np.ndarray]:
    """Rows of ids from a .npy file."""
    try:
        found = np.load(path, allow_pickle=False)
    except OSError as error:
        raise BadInput("--tokens", str(path), f"a readable file ({error})") from None
    except (ValueError, EOFError) as error:
        raise BadInput("--tokens", str(path), f"an array written by numpy.save ({error})") from None
    if (
        not isinstance(found, np.ndarray)
        or found.ndim not in (1, 2)
        or found.dtype.kind not in "iu"
    ):
        shape = getattr(found, "shape", None)
        raise BadInput("--tokens", shape, "whole numbers of shape [token] or [row token]")
    return list(np.atleast_2d(found))


class Stream:
    """Prints tokens as they come, holding back the bytes of a character that is not complete."""

    def __init__(self, tokenizer: AnyTokenizer, out: TextIO):
        self.tokenizer, self.out = tokenizer, out
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def show(self, fresh: list[list[int]]) -> None:
        """New tokens of each row; the first row is shown."""
        data = b"".join(self.tokenizer.token_data(token) for token in fresh[0])
        self.out.write(self.decoder.decode(data))
        self.out.flush()
