"""The coordinate check: measure how the change of activations in the first steps depends on width
or depth.

If hyperparameters transfer, the change of every activation since the start is equally large in a
wide and a narrow model: the slope of its logarithm against the logarithm of the width is near zero
(Yang et al. 2022, appendix D.1; bounds and intervals of slopes are ours). All steps train on one
batch, at a large constant learning rate.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mukv.core import statistics
from mukv.core.errors import BadInput
from mukv.core.mesh import MeshShape
from mukv.core.tap import capture
from mukv.core.typing import Array
from mukv.model import LanguageModel
from mukv.scaling.schedules import Cosine
from mukv.show.figures import ROW_INCHES, labels, powers, saved_figure, series_styles
from mukv.show.progress import Bar
from mukv.train.step import Trainer
from mukv.train.training import Training
from mukv.tuning.axes import Axis, along

LIMIT = 0.2
LOGITS_LIMIT = 0.35
"""Largest absolute slopes that pass, of most activations and of logits, which are smaller at the
start than later."""
SIGMAS = 2.0
"""Half the width of a slope's interval, in standard errors."""
INSIDE_A_HEAD = (".weights", ".query", ".key", ".value")
"""Suffixes of the activations that are not checked. Queries and keys are covered by the logits,
weights and values by the output of attention."""
LEAVES = "mlp"
"""Suffix of the residual stream after a layer."""
LEARNING_RATE = 2.0**-7


@dataclass(frozen=True)
class Slope:
    """Slope of one activation's change: d log2 change / d log2 value after the last step.

    slope, low, high: the slope and the ends of its interval
    limit: largest absolute slope that passes
    changes: root mean square of the change by width or depth, mean over seeds
    deviations: standard deviation over seeds by width or depth; empty for one seed
    """

    name: str
    slope: float
    low: float
    high: float
    limit: float
    changes: Mapping[int, float]
    deviations: Mapping[int, float] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """Whether the absolute slope is at most the limit."""
        return abs(self.slope) <= self.limit

    @property
    def sure(self) -> bool:
        """Whether the verdict is certain: the slope passes, or its whole interval is beyond the
        limit."""
        return self.passed or self.low > self.limit or self.high < -self.limit


def check(
    model: LanguageModel,
    training: Training,
    batch: Any,
    values: Sequence[int],
    seeds: int = 3,
    steps: int = 10,
    learning_rate: float = LEARNING_RATE,
    axis: Axis = "width",
) -> list[Slope]:
    """Train at each width or depth with each seed, and fit the slopes.

    batch: `training.batch` rows
    axis: "width" or "depth". Over depth, what leaves a layer of the shallowest model is compared
        with what leaves the layer of a deeper one after which the same share of the layers is done;
        activations inside of layers have no such counterpart and are left out

    The base of the parameterisation is the model's, or, if it has none, the smallest value. At the
    base the learning rate is `learning_rate`, and no other width has a larger one.

    Raises BadInput for values that can't be compared or do not fit a size of the model.
    """
    for name, number in (("seeds", seeds), ("steps", steps)):
        if number < 1:
            raise BadInput(name, number, "at least 1")
    training = replace(
        training, steps=steps, learning_rate=learning_rate, schedule=Cosine(final=1.0)
    )
    _, points = along(axis, values, model, training)
    if axis == "depth":
        for depth in points:
            if depth % min(points):
                raise BadInput("depths", depth, f"a multiple of the shallowest ({min(points)})")
    seen: dict[int, list[dict[str, float]]] = {}
    with Bar("coordinate check", len(points) * seeds) as bar:
        for value, point in points.items():
            seen[value] = []
            trainer = Trainer(point.model, training, MeshShape().build())
            put = trainer.put(batch)
            every = value // min(points) if axis == "depth" else 1
            for seed in range(seeds):
                change = changes(trainer, put, seed)
                seen[value].append(_leaving(change, every) if axis == "depth" else change)
                bar.show(sum(map(len, seen.values())), {axis: str(value)})
    # With adapters some activations, such as the embedding, do not change.
    rows = [row for found in seen.values() for row in found]
    return [fit(name, seen) for name in rows[0] if any(row[name] for row in rows)]


def changes(trainer: Trainer, batch: Any, seed: int) -> dict[str, float]:
    """Compute the root mean square of each activation's change, by name.

    With adapters the frozen weights of the model are drawn from the same seed.
    """
    activations = jax.jit(lambda weights, frozen: _activations(trainer, weights, batch, frozen))
    distance = jax.jit(lambda after, before: jax.tree.map(_distance, after, before))
    with jax.set_mesh(trainer.mesh):
        trainer.thaw()
        state = trainer.initial_state(seed)
        before = activations(state.weights, trainer.frozen)
        for step in range(trainer.training.steps):
            state, _ = trainer.step(state, step, batch)
        change = distance(activations(state.weights, trainer.frozen), before)
    return {name: float(value) for name, value in change.items()}


def fit(name: str, seen: Mapping[int, Sequence[Mapping[str, float]]]) -> Slope:
    """Fit a slope by least squares over all values and seeds."""
    points = [(np.log2(value), np.log2(row[name])) for value, rows in seen.items() for row in rows]
    slope, error = statistics.line(points)
    return Slope(
        name,
        slope,
        slope - SIGMAS * error,
        slope + SIGMAS * error,
        LOGITS_LIMIT if name == "logits" else LIMIT,
        {value: float(np.mean([row[name] for row in rows])) for value, rows in seen.items()},
        {
            value: float(np.std([row[name] for row in rows], ddof=1))
            for value, rows in seen.items()
            if len(rows) > 1
        },
    )


def _leaving(change: Mapping[str, float], every: int) -> dict[str, float]:
    """Keep what leaves the last of each `every` layers, and number these layers without gaps; keep
    embedding and logits."""
    found = {name: value for name, value in change.items() if "." not in name}
    numbers = range(every - 1, len(change), every)
    names = [f"layer{number}.{LEAVES}" for number in numbers]
    leaving = [change[name] for name in names if name in change]
    return found | {f"layer{number}.{LEAVES}": value for number, value in enumerate(leaving)}


def _activations(trainer: Trainer, weights: Any, batch: Any, frozen: Any) -> dict[str, Array]:
    model, compute = trainer.model, trainer.compute
    scaled = trainer.whole(weights, frozen)
    with capture() as taps:
        place = batch["position"], batch["segment"]
        hidden = model.hidden(scaled, batch["tokens"], *place, compute)
        model.logits(scaled, hidden, compute)
    return {name: value for name, value in taps.items() if not name.endswith(INSIDE_A_HEAD)}


def _distance(after: Array, before: Array) -> Array:
    # Masked pairs have infinite logits, before and after; leave them out.
    seen = jnp.isfinite(before)
    change = jnp.where(seen, after, 0.0).astype(jnp.float32) - jnp.where(seen, before, 0.0)
    return jnp.sqrt(jnp.sum(change**2) / jnp.sum(seen))


def draw(slopes: Sequence[Slope], path: Path, title: str, axis: Axis = "width") -> None:
    """Draw the change against width or depth, with a panel for each kind of activation."""
    kinds: dict[str, list[Slope]] = {}
    for each in slopes:
        kind = each.name.split(".")[-1]
        inside = "attention logits" if kind == "logits" and "." in each.name else kind
        kinds.setdefault(inside, []).append(each)
    about = (
        f"Change of activations since the start against the {axis}: flat where hyperparameters "
        "transfer. Numbers: slopes; dashed: beyond the limit."
        + " Bars: deviation of seeds."
        * any(each.deviations for each in slopes)
    )
    rows = max(map(len, kinds.values()))
    size = (3.4 * len(kinds), 3.4 + ROW_INCHES * rows)
    with saved_figure(path, size, title, about) as figure:
        panels = figure.subplots(1, len(kinds), squeeze=False)[0]
        for axes, (kind, group) in zip(panels, kinds.items(), strict=True):
            names = labels(each.name.split(".")[0] if "." in each.name else kind for each in group)
            for each, name, style in zip(group, names, series_styles(len(group)), strict=True):
                style |= {"linestyle": "-" if each.passed else "--", "ms": 4, "capsize": 2}
                widths, means = list(each.changes), list(each.changes.values())
                bars = [each.deviations[width] for width in widths] if each.deviations else None
                # Lower ends stay positive, for the logarithmic axis.
                bars = bars and [[min(b, m / 2) for b, m in zip(bars, means, strict=True)], bars]
                axes.errorbar(widths, means, bars, label=f"{name} {each.slope:+.2f}", **style)
            axes.set_yscale("log", base=2)
            powers(axes.xaxis, [width for each in group for width in each.changes])
            # A flat line must look flat, so show at least four octaves.
            middle = np.sqrt(np.prod(axes.get_ylim()))
            low, high = axes.get_ylim()
            axes.set_ylim(min(low, middle / 4), max(high, middle * 4))
            axes.set(title=kind, xlabel=axis)
            axes.grid(alpha=0.3)
            # Each panel has its own legend, because the numbers differ.
            axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.2))
        panels[0].set_ylabel("RMS change since the start")
