"""Convert a trained model to one with a smaller KV cache or a state: `mukv convert`."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from mukv.conversion import check, convert, examples_of, parse, windows
from mukv.core.errors import BadInput
from mukv.core.version import VERSION
from mukv.model import Decoder
from mukv.runs.describe import describe
from mukv.runs.exchange import copy_companions, require_free
from mukv.runs.folder import RunDirectory
from mukv.runs.inputs import texts as read_texts
from mukv.runs.loaded import Model, load
from mukv.runs.located import Located, locate
from mukv.runs.provenance import FILE, noted
from mukv.runs.resolve import open_feed
from mukv.schema import schema
from mukv.storage.files import new_folder, write_atomic
from mukv.storage.weights import save_weights

WINDOW = 512
"""Tokens of a calibration window, at most."""


def convert_model(
    source: str, to: str, out: Path, texts: Sequence[Path], tokens: int
) -> dict[str, Any]:
    """Make a run directory of a converted model, at step 0.

    source: run directory, Hugging Face folder, GGUF file or hub id of the model
    to: the conversion, such as "gqa:1"
    out: run directory to make
    texts: UTF-8 files that the conversion is fitted to; if empty, the model's training data is used
    tokens: number of tokens of the texts to use

    Returns the object that `mukv convert --json` prints. Raises BadInput for a model that can't be
    converted (with the conversions that are possible), if there is neither a text nor training
    data, and for a path in use.
    """
    conversion, found = parse(to), locate(source)
    require_free(out, again=False)
    decoder = check(found.run.model, conversion)
    given = read_texts(texts, "--text")
    model = load(found)
    examples = None
    if conversion.uses_examples:
        examples = _examples(model, decoder, given, tokens)
    length = model.run.train.length
    made, weights = convert(decoder, model.weights, conversion, examples, length)
    training = replace(model.run.train, start=None, adapter=None, teacher=None, policy=None)
    run = replace(model.run, model=made, train=training)
    read = 0 if examples is None else len(examples[0])
    with new_folder(out) as folder:
        target = RunDirectory(folder)
        save_weights(target.weights, weights, {"step": "0"})
        write_atomic(target.config, schema.to_yaml(run))
        special = found.checkpoint.special if found.checkpoint else None
        copy_companions(found.folder, special, folder)
        facts = {
            "mukv": VERSION,
            "converted_from": source,
            "conversion": to,
            "calibration_tokens": read,
            "architecture": _architecture(found),
            "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        }
        write_atomic(folder / FILE, json.dumps(facts, indent=2))
    sizes = describe(found.run), describe(run)
    return {
        "run": str(out),
        "conversion": to,
        "calibration_tokens": read,
        **{
            f"{name}{when}": size[name]
            for name in ("parameters", "cache_bytes_per_token", "cache_bytes_constant")
            for when, size in zip(("_before", ""), sizes, strict=True)
        },
    }


def _examples(
    model: Model, decoder: Decoder, texts: Sequence[str], tokens: int
) -> list[np.ndarray]:
    """Compute the inputs of the layers on the texts, or on the model's training data. Raises
    BadInput if there is neither."""
    training = model.run.train
    length = min(training.length, WINDOW)
    if texts:
        ids = [np.asarray(model.encode(text)) for text in texts]
        rows = windows(ids, length, tokens)
        return examples_of(decoder, model.scaled, rows, compute=training.compute)
    trained_on = noted(model.folder, "data_fingerprint") if model.folder else None
    if model.folder is None or trained_on is None:
        raise _without_text("what it was trained on is not known")
    try:
        feed = open_feed(model.run, RunDirectory(model.folder))[1]
    except BadInput as error:
        raise _without_text(str(error)) from None
    if feed.fingerprint != trained_on:
        raise _without_text("what it was trained on has changed")
    rows = max(tokens // length, 1)
    batch = feed.source("train", seed=0, batch=rows, length=length).at(0)
    places = batch.tokens, batch.position, batch.segment
    return examples_of(decoder, model.scaled, *places, training.compute)


def _without_text(why: str) -> BadInput:
    allowed = f"a UTF-8 text file, to which the conversion is fitted ({why})"
    return BadInput("--text", None, allowed)


def _architecture(found: Located) -> str | None:
    """Return the architecture's name of the pretrained model that a model was made from."""
    if found.checkpoint is not None:
        return found.checkpoint.architecture
    return noted(found.folder, "architecture")
