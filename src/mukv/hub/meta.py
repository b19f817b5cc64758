"""Meta's own layout of Llama: params.json and consolidated.*.pth, each file with a share of
every large tensor (model parallel). Their heads are rotated in interleaved pairs; what we make of
them is in halves, as at Hugging Face. Needs torch, to read its files.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from mukv.attention import Grouped
from mukv.core.errors import BadInput
from mukv.core.norm import RMSNorm
from mukv.core.tensors import Cut, Tensor
from mukv.hub.base import Piece, Rule, halves_in_pairs, pieces
from mukv.hub.settings import Given, read_json
from mukv.model import Decoder, Stage
from mukv.model.block import Gated
from mukv.position import Llama3, RoPE

PARAMS = "params.json"
LAYER = "layers.{layer}"
RULES = (
    Rule("tok_embeddings.weight", "embedding", "vocab embed"),
    Rule("output.weight", "readout", "vocab embed"),
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
"""Of Llama 3, and of those since 3.1 with slowed rotation; params.json does not say it."""


def is_meta(folder: Path) -> bool:
    return (folder / PARAMS).is_file() and bool(list(folder.glob("consolidated.*.pth")))


class TorchFiles:
    """The tensors of consolidated.*.pth, joined along the axis that makes the shape right."""

    def __init__(self, folder: Path):
        try:
            import torch
        except ImportError:
            allowed = "needs torch to read .pth files: `pip install torch`"
            raise BadInput("SOURCE", str(folder), allowed) from None
        self.torch = torch
        files = sorted(folder.glob("consolidated.*.pth"))
        self.parts: list[Mapping[str, Any]] = []
        for path in files:
            try:
                self.parts.append(torch.load(path, mmap=True, weights_only=True))
            except Exception as error:  # torch raises a dozen types
                given = f"a file that can't be read ({str(error).splitlines()[0]})"
                raise BadInput(str(path), given, "weights that torch.save wrote") from None
        self.axes: dict[str, int | None] = {}
        self.tensors: dict[str, Tensor] = {}
        names = [name for name in self.parts[0] if name != IGNORED]
        for part, path in zip(self.parts, files, strict=True):
            for name in names:
                if name not in part:
                    raise BadInput(f"{path}: {name}", "missing", f"{files[0].name} has it")
        for name in names:
            self.axes[name] = None
            first = self.parts[0][name]
            dtype = jnp.dtype(str(first.dtype).removeprefix("torch."))
            self.tensors[name] = Tensor(files[0], tuple(first.shape), dtype)

    def join(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Learn from the shapes that are wanted how the parts lie; what does not fit is left."""
        for name, wanted in shapes.items():
            found = self.tensors.get(name)
            if found is None or found.shape == wanted or len(found.shape) != len(wanted):
                continue
            for axis in range(len(wanted)):
                whole = list(found.shape)
                whole[axis] = sum(part[name].shape[axis] for part in self.parts)
                if tuple(whole) == wanted:
                    self.axes[name] = axis
                    self.tensors[name] = Tensor(found.file, wanted, found.dtype)
                    break

    def read(self, name: str, cut: Cut) -> np.ndarray:
        axis = self.axes[name]
        parts = [part[name] for part in (self.parts if axis is not None else self.parts[:1])]
        whole = np.concatenate([self._numpy(part) for part in parts], axis=axis or 0)
        return whole[cut]

    def _numpy(self, tensor: Any) -> np.ndarray:
        if tensor.dtype == self.torch.bfloat16:
            return tensor.view(self.torch.uint16).numpy().view(jnp.dtype("bfloat16"))
        return tensor.numpy()


def open_meta(folder: Path) -> tuple[str, Decoder, TorchFiles, Sequence[Piece]]:
    """Architecture, model, tensors and pieces of such a folder. Raises BadInput."""
    files = TorchFiles(folder)
    given = Given(read_json(folder / PARAMS), str(folder / PARAMS))
    model = _model(given, files)
    found = pieces(RULES, model, halves_in_pairs)
    files.join({piece.theirs: piece.shape for piece in found})
    if model.readout == "tied":
        del files.tensors["output.weight"]
    return "LlamaForCausalLM", model, files, found


def _model(given: Given, files: TorchFiles) -> Decoder:
    width, heads = given.get("dim", int), given.get("n_heads", int)
    embedding = files.parts[0].get("tok_embeddings.weight")
    if embedding is None:
        raise BadInput(f"{files}: tok_embeddings.weight", "missing", "a Llama of Meta's has it")
    # Llama 2 splits the width of its embedding, Llama 3 the vocabulary.
    rows = sum(part["tok_embeddings.weight"].shape[0] for part in files.parts)
    vocab = rows if embedding.shape[1] == width else embedding.shape[0]
    slowed = given.get("use_scaled_rope", bool, False)
    tied = _tied(files)
    factor = given.get("rope_scaling_factor", float, 32.0 if tied else 8.0)
    return Decoder(
        vocab_size=vocab,
        d_model=width,
        attention=Grouped(
            position=RoPE(
                base=given.get("rope_theta", float, 10_000.0),
                scaling=Llama3(factor=factor) if slowed else None,
            ),
            heads=heads,
            kv_heads=given.get("n_kv_heads", int, heads),
            head_dim=width // heads,
        ),
        mlp=Gated(hidden=_hidden(given, width)),
        plan=(Stage(repeats=given.get("n_layers", int)),),
        norm=RMSNorm(given.get("norm_eps", float, 1e-5)),
        readout="tied" if tied else "linear",
        context=CONTEXTS[slowed] if "rope_theta" in given.mapping else 4096,
    )


def _tied(files: TorchFiles) -> bool:
    """Llama 3.2's small models repeat the embedding as their readout."""
    names = "tok_embeddings.weight", "output.weight"
    return all(
        name in part and files.torch.equal(part[names[0]], part[names[1]])
        for part in files.parts
        for name in names
    )


def _hidden(given: Given, width: int) -> int:
    """Two thirds of four times the width, times a factor, rounded up."""
    hidden = int(2 * (4 * width) / 3)
    hidden = int(hidden * given.get("ffn_dim_multiplier", float, 1.0))
    multiple = given.get("multiple_of", int, 256)
    return multiple * math.ceil(hidden / multiple)
