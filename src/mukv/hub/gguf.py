"""Read GGUF files, llama.cpp's format for configuration, weights and tokenizer.

The metadata is converted to the config.json of the family, so that families, their rules and checks
are those of Hugging Face folders. Quantised tensors are dequantised to float32 by the `gguf`
package when they are read, row by row if rows are requested. llama.cpp stores the query and key
weights of Llama in interleaved pairs, and Gemma's norms as gains instead of offsets from one; both
are converted back.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from mukv.core.errors import BadInput, unknown_name
from mukv.hub import FAMILIES, Family
from mukv.hub.base import WeightPiece, halves_in_pairs, pieces
from mukv.hub.gguf_file import MAGIC, GgufFile
from mukv.hub.rotation import GLOBAL, LOCAL
from mukv.hub.settings import Given
from mukv.model import Decoder
from mukv.storage.tensors import Cut, Tensor

SPLIT = re.compile(r"^(.*)-(\d{5})-of-(\d{5})\.gguf$")
"""Name of a part of a split model, as llama.cpp's gguf-split writes it."""
KEPT: Mapping[str, np.dtype] = {"F16": np.dtype("float16"), "BF16": jnp.dtype("bfloat16")}
"""Dtypes that are not converted to float32 if all layers have them."""
ROPE_FACTORS = "rope_freqs.weight"
"""Name of the tensor by which llama.cpp divides the frequencies of Llama 3.1. Files have it instead
of the settings of the scaled RoPE."""


@dataclass(frozen=True)
class GgufArchitecture:
    """Description of an architecture of llama.cpp.

    name: name of the model class in Hugging Face's format
    norms: name in Hugging Face's format of each norm of llama.cpp
    turned: whether queries and keys are stored in interleaved pairs
    offset: whether norms are stored as gains where the family stores offsets from one
    settings: function that returns further keys of config.json
    """

    name: str
    norms: Mapping[str, str]
    turned: bool = False
    offset: bool = False
    settings: Callable[[Metadata], dict[str, Any]] = lambda metadata: {}


class Metadata:
    """The metadata of a file under the prefix of its architecture."""

    def __init__(self, values: Mapping[str, Any], where: str):
        self.values, self.where = values, where
        self.architecture = str(values.get("general.architecture"))

    def get(self, key: str, default: Any = None) -> Any:
        """Return the value of a key, without the architecture's prefix."""
        return self.values.get(f"{self.architecture}.{key}", default)

    @property
    def checked(self) -> Given:
        """The values under the architecture's prefix, which are checked when they are read."""
        prefix = f"{self.architecture}."
        own = {k.removeprefix(prefix): v for k, v in self.values.items() if k.startswith(prefix)}
        return Given(own, f"{self.where}: {self.architecture}")

    def whole(self, key: str) -> int:
        """Return a whole number of at least 1. Raises BadInput for a missing or other value."""
        return self.checked.whole(key)

    def number(self, key: str, default: float) -> float:
        """Return a number greater than 0. Raises BadInput for another value."""
        return self.checked.number(key, default)


def _gemma2(metadata: Metadata) -> dict[str, Any]:
    width, heads = metadata.whole("embedding_length"), metadata.whole("attention.head_count")
    found = {
        "attn_logit_softcapping": metadata.get("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": metadata.get("final_logit_softcapping", 30.0),
    }
    # As in llama.cpp, Gemma 2 27B is recognised by its number of layers; its queries are not scaled
    # by the width of a head.
    if metadata.whole("block_count") == 46:
        found["query_pre_attn_scalar"] = width // heads
    return found


def _gemma3(metadata: Metadata) -> dict[str, Any]:
    width, heads = metadata.whole("embedding_length"), metadata.whole("attention.head_count")
    base, factor = (
        metadata.number("rope.freq_base", 1e6),
        metadata.number("rope.scaling.factor", 1.0),
    )
    scaled = {"rope_type": "linear", "factor": factor} if factor != 1 else {"rope_type": "default"}
    local = metadata.number("rope.freq_base_swa", 10_000.0)
    found: dict[str, Any] = {
        "rope_theta": None,
        "rope_scaling": None,
        "rope_parameters": {
            GLOBAL: {"rope_theta": base, **scaled},
            LOCAL: {"rope_theta": local, "rope_type": "default"},
        },
    }
    if metadata.whole("block_count") == 62:  # Gemma 3 27B, as above
        found["query_pre_attn_scalar"] = width // heads
    return found


LLAMA_NORMS = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
QWEN3_NORMS = {
    **LLAMA_NORMS,
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
}
GEMMA_NORMS = {
    "attn_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
GEMMA3_NORMS = {
    **GEMMA_NORMS,
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
}
ARCHITECTURES = {
    "llama": GgufArchitecture("LlamaForCausalLM", LLAMA_NORMS, turned=True),
    "mistral": GgufArchitecture("MistralForCausalLM", LLAMA_NORMS, turned=True),
    "qwen2": GgufArchitecture("Qwen2ForCausalLM", LLAMA_NORMS),
    "qwen3": GgufArchitecture("Qwen3ForCausalLM", QWEN3_NORMS),
    "gemma2": GgufArchitecture("Gemma2ForCausalLM", GEMMA_NORMS, offset=True, settings=_gemma2),
    "gemma3": GgufArchitecture("Gemma3ForCausalLM", GEMMA3_NORMS, offset=True, settings=_gemma3),
}
"""Architectures by `general.architecture`; `mistral` is chosen for Llama files with a window."""
PARTS = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
ENDS = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output.weight": "lm_head.weight",
    "output_norm.weight": "model.norm.weight",
}


def is_gguf(path: Path) -> bool:
    """Whether a path is a file with the suffix or the first bytes of GGUF files."""
    if not path.is_file():
        return False
    if path.suffix == ".gguf":
        return True
    with path.open("rb") as file:
        return file.read(4) == MAGIC


class GgufFiles:
    """Metadata and tensors of a GGUF file and of the other files that it was split into.

    Tensors have their Hugging Face names. Raises BadInput for a file that can't be read, a missing
    part, an unknown architecture, and tensors of unknown type or name.
    """

    def __init__(self, path: Path):
        self.path = path
        files = [GgufFile(part) for part in _parts(path)]
        self.metadata = Metadata(files[0].values, str(path))
        name = self.metadata.architecture
        if name not in ARCHITECTURES:
            raise unknown_name(f"{path}: general.architecture", name, ARCHITECTURES)
        # llama.cpp writes Mistral as llama; only the window distinguishes them.
        windowed = name == "llama" and self.metadata.get("attention.sliding_window")
        self.architecture = ARCHITECTURES["mistral" if windowed else name]
        names = ENDS | {
            f"{ours}.{end}": f"{theirs}.{end}"
            for ours, theirs in (PARTS | dict(self.architecture.norms)).items()
            for end in ("weight", "bias")
        }
        self.stored: dict[str, tuple[GgufFile, str]] = {}
        self.factors: np.ndarray | None = None
        kinds: dict[str, set[str]] = {}
        for file in files:
            for name, tensor in file.tensors.items():
                if name == ROPE_FACTORS:
                    self.factors = file.read(name).astype(np.float32)
                    continue
                block = re.fullmatch(r"blk\.(\d+)\.(.+)", name)
                inner = block[2] if block else name
                if inner not in names:
                    raise unknown_name(f"{file.path}: tensor", name, names)
                theirs = (f"model.layers.{int(block[1])}." if block else "") + names[inner]
                self.stored[theirs] = file, name
                kinds.setdefault(_everywhere(theirs), set()).add(tensor.kind)
        self.tensors = {
            theirs: Tensor(file.path, file.tensors[name].shape, _dtype(kinds[_everywhere(theirs)]))
            for theirs, (file, name) in self.stored.items()
        }

    def read(self, name: str, cut: Cut) -> np.ndarray:
        """Return a dequantised part of a tensor."""
        (file, theirs), dtype = self.stored[name], self.tensors[name].dtype
        rows, *rest = cut or (slice(None),)
        found = file.read(theirs, rows)
        found = found[(slice(None), *rest)] if rest else found
        if self.architecture.offset and name.endswith("norm.weight"):
            found = found - np.float32(1)
        return found.astype(dtype)

    @cached_property
    def config(self) -> dict[str, Any]:
        """The config.json of this model."""
        data = self.metadata
        heads = data.whole("attention.head_count")
        kv_heads = data.checked.whole("attention.head_count_kv", None, null=True)
        family = FAMILIES[self.architecture.name]
        config: dict[str, Any] = {
            "architectures": [self.architecture.name],
            "model_type": family.model_type,
            "vocab_size": self._rows("model.embed_tokens.weight"),
            "hidden_size": data.whole("embedding_length"),
            "intermediate_size": data.whole("feed_forward_length"),
            "num_hidden_layers": data.whole("block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads or heads,
            "head_dim": self._head_dim(),
            "max_position_embeddings": data.whole("context_length"),
            "rms_norm_eps": data.checked.number("attention.layer_norm_rms_epsilon"),
            "rope_theta": data.number("rope.freq_base", 10_000.0),
            "rope_scaling": self._scaling(),
            "tie_word_embeddings": "lm_head.weight" not in self.tensors,
            **{
                f"{name}_token_id": data.values.get(f"tokenizer.ggml.{key}_token_id")
                for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))
            },
        }
        window = data.get("attention.sliding_window")
        config["sliding_window"] = window or None
        if "model.layers.0.self_attn.q_proj.bias" in self.tensors and family.biases is None:
            config["attention_bias"] = True
        config |= self.architecture.settings(data)
        return {key: value for key, value in config.items() if value is not None or key in NULL}

    def _rows(self, name: str) -> int:
        if name not in self.tensors:
            raise BadInput(f"{self.path}: {name}", "missing", "a tensor that each model has")
        return self.tensors[name].shape[0]

    def _head_dim(self) -> int:
        """Return the width of a head. Older files of Llama have it only as the number of rotated
        dimensions."""
        data = self.metadata
        given = data.get("attention.key_length")
        if given is None and self.architecture.turned:
            given = data.get("rope.dimension_count")
        wide = data.whole("embedding_length") // data.whole("attention.head_count")
        value = data.get("attention.value_length", given)
        if value != given:
            where = f"{self.path}: {data.architecture}.attention.value_length"
            raise BadInput(where, value, f"the width of keys ({given})")
        rotated = data.get("rope.dimension_count", given or wide)
        if rotated != (given or wide):
            where = f"{self.path}: {data.architecture}.rope.dimension_count"
            raise BadInput(where, rotated, f"all of a head's {given or wide} dimensions")
        return given or wide

    def _scaling(self) -> dict[str, Any] | None:
        """Return `rope_scaling` from the metadata, or from the factors of Llama 3.1's scaling."""
        data = self.metadata
        kind, factor = data.get("rope.scaling.type"), data.get("rope.scaling.factor")
        if self.factors is not None:
            return self._llama3(self.factors)
        if kind in (None, "none"):
            return None
        original = data.get("rope.scaling.original_context_length")
        if kind == "linear":
            return {"rope_type": "linear", "factor": factor}
        if kind == "yarn":
            scaling = {"rope_type": "yarn", "factor": factor}
            return scaling | ({"original_max_position_embeddings": original} if original else {})
        where = f"{self.path}: {data.architecture}.rope.scaling.type"
        raise unknown_name(where, str(kind), ("none", "linear", "yarn"))

    def _llama3(self, factors: np.ndarray) -> dict[str, Any]:
        """Return the settings of Llama 3.1's scaled rotation that give these factors.

        llama.cpp computes the factors from four numbers, which files don't contain. Raises BadInput
        for factors that the published numbers do not give.
        """
        low, high, original = 1.0, 4.0, 8192
        factor = float(factors.max())
        base, width = self.metadata.number("rope.freq_base", 10_000.0), 2 * len(factors)
        waves = 2 * np.pi * base ** (np.arange(0, width, 2) / width)
        smooth = np.clip((original / waves - low) / (high - low), 0, 1)
        expected = 1 / ((1 - smooth) / factor + smooth)
        if not np.allclose(factors, expected, rtol=1e-3):
            given = "factors that Llama 3.1's settings do not give"
            allowed = "those of low_freq_factor 1, high_freq_factor 4 and 8,192 positions"
            raise BadInput(f"{self.path}: {ROPE_FACTORS}", given, allowed)
        return {
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": low,
            "high_freq_factor": high,
            "original_max_position_embeddings": original,
        }


NULL = ("sliding_window", "rope_scaling")
"""Keys that must be present as null, because a missing key has another default."""


def read_gguf(files: GgufFiles) -> tuple[Family, Decoder, Sequence[WeightPiece]]:
    """Return family, model and pieces of a GGUF file. Raises BadInput for metadata that no model
    of the family can have."""
    family = FAMILIES[files.architecture.name]
    model = family.read(Given(files.config, str(files.path)))
    order = halves_in_pairs if files.architecture.turned else None
    return family, model, pieces(family.rules, model, order)


def _parts(path: Path) -> list[Path]:
    """Return all files of a model, in order, from the name of any of them. Raises BadInput if one
    is missing."""
    named = SPLIT.match(path.name)
    if named is None:
        return [path]
    stem, _, count = named.groups()
    found = [path.with_name(f"{stem}-{n:05}-of-{count}.gguf") for n in range(1, int(count) + 1)]
    for part in found:
        if not part.exists():
            raise BadInput(str(part), "missing", f"all {int(count)} files of a split model")
    return found


def _everywhere(name: str) -> str:
    """Return the name of a tensor without the number of its layer."""
    return re.sub(r"\.layers\.\d+\.", ".layers.", name)


def _dtype(kinds: set[str]) -> np.dtype:
    """Return the dtype of a tensor in all layers.

    kinds: types in which the layers are stored
    """
    return KEPT.get(next(iter(kinds)), np.dtype("float32")) if len(kinds) == 1 else np.dtype("f4")
