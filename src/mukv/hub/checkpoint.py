"""Read a Hugging Face folder as a model: its configuration, and its weights as a stream.

Each tensor is read when it is needed and copied directly to its shards on the mesh, or to a file of
a run directory. Besides these, RAM holds at most four tensors and the mapping of one file.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections import deque
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mukv.core.errors import BadInput, nearest_name, unknown_name
from mukv.core.mesh import specification
from mukv.core.params import LAYER, Param, named
from mukv.core.typing import Array
from mukv.core.version import VERSION
from mukv.data.tokenizer import AnyTokenizer, find_tokenizer
from mukv.hub import FAMILIES, Family, gguf, meta
from mukv.hub.base import (
    WeightPiece,
    WeightSource,
    check,
    grouped_by_weight,
    nested,
    pieces,
    together,
)
from mukv.hub.gguf_tokenizer import tokenizer_files
from mukv.hub.multimodal import TextTensors, text_part
from mukv.hub.settings import LARGEST, Given, read_json
from mukv.model import Decoder
from mukv.storage.compact import Converter, stacked
from mukv.storage.files import cache_folder, file_inside, new_folder, write_atomic
from mukv.storage.tensors import Spec, TensorFiles

CONFIG = "config.json"
GENERATION = "generation_config.json"
SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")
COMPANIONS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "tokenizer.model",
    "chat_template.jinja",
    GENERATION,
)
"""Files that are copied in both directions."""
IGNORED = r"rotary_emb\.inv_freq$|^(transformer\.)?h\.\d+\.attn\.(masked_)?bias$"
"""Old files contain these buffers: frequencies, and the causal mask of GPT-2."""
HEAD = "lm_head.weight"
ALIGNMENT = 64
"""Bytes; JAX copies arrays that begin elsewhere."""
COPIERS = 2
"""Threads that copy tensors; more than one, since new memory is slow to write first."""
AHEAD = 2
"""Tensors that are read before the copy of an earlier one is finished."""
TILE = 16
"""Numbers of one row that are copied at once: as many of float32 as fit a line of a CPU's cache."""
ROWS = 4096
"""Rows of an embedding that are compared at once."""


@dataclass(frozen=True)
class Checkpoint:
    """An open checkpoint.

    architecture: name of the model class in Hugging Face's format
    source: source of the tensors
    pieces: every tensor of the checkpoint, with our weight that it holds
    """

    folder: Path
    architecture: str
    model: Decoder
    source: WeightSource
    pieces: tuple[WeightPiece, ...]
    tokenizer: AnyTokenizer
    special: dict[str, Any]
    """Ids of tokens that begin, end and pad a text."""

    def place(self, mesh: Mesh) -> dict[str, Any]:
        """Read the weights onto a mesh, in the dtypes of the files."""
        declared = named(self.model.params())
        made: dict[str, Any] = {}
        if mesh.size == 1 and mesh.devices.item().platform == "cpu":
            sharding = NamedSharding(mesh, PartitionSpec())
            made = jax.device_put(self._in_host_memory(declared), sharding)
            return nested({name: made[name] for name in declared})
        for piece in self._by_file():
            dims = piece.param.dims
            layer = jax.make_array_from_callback(
                piece.param.shape,
                NamedSharding(mesh, specification(dims, mesh)),
                partial(piece.read, self.source),
            )
            if not piece.place:
                made[piece.ours] = layer
                continue
            if piece.ours not in made:
                whole = declared[piece.ours]
                sharding = NamedSharding(mesh, specification(whole.dims, mesh))
                made[piece.ours] = jnp.zeros(whole.shape, layer.dtype, device=sharding)
            made[piece.ours] = _put(made[piece.ours], layer, jnp.asarray(piece.place))
            # One program at a time: simulated devices share their threads.
            jax.block_until_ready(made[piece.ours])
        return nested({name: made[name] for name in declared})

    def _by_file(self) -> list[WeightPiece]:
        """Return the pieces in the order of the files, so that each file is mapped once."""
        return sorted(self.pieces, key=lambda piece: str(self.source.tensors[piece.theirs].file))

    def _in_host_memory(self, declared: Mapping[str, Param]) -> dict[str, np.ndarray]:
        """Read each weight into one array, which JAX takes on a CPU without a copy."""
        types = {piece.ours: self.source.tensors[piece.theirs].dtype for piece in self.pieces}
        made = {name: aligned(declared[name].shape, types[name]) for name in types}
        # Other threads copy tensors while this one reads the next.
        with ThreadPoolExecutor(COPIERS) as threads:
            copies: deque[Future[None]] = deque()
            for piece in self._by_file():
                into = made[piece.ours][piece.place]
                copies.append(threads.submit(copy_into, into, piece.read(self.source)))
                if len(copies) > AHEAD:
                    copies.popleft().result()
            for each in copies:
                each.result()
        return made

    def compact(self, kind: str) -> dict[str, Any]:
        """Read the weights tensor by tensor and convert them to a format of `core.compact`.

        Raises BadInput for an unknown format and for numbers that are not finite.
        """
        converter = Converter(kind, self.folder)
        made: dict[str, Any] = {}
        declared = named(self.model.params())
        for name, parts in grouped_by_weight(self.pieces).items():
            whole = declared[name]
            own = replace(whole, dims={n: s for n, s in whole.dims.items() if n != LAYER})
            layers = groupby(parts, key=lambda part: part.place[:1])
            reads = [partial(together, list(each), self.source) for _, each in layers]
            found = [converter(name, own, read) for read in reads]
            made[name] = stacked(found) if parts[0].place else found[0]
        return nested({name: made[name] for name in declared})

    def specs(self) -> dict[str, Spec]:
        """Return the weights as tensors to be written, by our names."""
        declared = named(self.model.params())
        specs: dict[str, Spec] = {}
        for name, parts in grouped_by_weight(self.pieces).items():

            def read(parts: list[WeightPiece] = parts) -> Iterable[np.ndarray]:
                return (block for part in parts for block in part.blocks(self.source))

            dtype = self.source.tensors[parts[0].theirs].dtype
            specs[name] = Spec(declared[name].shape, dtype, read)
        return specs


@partial(jax.jit, donate_argnums=0)
def _put(whole: Array, part: Array, place: Array) -> Array:
    """Put a piece into its place in the stack. place: its indices along the first axes

    The arrays are copied as integers, because on a CPU an update of a bfloat16 stack converts all
    of it to float32 and back, which takes fifteen times as long.
    """
    bits = jnp.dtype(f"uint{8 * whole.dtype.itemsize}")
    stack, layer = (jax.lax.bitcast_convert_type(array, bits) for array in (whole, part))
    start = [*place, *[0] * part.ndim]
    stack = jax.lax.dynamic_update_slice(stack, layer[(None,) * len(place)], start)
    return jax.lax.bitcast_convert_type(stack, whole.dtype)


def aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Return an array that begins at a multiple of ALIGNMENT, not initialised."""
    size = math.prod(shape) * dtype.itemsize
    room = np.empty(size + ALIGNMENT, np.uint8)
    start = -room.ctypes.data % ALIGNMENT
    return room[start : start + size].view(dtype).reshape(shape)


def copy_into(into: np.ndarray, given: np.ndarray) -> None:
    """Copy an array, which may be a transposed view, to one of the same shape and dtype.

    A view whose last axis is not contiguous is copied in columns of TILE. NumPy would read one
    number of every cache line at a time, which takes six times as long if the rows are a power of
    two apart.
    """
    if given.ndim < 2 or given.strides[-1] == given.itemsize:
        into[...] = given
        return
    for start in range(0, given.shape[-1], TILE):
        into[..., start : start + TILE] = given[..., start : start + TILE]


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder contains a checkpoint's configuration; only `open_checkpoint` checks the
    rest.
    """
    return (folder / CONFIG).is_file() or meta.is_meta(folder)


def companions(folder: Path) -> list[Path]:
    """Return the files of a folder that are copied with the weights.

    Raises BadInput for a file that is not regular, and for a link to a file outside of the folder,
    because its content would be copied.
    """
    return [file_inside(folder, name) for name in COMPANIONS if os.path.lexists(folder / name)]


def companion_folder(source: str | Path) -> Path:
    """Return the folder of a model's tokenizer and chat template; for a GGUF file it is in the
    user's cache. Raises BadInput for a GGUF file that can't be read.
    """
    folder = Path(source)
    return open_gguf(folder).folder if gguf.is_gguf(folder) else folder


def open_checkpoint(folder: Path) -> Checkpoint:
    """Open a Hugging Face folder, or one in Meta's format. Names and shapes of all tensors are
    compared with the configuration. Raises BadInput for a folder that can't be read.
    """
    if meta.is_meta(folder):
        return _opened(folder, *meta.open_meta(folder), {})
    path = file_inside(folder, CONFIG)
    whole = read_json(path)
    inside = text_part(whole, path)
    config = inside or whole
    family = _family(config, path)
    model = family.read(Given(config, str(path)))
    source: WeightSource = TensorFiles(folder)
    source = TextTensors(source) if inside else source
    special = {key: config.get(key, family.defaults[key]) for key in SPECIAL}
    _check_ids(special, path)
    found = pieces(family.rules_for(source.tensors), model)
    return _opened(folder, family.architecture, model, source, found, special)


def _opened(
    folder: Path,
    architecture: str,
    model: Decoder,
    source: WeightSource,
    found: Iterable[WeightPiece],
    special: dict[str, Any],
) -> Checkpoint:
    found = tuple(found)
    copied = {path.name: path for path in companions(folder)}
    tied = f"|^{re.escape(HEAD)}$" if model.readout == "tied" else ""
    further = FAMILIES[architecture].ignored(model)
    check(found, source, str(folder), f"{IGNORED}{tied}|{further}")
    for name, parts in grouped_by_weight(found).items():
        types = {source.tensors[part.theirs].dtype for part in parts}
        if len(types) > 1:
            allowed = "one type in all layers"
            raise BadInput(f"{folder}: {name}", sorted(map(str, types)), allowed)
    if tied and (HEAD in source.tensors):
        embedding = next(piece.theirs for piece in found if piece.ours == "embedding")
        _check_tied(source, embedding, folder)
    path = folder / "tokenizer.json"
    tokenizer = find_tokenizer(path)
    if tokenizer.text_vocab_size > model.vocab_size:
        raise BadInput(
            str(path),
            f"{tokenizer.text_vocab_size} ids",
            f"at most the model's {model.vocab_size}: it is another model's tokenizer",
        )
    if generation := copied.get(GENERATION):
        ids = {key: v for key, v in read_json(generation).items() if key.endswith("_token_id")}
        _check_ids(ids, generation)
        special |= ids
    return Checkpoint(folder, architecture, model, source, found, tokenizer, special)


def _check_ids(special: dict[str, Any], path: Path) -> None:
    """Raise BadInput unless the ids of special tokens are whole numbers, lists of them or null."""
    for key, value in special.items():
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(type(token) is int and abs(token) <= LARGEST for token in ids):
            raise BadInput(f"{path}: {key}", value, "a token's id, a list of ids or null")


def _check_tied(source: WeightSource, embedding: str, folder: Path) -> None:
    """Raise BadInput unless the readout, where present, equals the embedding that it is tied to."""
    if source.tensors[HEAD].shape != source.tensors[embedding].shape:
        allowed = f"tie_word_embeddings is true: {list(source.tensors[embedding].shape)}"
        raise BadInput(f"{folder}: {HEAD}", list(source.tensors[HEAD].shape), allowed)
    rows = source.tensors[embedding].shape[0]
    for start in range(0, rows, ROWS):
        cut = (slice(start, min(start + ROWS, rows)), slice(None))
        if not np.array_equal(source.read(embedding, cut), source.read(HEAD, cut)):
            allowed = f"tie_word_embeddings is true: equal to {embedding}"
            raise BadInput(f"{folder}: {HEAD}", "other numbers", allowed)


def _family(config: dict[str, Any], path: Path) -> Family:
    names = config.get("architectures")
    if not isinstance(names, list) or not names or not isinstance(names[0], str):
        allowed = f"a list with one of: {', '.join(FAMILIES)}"
        raise BadInput(f"{path}: architectures", names, allowed)
    if names[0] not in FAMILIES:
        raise unknown_name(f"{path}: architectures", names[0], FAMILIES)
    return FAMILIES[names[0]]


def end_ids(special: dict[str, Any]) -> tuple[int, ...]:
    """Return the ids that end a text, of which there may be none."""
    value = special.get("eos_token_id")
    ids = value if isinstance(value, list) else [value]
    return tuple(token for token in ids if type(token) is int and abs(token) <= LARGEST)


def is_hub_id(source: str) -> bool:
    """Whether a source that is not a path may be the name of a model on the hub."""
    named_like_one = re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w.-]+)?", source) is not None
    a_file = source.endswith((".yaml", ".yml"))
    return named_like_one and not a_file and not Path(source).parent.exists()


def open_gguf(path: Path) -> Checkpoint:
    """Open a GGUF file. Raises BadInput for a file that can't be read.

    Making the tokenizer from the metadata takes seconds, so that the tokenizer is saved in the
    user's cache as files of a Hugging Face folder.
    """
    files = gguf.GgufFiles(path)
    family, model, found = gguf.read_gguf(files)
    special = {key: files.config.get(key, family.defaults[key]) for key in SPECIAL}
    whole = path.resolve()
    about = f"{VERSION} {whole} {path.stat().st_size} {path.stat().st_mtime_ns}"
    folder = cache_folder() / "gguf" / hashlib.sha256(about.encode()).hexdigest()[:16]
    if not folder.is_dir():
        made = tokenizer_files(files.metadata.values, files.metadata.architecture, str(path))
        with new_folder(folder) as place:
            for name, text in made.items():
                write_atomic(place / name, text)
    return _opened(folder, family.architecture, model, files, found, special)


def find(source: str | Path) -> Checkpoint | None:
    """Open the checkpoint of a folder, GGUF file or hub id; None if the source is none of these."""
    folder = Path(source)
    if gguf.is_gguf(folder):
        return open_gguf(folder)
    if is_checkpoint(folder):
        return open_checkpoint(folder)
    if not folder.exists() and is_hub_id(str(source)):
        from mukv.hub.download import download

        return open_checkpoint(download(str(source)))
    return None


def require(source: str | Path) -> Checkpoint:
    """Open the checkpoint of a folder, GGUF file or hub id. Raises BadInput for anything else."""
    checkpoint = find(source)
    if checkpoint is not None:
        return checkpoint
    folder = Path(source)
    near = [path.parent.name for path in folder.parent.glob(f"*/{CONFIG}")]
    raise BadInput(
        "SOURCE",
        str(source),
        f"a folder with {CONFIG} and .safetensors, a .gguf file, or a hub id such as "
        "meta-llama/Llama-3.2-1B",
        nearest_name(folder.name, near),
    )
