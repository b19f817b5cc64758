"""Read Meta's own format of Llama: params.json and consolidated.*.pth.

Each .pth file has a shard of every large tensor (model parallelism). Meta rotates heads in
interleaved pairs, which are converted to rotated halves, as in Hugging Face's format. Reading the
files needs torch.
"""

from __future__ import annotations

import math
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from mukv.attention import Grouped
from mukv.core.errors import BadInput
from mukv.core.norm import RMSNorm
from mukv.hub.base import Rule, WeightPiece, halves_in_pairs, pieces
from mukv.hub.family import MOST_HEADS, MOST_LAYERS
from mukv.hub.settings import LARGEST, Given, read_json
from mukv.model import Decoder, Stage
from mukv.model.block import Gated
from mukv.position import Llama3, RoPE
from mukv.storage.files import file_inside
from mukv.storage.tensors import Cut, Tensor

PARAMS, FILES = "params.json", "consolidated.*.pth"
EMBEDDING, HEAD = "tok_embeddings.weight", "output.weight"
TYPES = ("float32", "bfloat16", "float16", "float64")
LAYER = "layers.{layer}"
RULES = (
    Rule(EMBEDDING, "embedding", "vocab embed"),
    Rule(HEAD, "readout", "vocab embed"),
    Rule("norm.weight", "final_norm.gain", "embed"),
    Rule(f"{LAYER}.attention.wq.weight", "read.query", "(heads head_dim) embed"),
    Rule(f"{LAYER}.attention.wk.weight", "write.key", "(kv_heads head_dim) embed"),
    Rule(f"{LAYER}.attention.wv.weight", "write.value", "(kv_heads head_dim) embed"),
    Rule(f"{LAYER}.attention.wo.weight", "read.output", "embed (heads value_dim)"),
    Rule(f"{LAYER}.feed_forward.w1.weight", "mlp.gate", "hidden embed"),
    Rule(f"{LAYER}.feed_forward.w3.weight", "mlp.up", "hidden embed"),
    Rule(f"{LAYER}.feed_forward.w2.weight", "mlp.down", "embed hidden"),
    Rule(f"{LAYER}.attention_norm.weight", "attention_norm.gain", "embed"),
    Rule(f"{LAYER}.ffn_norm.weight", "mlp_norm.gain", "embed"),
)
IGNORED = "rope.freqs"
CONTEXTS = {False: 8192, True: 131_072}
"""Context in tokens of Llama 3 (False), and of Llama 3.1 and later, whose rotation is scaled
(True); params.json does not have it.
"""


def is_meta(folder: Path) -> bool:
    """Whether a folder has Meta's format."""
    return (folder / PARAMS).is_file() and any(folder.glob(FILES))


class TorchFiles:
    """The tensors of consolidated.*.pth, whose shards `join` concatenates.

    Raises BadInput for files that contain anything but tensors; no code in them is executed.
    """

    def __init__(self, folder: Path):
        try:
            import torch
        except ImportError:
            allowed = "needs torch to read .pth files: `pip install torch`"
            raise BadInput("SOURCE", str(folder), allowed) from None
        self.torch = torch
        files = [file_inside(folder, path.name) for path in sorted(folder.glob(FILES))]
        self.parts: list[Mapping[str, Any]] = [self._part(path) for path in files]
        self.axes: dict[str, int | None] = {}
        self.tensors: dict[str, Tensor] = {}
        names = set(self.parts[0])
        for part, path in zip(self.parts, files, strict=True):
            for name in sorted(names ^ set(part)):
                where = path if name in names else files[0]
                raise BadInput(f"{where}: {name}", "missing", "all parts have the same tensors")
        for name, first in self.parts[0].items():
            self.axes[name] = None
            dtype = jnp.dtype(str(first.dtype).removeprefix("torch."))
            self.tensors[name] = Tensor(files[0], tuple(first.shape), dtype)

    def _part(self, path: Path) -> dict[str, Any]:
        """Return the tensors of one file, without buffers that are ignored."""
        try:
            with zipfile.ZipFile(path) as parts:
                packed = [part.filename for part in parts.infolist() if part.compress_type]
            tensors = None if packed else self.torch.load(path, mmap=True, weights_only=True)
        except Exception as error:  # torch raises a dozen types
            given = f"a file that can't be read ({str(error).splitlines()[:1]})"
            raise BadInput(str(path), given, "weights that torch.save wrote") from None
        if packed:
            raise BadInput(f"{path}: {packed[0]}", "compressed", "weights that torch.save wrote")
        if not isinstance(tensors, dict) or not tensors:
            raise BadInput(str(path), type(tensors).__name__, "tensors by their names")
        room = 2 * path.stat().st_size
        for name, tensor in tensors.items():
            if not isinstance(name, str) or not isinstance(tensor, self.torch.Tensor):
                given = type(tensor).__name__
                raise BadInput(f"{path}: {name}", given, "a tensor with a name")
            kind = str(tensor.dtype).removeprefix("torch.")
            plain = tensor.layout == self.torch.strided and tensor.device.type == "cpu"
            if kind not in TYPES or not plain:
                given = f"{kind}, {tensor.layout}, {tensor.device.type}"
                raise BadInput(f"{path}: {name}", given, f"dense, {' or '.join(TYPES)}")
            room -= tensor.numel() * tensor.element_size()
        if room < 0:  # factor 2: a readout may be tied to the embedding
            allowed = "at most two tensors with the same numbers"
            raise BadInput(str(path), "tensors of more bytes than the file has", allowed)
        return {name: tensor for name, tensor in tensors.items() if name != IGNORED}

    def join(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Find the axis along which each tensor is split, from the shapes of the whole tensors.
        Tensors whose shards do not give the shape are left as they are.
        """
        for name, wanted in shapes.items():
            first = self.tensors.get(name)
            parts = [tuple(part[name].shape) for part in self.parts] if first else []
            if first is None or first.shape == wanted or len(first.shape) != len(wanted):
                continue
            for axis in range(len(wanted)):
                whole = list(first.shape)
                whole[axis] = sum(shape[axis] for shape in parts if len(shape) == len(wanted))
                rest = {(*shape[:axis], *shape[axis + 1 :]) for shape in parts}
                if tuple(whole) == wanted and len(rest) == 1:
                    self.axes[name] = axis
                    self.tensors[name] = Tensor(first.file, wanted, first.dtype)
                    break

    def read(self, name: str, cut: Cut) -> np.ndarray:
        """Return a part of a tensor."""
        axis = self.axes[name]
        if axis is None:
            return np.array(self._numpy(self.parts[0][name])[cut])
        inside = [*cut, *[slice(None)] * (axis + 1 - len(cut))]
        first, last, _ = inside[axis].indices(self.tensors[name].shape[axis])
        found, begin = [], 0
        for part in self.parts:
            size = part[name].shape[axis]
            inside[axis] = slice(max(first - begin, 0), max(min(last - begin, size), 0))
            if inside[axis].start < inside[axis].stop:
                found.append(self._numpy(part[name])[tuple(inside)])
            begin += size
        return np.concatenate(found, axis=axis)

    def _numpy(self, tensor: Any) -> np.ndarray:
        tensor = tensor.detach()
        if tensor.dtype == self.torch.bfloat16:
            return tensor.view(self.torch.uint16).numpy().view(jnp.dtype("bfloat16"))
        return tensor.numpy()


def open_meta(folder: Path) -> tuple[str, Decoder, TorchFiles, Sequence[WeightPiece]]:
    """Return architecture, model, tensors and pieces of a folder in Meta's format. Raises BadInput
    for a folder that can't be read."""
    path = file_inside(folder, PARAMS)
    given = Given(read_json(path), str(path))
    files = TorchFiles(folder)
    model = _model(given, files, folder)
    found = pieces(RULES, model, halves_in_pairs)
    files.join({piece.theirs: piece.shape for piece in found})
    if model.readout == "tied":
        files.tensors.pop(HEAD, None)
    return "LlamaForCausalLM", model, files, found


def _model(given: Given, files: TorchFiles, folder: Path) -> Decoder:
    width = given.whole("dim")
    heads = given.whole("n_heads", high=MOST_HEADS)
    kv_heads = given.whole("n_kv_heads", None, null=True) or heads
    if heads % kv_heads:
        raise BadInput(f"{given.where}: n_kv_heads", kv_heads, f"must divide n_heads ({heads})")
    if width % (2 * heads):
        allowed = f"a multiple of 2 n_heads ({2 * heads}), as pairs are rotated"
        raise BadInput(f"{given.where}: dim", width, allowed)
    for part in files.parts:
        embedding = part.get(EMBEDDING)
        if embedding is None or embedding.ndim != 2:
            shape = "missing" if embedding is None else list(embedding.shape)
            raise BadInput(f"{folder}: {EMBEDDING}", shape, "a matrix, as in every Llama by Meta")
    # Llama 2 splits the width of its embedding, Llama 3 the vocabulary.
    shapes = [tuple(part[EMBEDDING].shape) for part in files.parts]
    vocab = sum(rows for rows, _ in shapes) if shapes[0][1] == width else shapes[0][0]
    if vocab < 1:
        raise BadInput(f"{folder}: {EMBEDDING}", list(shapes[0]), "at least one row")
    scaled = given.flag("use_scaled_rope", False)
    tied = _tied(files)
    factor = given.number("rope_scaling_factor", 32.0 if tied else 8.0)
    if factor < 1:
        raise BadInput(f"{given.where}: rope_scaling_factor", factor, "at least 1")
    return Decoder(
        vocab_size=vocab,
        d_model=width,
        attention=Grouped(
            position=RoPE(
                base=given.number("rope_theta", 10_000.0, low=1.0),
                scaling=Llama3(factor=factor) if scaled else None,
            ),
            heads=heads,
            kv_heads=kv_heads,
            head_dim=width // heads,
        ),
        mlp=Gated(hidden=_hidden(given, width)),
        plan=(Stage(repeats=given.whole("n_layers", high=MOST_LAYERS)),),
        norm=RMSNorm(given.number("norm_eps", 1e-5)),
        readout="tied" if tied else "linear",
        context=CONTEXTS[scaled] if "rope_theta" in given.mapping else 4096,
    )


def _tied(files: TorchFiles) -> bool:
    """Whether the readout is tied to the embedding. In the files of Llama 3.2's small models the
    readout equals the embedding, or is missing."""
    return all(
        HEAD not in part or files.torch.equal(part[EMBEDDING], part[HEAD]) for part in files.parts
    )


def _hidden(given: Given, width: int) -> int:
    """Compute the hidden width: two thirds of four times the width, times a factor, rounded up."""
    times = given.number("ffn_dim_multiplier", None, null=True) or 1.0
    hidden = int(int(2 * (4 * width) / 3) * times)
    multiple = given.whole("multiple_of", 256)
    hidden = multiple * math.ceil(hidden / multiple)
    if not 1 <= hidden <= LARGEST:
        raise BadInput(f"{given.where}: ffn_dim_multiplier", hidden, "fewer hidden units")
    return hidden
