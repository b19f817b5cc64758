"""Read one GGUF file (version 2 or 3, little-endian): its metadata, and its tensors by name.

The layout is described in llama.cpp's gguf.md. The header is parsed here because the reader of the
`gguf` package takes half a minute for a vocabulary of 262,144 tokens, and this one takes a second.
Sizes of blocks and dequantisation come from the package. A tensor is read when it is requested.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mukv.core.errors import BadInput, unknown_name
from mukv.core.typing import Float
from mukv.storage.files import require_regular_file

MAGIC = b"GGUF"
VERSIONS = (2, 3)
TYPES = (
    *("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"),
    *("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"),
)
"""Types of tensors that can be read."""
SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
"""Format character of `struct` for each scalar type of metadata."""
TEXT, LIST = 8, 9
MOST_DIMS = 4
ALIGNMENT = "general.alignment"


@dataclass(frozen=True)
class GgufTensor:
    """A tensor in the file.

    shape: shape in NumPy's order, rows first
    kind: name of the type
    start: offset of its first byte
    """

    shape: tuple[int, ...]
    kind: str
    start: int


class _Header:
    """A reader of the mapped file from its beginning. Raises ValueError beyond the end."""

    def __init__(self, data: mmap.mmap):
        self.data, self.place = data, 0

    def bytes(self, count: int) -> bytes:
        end = self.place + count
        if count < 0 or end > len(self.data):
            raise ValueError(f"it ends before byte {end:,}")
        found = self.data[self.place : end]
        self.place = end
        return found

    def number(self, code: str) -> Any:
        (found,) = struct.unpack("<" + code, self.bytes(struct.calcsize("<" + code)))
        return found

    def text(self) -> str:
        return self.bytes(self.number("Q")).decode()

    def value(self, kind: int) -> Any:
        if kind in SCALARS:
            return self.number(SCALARS[kind])
        if kind == TEXT:
            return self.text()
        if kind != LIST:
            raise ValueError(f"metadata of the unknown type {kind}")
        inner, count = self.number("I"), self.number("Q")
        if count > len(self.data):
            raise ValueError(f"a list of {count:,} entries")
        if inner in SCALARS:
            code = SCALARS[inner]
            size = struct.calcsize("<" + code)
            return list(struct.unpack(f"<{count}{code}", self.bytes(count * size)))
        return [self.value(inner) for _ in range(count)]


class GgufFile:
    """Metadata and tensors of one file.

    values: metadata by key
    tensors: tensors by llama.cpp's names

    Raises BadInput for a file that is not GGUF, is cut short, has the other byte order, or has
    tensors of a type that can't be read.
    """

    def __init__(self, path: Path):
        require_regular_file(path, "SOURCE")
        self.path = path
        self.sizes, self.dequantize = _library(path)
        with path.open("rb") as file:
            if file.read(4) != MAGIC:
                raise BadInput(str(path), "a file that is not GGUF", "one that begins with GGUF")
            self.data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        try:
            self._read()
        except (ValueError, RecursionError, struct.error) as error:
            if isinstance(error, BadInput):
                raise
            words = "lists within lists" if isinstance(error, RecursionError) else str(error)
            given = f"a file that can't be read ({words[:200]})"
            raise BadInput(str(path), given, "a whole GGUF file") from None

    def _read(self) -> None:
        header = _Header(self.data)
        header.bytes(4)
        version = header.number("I")
        if version not in VERSIONS:
            swapped = version & 0xFFFF == 0
            given = "the other byte order" if swapped else f"version {version}"
            raise BadInput(str(self.path), given, "little-endian GGUF of version 2 or 3")
        tensors, values = header.number("Q"), header.number("Q")
        self.values: dict[str, Any] = {}
        for _ in range(values):
            key = header.text()
            self.values[key] = header.value(header.number("I"))
        found: dict[str, GgufTensor] = {}
        for _ in range(tensors):
            name, dims = header.text(), header.number("I")
            if not 1 <= dims <= MOST_DIMS or name in found:
                raise ValueError(f"tensor {name!r} with {dims} dimensions, or twice")
            shape = tuple(header.number("Q") for _ in range(dims))[::-1]
            kind, start = header.number("I"), header.number("Q")
            if kind not in self.sizes:
                raise unknown_name(f"{self.path}: {name}: type", str(kind), TYPES)
            word = self.sizes[kind][0]
            if word not in TYPES:
                raise unknown_name(f"{self.path}: {name}: type", word, TYPES)
            found[name] = GgufTensor(shape, word, start)
        alignment = self.values.get(ALIGNMENT, 32)
        if not isinstance(alignment, int) or not 1 <= alignment <= 1 << 20:
            raise ValueError(f"{ALIGNMENT} {alignment}")
        first = -(-header.place // alignment) * alignment
        self.tensors = {
            name: GgufTensor(each.shape, each.kind, first + each.start)
            for name, each in found.items()
        }
        for name, each in self.tensors.items():
            length, size = self._block(each.kind)
            if each.shape[-1] % length:
                raise ValueError(f"{name}: rows of {each.shape[-1]} numbers in blocks of {length}")
            end = each.start + math.prod(each.shape) // length * size
            if end > len(self.data):
                raise ValueError(f"{name}: it ends before byte {end:,}")

    def _block(self, kind: str) -> tuple[int, int]:
        """Return how many numbers a block of a type has, and how many bytes."""
        return next((length, size) for name, length, size in self.sizes.values() if name == kind)

    def read(self, name: str, rows: slice = slice(None)) -> Float[np.ndarray, "..."]:
        """Read some rows of a tensor, as float16 if it is stored so, else as float32."""
        tensor = self.tensors[name]
        length, size = self._block(tensor.kind)
        start, stop, _ = rows.indices(tensor.shape[0])
        width = math.prod(tensor.shape[1:]) if len(tensor.shape) > 1 else 1
        if len(tensor.shape) == 1:  # a block may hold several rows of one number
            start, stop, width = 0, 1, tensor.shape[0]
        line = width // length * size
        place, count = tensor.start + start * line, max(0, stop - start)
        raw = np.frombuffer(self.data, np.uint8, count * line, place).reshape(count, line)
        found = self.dequantize(raw, tensor.kind)
        if len(tensor.shape) == 1:
            return found.reshape(-1)[rows]
        return found.reshape(count, *tensor.shape[1:])


def _library(path: Path) -> tuple[dict[int, tuple[str, int, int]], Callable[..., Any]]:
    """Load the `gguf` package.

    Returns, for each type, its name and the numbers and bytes of a block; and a function from bytes
    [row byte] and the name of a type to numbers [row number].
    """
    try:
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
        from gguf.quants import dequantize
    except ImportError:
        allowed = "needs the package for GGUF files: `pip install 'mukv[gguf]'`"
        raise BadInput("SOURCE", str(path), allowed) from None
    sizes = {int(kind): (kind.name, *GGML_QUANT_SIZES[kind]) for kind in GGMLQuantizationType}
    floats = {"F32": np.float32, "F16": np.float16}

    def numbers(raw: np.ndarray, kind: str) -> np.ndarray:
        if kind in floats:
            return raw.view(floats[kind])
        return dequantize(raw, GGMLQuantizationType[kind])

    return sizes, numbers
