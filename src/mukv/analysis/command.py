"""Implement `mukv analyze`: choose texts, measure a model, calibrate policies, write results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mukv.analysis import calibrate, samples, study
from mukv.analysis.capture import CapturedRows, batch_rows
from mukv.analysis.clusters import judge
from mukv.analysis.scores import calibrate_scores, judge_scores
from mukv.cache.centres import KINDS
from mukv.core.errors import BadInput, unknown_name
from mukv.model import Decoder
from mukv.runs import inputs
from mukv.runs.loaded import Model
from mukv.show.page import Page

SCORES = "scores"
CALIBRATIONS = (*KINDS, SCORES)


@dataclass(frozen=True)
class AnalyzeSettings:
    """Options of `mukv analyze`. Raises BadInput for values out of range and unknown names.

    text: text files
    tokens: a .npy file of ids, instead of text; the held-out text is used if neither is given
    samples: windows per text
    calibrate: points to cluster (keys, queries, means, aligned), or scores to predict (scores);
        None for no calibration
    clusters: cluster centres per head
    before_rotation: whether keys and queries are clustered before their position rotation
    calibration_tokens: number of tokens of the training text that are clustered, or read twice
    """

    text: tuple[Path, ...] = ()
    tokens: Path | None = None
    samples: int = 32
    calibrate: str | None = None
    clusters: int = 64
    before_rotation: bool = False
    calibration_tokens: int = 1 << 16

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise BadInput("--samples", self.samples, "at least 1")
        if self.text and self.tokens:
            raise BadInput("analyze", "--text and --tokens", "one of the two")
        if self.calibrate is not None and self.calibrate not in CALIBRATIONS:
            raise unknown_name("--calibrate", self.calibrate, CALIBRATIONS)


@dataclass(frozen=True)
class Analysis:
    """Results of an analysis.

    found: measures of each layer, by name of the text
    facts: the object that `--json` prints
    """

    found: study.Found
    facts: dict[str, Any]


def analyze(
    model: Model,
    name: str,
    length: int,
    settings: AnalyzeSettings,
    folder: Path,
    beside: Path | None,
) -> Analysis:
    """Measure a model, and write tables, pictures and an HTML page into a folder.

    name: the model as it was typed
    length: tokens per window
    beside: run directory in which a calibration is saved; None to save it in `folder`

    Raises BadInput for texts shorter than a window, for token ids that the model does not have, and
    for a model that is not a Decoder.
    """
    texts = chosen_texts(model, length, settings)
    to_cluster = to_judge = samples.joined(texts.values())
    if settings.calibrate is not None:
        to_cluster, to_judge = _parted(model, length, settings, to_judge)
        if settings.calibrate != SCORES:
            calibrate.check(settings.clusters, to_cluster.tokens.size)
    if not isinstance(model.network, Decoder):
        raise BadInput("MODEL", model.network.kind, "a model of kind decoder")
    found = study.look(model.network, model.scaled, texts, model.run.train.compute)
    about = {
        "model": name,
        "window": f"{length} tokens",
        "tokens": ", ".join(f"{text} {each.tokens.size:,}" for text, each in texts.items()),
    }
    page = study.write(found, folder, f"Attention weights: {Path(name).name}", about)
    facts = {"texts": study.facts(found), "out": str(folder)}
    if settings.calibrate is not None:
        parts, saved = (to_cluster, to_judge), beside or folder
        if settings.calibrate == SCORES:
            facts["calibration"] = _scores(model, *parts, folder, saved, page)
        else:
            facts["calibration"] = _clusters(model, settings, *parts, folder, saved, page)
    page.save(folder / "analysis.html")
    return Analysis(found, facts)


def chosen_texts(model: Model, length: int, settings: AnalyzeSettings) -> dict[str, CapturedRows]:
    """Return windows of each text, by name. Raises BadInput for ids outside of the vocabulary, and
    for a text shorter than a window."""
    count = settings.samples
    if settings.text:
        names = names_of(settings.text)
        rows = {n: inputs.rows_of_text(model, p) for n, p in zip(names, settings.text, strict=True)}
        texts = {name: samples.windows(name, each, length, count) for name, each in rows.items()}
    elif settings.tokens is not None:
        name = settings.tokens.stem
        given: Sequence[np.ndarray] = inputs.rows_of_ids(settings.tokens)
        texts = {name: samples.windows(name, given, length, count)}
    else:
        texts = {"validation": samples.held_out(inputs.corpus(model), length, count)}
    for each in texts.values():
        inputs.check_ids(model, each.tokens)
    return texts


def names_of(paths: Sequence[Path]) -> list[str]:
    """Name texts by their file names without suffix, or by their paths where names are equal."""
    stems = [path.stem for path in paths]
    return [s if stems.count(s) == 1 else str(p) for s, p in zip(stems, paths, strict=True)]


def _parted(
    model: Model, length: int, settings: AnalyzeSettings, rows: CapturedRows
) -> tuple[CapturedRows, CapturedRows]:
    """Return the windows to cluster, and the windows on which the clusters are tested.

    These are alternate windows of the given texts; without texts they are windows of the training
    text, and `rows`.
    """
    if settings.text or settings.tokens:
        return samples.halves(rows)
    count = -(-settings.calibration_tokens // length)
    return samples.from_training(inputs.corpus(model), length, count), rows


def _clusters(
    model: Model,
    settings: AnalyzeSettings,
    to_cluster: CapturedRows,
    to_judge: CapturedRows,
    folder: Path,
    saved: Path,
    page: Page,
) -> Mapping[str, Any]:
    """Calibrate centres, save and test them. Adds a section to the page; returns the fields that
    `--json` prints."""
    decoder, kind, compute = model.network, settings.calibrate, model.run.train.compute
    assert isinstance(decoder, Decoder)
    size = batch_rows(decoder, to_cluster.tokens.shape[1])
    centres = calibrate.calibrate(
        decoder,
        model.weights,
        samples.even(to_cluster, size),
        kind,  # pyright: ignore[reportArgumentType] (checked by the settings)
        settings.clusters,
        not settings.before_rotation,
        compute=compute,
    )
    batches = samples.batched(to_judge, size)
    predicted = judge(decoder, model.scaled, centres, batches, compute)
    path = centres.save(saved)
    return {**study.write_clusters(predicted, centres, folder, page), "path": str(path)}


def _scores(
    model: Model,
    to_fit: CapturedRows,
    to_judge: CapturedRows,
    folder: Path,
    saved: Path,
    page: Page,
) -> Mapping[str, Any]:
    """Calibrate predictors of KVzip+ scores, save and test them. Adds a section to the page;
    returns the fields that `--json` prints."""
    decoder = model.network
    assert isinstance(decoder, Decoder)
    size = batch_rows(decoder, 2 * to_fit.tokens.shape[1])
    predictors, reader = calibrate_scores(
        decoder,
        model.weights,
        (batch.tokens for batch in samples.even(to_fit, size)),
        model.tokenizer.encode,
        compute=model.run.train.compute,
    )
    batches = (batch.tokens for batch in samples.even(to_judge, size))
    predicted = judge_scores(predictors, reader, batches)
    path = predictors.save(saved)
    return {**study.write_scores(predicted, folder, page), "path": str(path)}
