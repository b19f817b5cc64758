"""Convert between Hugging Face folders and run directories: `mukv import` and `mukv export`."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from mukv.core.errors import BadInput
from mukv.core.version import VERSION
from mukv.hub import FAMILIES, Family
from mukv.hub.base import WeightPiece, halves_in_pairs, pairs_in_halves, pieces
from mukv.hub.checkpoint import (
    CONFIG,
    GENERATION,
    SPECIAL,
    Checkpoint,
    companions,
    require,
)
from mukv.hub.settings import Given, read_json
from mukv.hub.standard import require_same, standard
from mukv.model import Decoder
from mukv.position import RoPE
from mukv.runs.folder import RunDirectory
from mukv.runs.loaded import Model
from mukv.runs.provenance import FILE as PROVENANCE
from mukv.runs.provenance import noted
from mukv.runs.resolve import imported_run
from mukv.schema import schema
from mukv.storage.files import new_folder, write_atomic, writer_of
from mukv.storage.tensors import INDEX, Spec, is_finite, write_tensors
from mukv.storage.weights import FILE, not_finite

SHARD_BYTES = 5 << 30


def import_model(source: str, out: Path, allow_nonfinite: bool = False) -> dict[str, Any]:
    """Write a run directory from a pretrained model, tensor by tensor.

    source: a Hugging Face folder, a GGUF file, a hub id, or a folder in Meta's layout
    out: the run directory to make
    allow_nonfinite: accept weights that are infinite or not a number

    Returns the object that `mukv import --json` prints. Raises BadInput for a source that is not a
    model, for an architecture that is not supported, for `out` in use, and for weights that are not
    finite.
    """
    again = noted(out, "imported_from") == source
    require_free(out, again)
    found = require(source)
    specs = found.specs()
    if not allow_nonfinite:
        where = str(found.folder)
        specs = {name: _finite(f"{where}: {name}", spec) for name, spec in specs.items()}
    with new_folder(out) as folder:
        target = RunDirectory(folder)
        write_tensors(target.weights / FILE, specs, {"step": "0"})
        write_atomic(target.config, schema.to_yaml(imported_run(found)))
        copy_companions(found.folder, found.special, folder)
        facts = _provenance(source, found)
        if again:  # a repeated import keeps an identical folder as it is
            facts["started"] = noted(out, "started")
        write_atomic(folder / PROVENANCE, json.dumps(facts, indent=2))
    return {
        "run": str(out),
        "architecture": found.architecture,
        "parameters": sum(int(np.prod(spec.shape)) for spec in specs.values()),
        "bytes": sum(spec.nbytes for spec in specs.values()),
        "tokenizer": found.tokenizer.vocab_size or None,
    }


def _provenance(source: str, found: Checkpoint) -> dict[str, Any]:
    return {
        "mukv": VERSION,
        "imported_from": source,
        "architecture": found.architecture,
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def _finite(where: str, spec: Spec) -> Spec:
    """Return a Spec whose `pieces` raises BadInput for numbers that are not finite."""

    def pieces() -> Iterator[np.ndarray]:
        for piece in spec.pieces():
            if not is_finite(piece):
                raise not_finite(where)
            yield piece

    return replace(spec, pieces=pieces)


def copy_companions(source: Path, special: Mapping[str, Any] | None, folder: Path) -> None:
    """Copy tokenizer, chat template and generation file into a new run directory.

    special: ids of special tokens of a pretrained model, from which a missing generation file is
        written; None for a model that was trained here, which has no such file
    """
    for path in companions(source):
        shutil.copy(path, folder / path.name)
    if special is not None and not (folder / GENERATION).exists():
        kept = {key: value for key, value in special.items() if value is not None}
        write_atomic(folder / GENERATION, json.dumps(kept, indent=2))


def require_free(out: Path, again: bool) -> None:
    """Raise BadInput for a path in use.

    again: whether an existing folder is allowed, because it seems to be made by the same command;
        the caller compares it with the new folder
    """
    if out.exists() and not again and (not out.is_dir() or any(out.iterdir())):
        raise BadInput("--out", str(out), "a path that is not in use")
    writer = writer_of(out)
    if writer is not None:
        raise BadInput("--out", f"{out}, which {writer} is writing", "a path that is not in use")


def export_model(
    model: Model, source: Path, out: Path, dtype: str | None = None, shard: int = SHARD_BYTES
) -> dict[str, Any]:
    """Write a folder that transformers loads.

    source: the run directory or folder that the model was loaded from
    out: the folder to make
    dtype: dtype of the written weights; None keeps the dtype of each
    shard: most bytes per weight file

    Returns the object that `mukv export --json` prints. Raises BadInput for a model whose weights
    were converted when they were loaded, for a model with a part that no supported Hugging Face
    architecture has, for `out` in use, and for weights that `dtype` can't hold.
    """
    if model.converted:
        allowed = "a model that was loaded without `weights`: exported weights are the saved ones"
        raise BadInput("MODEL", str(source), allowed)
    there = out / CONFIG
    require_free(out, there.is_file() and not out.samefile(source))
    decoder = model.network
    if not isinstance(decoder, Decoder):
        raise BadInput("model.kind", decoder.kind, "decoder: others have no name in Hugging Face")
    family = _family(decoder, source)
    plain, flat = standard(decoder, model.weights, family)
    specs = _specs(plain, flat, family, dtype)
    config = family.write(plain, model.run.train.length)
    require_same(plain, family.read(Given(config, "model")))
    kept = {spec.dtype.name for spec in specs.values()}
    config["torch_dtype"] = kept.pop() if len(kept) == 1 else "float32"
    # All special ids are written: transformers gives a missing one the default of the architecture.
    special = dict.fromkeys(SPECIAL) | _special(model, source)
    text = json.dumps(config | special, indent=2)
    require_free(out, there.is_file() and there.read_bytes() == text.encode())
    with new_folder(out) as folder:
        files = write_shards(folder, specs, shard)
        write_atomic(folder / CONFIG, text)
        for path in companions(source):
            shutil.copy(path, folder / path.name)
        if not (source / GENERATION).exists():
            write_atomic(folder / GENERATION, json.dumps(special, indent=2))
        _describe_tokenizer(model, folder)
    return {
        "path": str(out),
        "architecture": family.architecture,
        "parameters": sum(int(np.prod(spec.shape)) for spec in specs.values()),
        "dtype": config["torch_dtype"],
        "files": files,
    }


def _family(model: Decoder, source: Path) -> Family:
    """Return the architecture that the model was imported from if the model still fits it, or else
    the first that the model fits. Raises BadInput, with a part of the model that the architecture
    with the fewest differences does not have, if the model fits none; one with another kind of
    attention differs most."""
    told = source / PROVENANCE
    named = read_json(told).get("architecture") if told.exists() else None
    ordered = sorted(FAMILIES.values(), key=lambda family: family.architecture != named)
    misfits = {family.architecture: list(family.misfits(model)) for family in ordered}
    for family in ordered:
        if not misfits[family.architecture]:
            return family

    def distance(family: Family) -> tuple[bool, int]:
        errors = misfits[family.architecture]
        return errors[0].where == "attention.kind", len(errors)

    nearest = min(ordered, key=distance)
    worst = misfits[nearest.architecture][0]
    raise BadInput(
        f"model.{worst.where}",
        worst.given,
        f"no architecture of Hugging Face that we write has it: {nearest.architecture} has "
        f"{worst.allowed}; known: {', '.join(FAMILIES)}",
    )


def _specs(
    model: Decoder, flat: Mapping[str, Any], family: Family, dtype: str | None
) -> dict[str, Spec]:
    """Return the tensors to write, by their names in the architecture, in the order of the layers.
    A tensor is converted only when its file is written."""
    positions = [getattr(layer.attention, "position", None) for layer in model.layers]
    pairings = {place.pairing for place in positions if isinstance(place, RoPE)}
    order = None
    if family.pairing_key is None and pairings - {family.pairing}:
        order = pairs_in_halves if family.pairing == "half" else halves_in_pairs
    groups: dict[str, list[WeightPiece]] = {}
    for piece in pieces(family.rules, model, order):
        groups.setdefault(piece.theirs, []).append(piece)
    made: dict[str, Spec] = {}
    for name, parts in groups.items():
        kept = jnp.dtype(dtype or flat[parts[0].ours].dtype)

        def read(parts: list[WeightPiece] = parts, kept: np.dtype = kept) -> Iterator[np.ndarray]:
            yield _joined(parts, flat, kept)

        made[name] = Spec(parts[0].shape, kept, read)
    return made


def _joined(parts: list[WeightPiece], flat: Mapping[str, Any], kept: np.dtype) -> np.ndarray:
    """Return a tensor of the checkpoint, made of all weights that it holds."""
    whole = np.empty(parts[0].shape, kept)
    for piece in parts:
        ours = np.asarray(flat[piece.ours][piece.place])
        with np.errstate(over="ignore"):
            theirs = ours.astype(kept)
        if not np.isfinite(theirs).all() and np.isfinite(ours).all():
            raise BadInput("--dtype", kept.name, f"a type that holds the numbers of {piece.ours}")
        piece.put(theirs, whole)
    return whole


def write_shards(folder: Path, specs: Mapping[str, Spec], limit: int) -> int:
    """Write one safetensors file, or several of at most `limit` bytes with an index; return the
    number of files. A tensor that is larger than the limit gets a file that exceeds it."""
    shards: list[dict[str, Spec]] = [{}]
    size = 0
    for name, spec in specs.items():
        if shards[-1] and size + spec.nbytes > limit:
            shards.append({})
            size = 0
        shards[-1][name] = spec
        size += spec.nbytes
    if len(shards) == 1:
        write_tensors(folder / "model.safetensors", shards[0], {"format": "pt"})
        return 1
    places: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        write_tensors(folder / file, shard, {"format": "pt"})
        places |= dict.fromkeys(shard, file)
    total = sum(spec.nbytes for spec in specs.values())
    index = {"metadata": {"total_size": total}, "weight_map": places}
    write_atomic(folder / INDEX, json.dumps(index, indent=2))
    return len(shards)


def _special(model: Model, source: Path) -> dict[str, Any]:
    """Return the ids that begin, end and pad a text, by their names in generation_config.json."""
    path = source / GENERATION
    if path.exists():
        found = read_json(path)
        return {key: value for key, value in found.items() if key.endswith("_token_id")}
    start = model.tokenizer.start
    return {"bos_token_id": start[0] if start else None, "eos_token_id": None}


def _describe_tokenizer(model: Model, folder: Path) -> None:
    """Write the tokenizer_config.json that transformers needs beside tokenizer.json, if missing."""
    path = folder / "tokenizer_config.json"
    if path.exists() or not (folder / "tokenizer.json").exists():
        return
    told: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    if model.tokenizer.start:
        told["bos_token"] = model.tokenizer.inner.id_to_token(model.tokenizer.start[0])
    write_atomic(path, json.dumps(told, indent=2))
