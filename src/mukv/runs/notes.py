"""Warn of settings that have no effect, or another effect than a user may expect.

Each function returns lines of text, which a command prints before it begins to work.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from mukv.data.feed import Feed, TextFeed
from mukv.data.mixture import MixtureFeed
from mukv.data.tokens import TokenFile
from mukv.runs.config import Run
from mukv.runs.describe import weights
from mukv.runs.folder import RunDirectory
from mukv.scaling.schedules import Plan
from mukv.storage.checkpoint import Checkpoints
from mukv.train.training import Training


def of_run(run: Run) -> list[str]:
    """Return a line for each value of a run that has no effect."""
    found = []
    warmup, steps = run.train.schedule.warmup, run.train.steps
    if warmup >= steps:
        found.append(
            f"train.schedule.warmup: {warmup} steps, but train.steps is {steps}: the learning rate "
            "never reaches its peak"
        )
    for number, stage in enumerate(run.train.stages):
        if stage.begin >= steps:
            found.append(
                f"train.stages.{number}.begin: {stage.begin}, but train.steps is {steps}: this "
                "stage never begins"
            )
    if run.mesh.tensor > 1 and not any("tensor" in row["sharding"] for row in weights(run)):
        found.append(
            f"mesh.tensor: {run.mesh.tensor} splits no weight: it divides neither the heads nor "
            "the width of the MLP nor the vocabulary"
        )
    return found


def of_defaults(mapping: Mapping[str, Any], run: Run) -> list[str]:
    """Return a line with the sizes of an attention variant that have their default values, which
    do not depend on the model's width.

    mapping: nested mapping of the keys that were given
    """
    model = mapping.get("model")
    given = model.get("attention") if isinstance(model, Mapping) else None
    attention = getattr(run.model, "attention", None)
    if not isinstance(given, Mapping) or attention is None:
        return []
    missing = [name for name in attention.sizes if name not in given]
    if not missing:
        return []
    values = ", ".join(f"{name} {getattr(attention, name)}" for name in missing)
    return [
        f"model.attention: {attention.kind} with the default {values}, whatever the width "
        f"(model.d_model is {run.model.d_model})"
    ]


def of_feed(feed: Feed) -> str:
    """Return a line on the data that a run trains on, and its path."""
    if isinstance(feed, TextFeed):
        tokens = feed.tokens
        count = len(tokens.train.tokens)
        return f"training on {count:,} tokens of {_sources(tokens)} in {tokens.path} (data.path)"
    if isinstance(feed, MixtureFeed):
        total = sum(feed.weights)
        parts = (
            f"{weight / total:.1%} {file.path} ({len(file.train.tokens):,} tokens)"
            for file, weight in zip(feed.tokens, feed.weights, strict=True)
        )
        return f"training on a mixture of {', '.join(parts)} (data.mixture)"
    return "training on a synthetic task (data.task)"


def of_held_out(tokens: TokenFile) -> str:
    """Return a line on the held-out text that a model is analysed on, and its path."""
    return f"held-out text of {_sources(tokens)} in {tokens.path} (--text gives another)"


def _sources(tokens: TokenFile) -> str:
    return ", ".join(tokens.sources[:3]) + (", ..." if len(tokens.sources) > 3 else "")


def of_length(length: int, run: Run, what: str) -> list[str]:
    """Return a line for a text longer than the rows that a model was trained on.

    length: length of the text in tokens
    what: name of the text or option
    """
    trained = run.model.context or run.train.sizes[-1][1]
    if length <= trained:
        return []
    return [
        f"{what}: {length:,} tokens, but the model was trained on rows of {trained:,}: its quality "
        "on longer texts is untested"
    ]


def of_stop(ids: Sequence[int], vocab_size: int) -> list[str]:
    """Return a line for stop ids that are outside of a model's vocabulary."""
    beyond = [token for token in ids if not 0 <= token < vocab_size]
    if not beyond:
        return []
    return [
        f"--stop: {', '.join(map(str, beyond))} can't occur: the model's ids go from 0 to "
        f"{vocab_size - 1}"
    ]


def of_prolonging(run: Run, folder: RunDirectory) -> list[str]:
    """Return a line if the learning rate jumps when the run in a folder is continued to another
    number of steps."""
    if not folder.exists:
        return []
    before = folder.load_config().train
    with Checkpoints(folder.checkpoints, read_only=True) as checkpoints:
        step = checkpoints.latest()
    if step is None or before.steps == run.train.steps:
        return []
    return of_jump(before, run.train, step)


def of_jump(before: Training, after: Training, step: int) -> list[str]:
    """Return a line if the learning rate of the longer run after `step` updates is more than 1.1
    times the last learning rate of the shorter run."""

    def rate(training: Training, at: int) -> float:
        training = training.effective
        plan = Plan(training.learning_rate, training.steps, training.batch * training.length)
        return float(training.schedule.rate(jnp.asarray(at), plan))

    last, following = rate(before, min(step, before.steps) - 1), rate(after, step)
    if after.schedule.stable_until(after.steps) is not None or following <= 1.1 * last:
        return []
    kind = after.schedule.kind  # pyright: ignore[reportAttributeAccessIssue]
    return [
        f"train.steps: from {before.steps} to {after.steps} under {kind}, which falls until the "
        f"last step: at step {step} the learning rate jumps from {last:.3g} to {following:.3g}; "
        "runs under wsd, power or inverse_sqrt can be prolonged without a jump "
        "(train.schedule.kind)"
    ]
