"""Write models of transformers as GGUF files, with the names of llama.cpp's converter."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter

from mukv.hub.gguf import ARCHITECTURES, ENDS, PARTS

TOKENS = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
KEYS = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "block_count": "num_hidden_layers",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
}


def write_gguf(
    path: Path,
    architecture: str,
    model: Any,
    extra: Mapping[str, Any] | None = None,
    replaced: bool = False,
) -> Path:
    """Write a model of transformers as a GGUF file.

    extra: further metadata. replaced: whether it may replace what the model says.
    """
    config, kind = model.config, ARCHITECTURES[architecture]
    writer = GGUFWriter(path, architecture)
    for key, name in KEYS.items():
        writer.add_uint32(f"{architecture}.{key}", getattr(config, name))
    writer.add_float32(f"{architecture}.attention.layer_norm_rms_epsilon", config.rms_norm_eps)
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    for key in ("key_length", "value_length"):
        writer.add_uint32(f"{architecture}.attention.{key}", width)
    if getattr(config, "sliding_window", None):
        writer.add_uint32(f"{architecture}.attention.sliding_window", config.sliding_window)
    for key, value in (extra or {}).items():
        if replaced:
            writer.kv_data[0].pop(key, None)
        add_value(writer, key, value)
    names = {theirs: ours for ours, theirs in ENDS.items()}
    parts = {theirs: ours for ours, theirs in (PARTS | dict(kind.norms)).items()}
    for name, weight in model.state_dict().items():
        array = weight.float().numpy()
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if kind.offset and name.endswith("norm.weight"):
            array = array + 1
        if name in names:
            writer.add_tensor(names[name], array)
            continue
        _, _, layer, inner = name.split(".", 3)
        part, end = inner.rsplit(".", 1)
        if kind.turned and part.endswith(("q_proj", "k_proj")):
            heads = len(array) // width
            array = array.reshape(heads, 2, width // 2, -1).swapaxes(1, 2).reshape(array.shape)
        writer.add_tensor(f"blk.{layer}.{parts[part]}.{end}", np.ascontiguousarray(array))
    finish(writer)
    return path


def add_value(writer: GGUFWriter, key: str, value: Any) -> None:
    """Add metadata of a Python value: text, whole number, float, flag or list."""
    kinds = {
        str: writer.add_string,
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        list: writer.add_array,
    }
    kinds[type(value)](key, value)


def finish(writer: GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


QUANTISED = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "BF16", "F16")
"""Quantised types that the gguf library can write."""


def random_blocks(kind: str, rows: int, blocks: int, seed: int) -> np.ndarray:
    """Return random bytes [row, byte] of a quantised type."""
    from gguf.constants import GGML_QUANT_SIZES

    _, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    generator = np.random.default_rng(seed)
    return generator.integers(0, 60, (rows, blocks * size), np.uint8)
