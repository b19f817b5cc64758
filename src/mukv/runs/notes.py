"""Notes: what a configuration says that has no effect, or another one than a user may expect.

Each function returns lines for a person; a command prints them before it begins to work.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from mukv.core.params import count
from mukv.data.feed import Feed, TextFeed
from mukv.runs.config import Run
from mukv.runs.describe import weights
from mukv.runs.folder import RunDirectory
from mukv.runs.start import trained_params
from mukv.scaling.schedules import Plan
from mukv.storage.checkpoint import Checkpoints
from mukv.train.training import Training


def of_run(run: Run) -> list[str]:
    """Values of a run that have no effect."""
    found = []
    warmup, steps = run.train.schedule.warmup, run.train.steps
    if warmup >= steps:
        found.append(
            f"train.schedule.warmup: {warmup} steps, but train.steps is {steps}: the learning rate "
            "never reaches its peak"
        )
    if run.mesh.tensor > 1 and not any("tensor" in row["sharding"] for row in weights(run)):
        found.append(
            f"mesh.tensor: {run.mesh.tensor} splits no weight: it divides neither the heads nor "
            "the width of the MLP nor the vocabulary"
        )
    return found


def of_defaults(mapping: Mapping[str, Any], run: Run) -> list[str]:
    """Sizes of an attention variant that nobody gave. mapping: the keys that were given."""
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
    """What a run trains on, and where that lies."""
    if isinstance(feed, TextFeed):
        tokens = feed.tokens
        sources = ", ".join(tokens.sources[:3]) + (", ..." if len(tokens.sources) > 3 else "")
        return (
            f"training on {len(tokens.train.tokens):,} tokens of {sources} in {tokens.path} "
            "(data.path)"
        )
    return "training on a synthetic task (data.task)"


def of_adapter(run: Run) -> list[str]:
    """What a run with adapters trains."""
    if run.train.adapter is None:
        return []
    trained, every = count(trained_params(run)), count(run.model.params())
    return [
        f"train.adapter: {trained:,} numbers are trained, {trained / every:.2%} of the model's; "
        f"the weights of {run.train.start} stay as they are"
    ]


def of_length(length: int, run: Run, what: str) -> list[str]:
    """A text that is longer than those that a model was trained on. length: tokens."""
    trained = run.model.context or run.train.length
    if length <= trained:
        return []
    return [
        f"{what}: {length:,} tokens, but the model was trained on rows of {trained:,}: beyond them "
        "its quality is untested"
    ]


def of_stop(ids: Sequence[int], vocab_size: int) -> list[str]:
    """Ids that end a text and that no model of this vocabulary can produce."""
    beyond = [token for token in ids if not 0 <= token < vocab_size]
    if not beyond:
        return []
    return [
        f"--stop: {', '.join(map(str, beyond))} can't occur: the model's ids go from 0 to "
        f"{vocab_size - 1}"
    ]


def of_prolonging(run: Run, folder: RunDirectory) -> list[str]:
    """A learning rate that jumps where the run in a folder goes on to more steps."""
    if not folder.exists:
        return []
    before = folder.load_config().train
    with Checkpoints(folder.checkpoints, read_only=True) as checkpoints:
        step = checkpoints.latest()
    if step is None or before.steps == run.train.steps:
        return []
    return of_jump(before, run.train, step)


def of_jump(before: Training, after: Training, step: int) -> list[str]:
    """A learning rate that is higher at a step than the one before. step: updates done."""

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
