"""Train runs that differ only in numbers together, in one program.

Learning rates, constants, decay, seeds and numbers of a schedule are arguments of the program, and
the training step is mapped over them. The result of each run is the same as alone, up to rounding.
Runs are trained on one device; a group is split until the compiled step fits the bytes of device
memory that it may take.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mukv.core.errors import BadInput
from mukv.core.mesh import MeshShape
from mukv.core.typing import Array
from mukv.data.batches import Batch, Prefetch
from mukv.data.feed import Feed, Half, Source
from mukv.model import LanguageModel
from mukv.schema import schema
from mukv.schema.numbers import leaves, substituted
from mukv.show.progress import Bar
from mukv.train import footprint
from mukv.train.loop import due
from mukv.train.state import Metrics, State
from mukv.train.step import BATCH_FIELDS, Trainer
from mukv.train.training import Training
from mukv.train.validation import validated

TRACED: dict[str, tuple[str, ...]] = {
    "train": ("seed", "learning_rate", "clip_norm"),
    "train.schedule": ("warmup", "final", "decay", "reference", "amplitude", "exponent"),
    "train.optimizer": (
        *("weight_decay", "beta1", "beta2", "momentum", "epsilon", "outer", "inner", "rate"),
        *("decay_rate", "clip_threshold"),
    ),
    **{
        f"model.scaling.{constant}": ("embedding", "hidden", "readout", "vector")
        for constant in ("rate", "multiplier", "deviation")
    },
}
"""Configuration keys whose numbers may differ between the points of one program, by section."""
PATHS = frozenset(f"{where}.{name}" for where, names in TRACED.items() for name in names)


class Point(NamedTuple):
    """Model and training of one run."""

    model: LanguageModel
    training: Training

    def leaves(self) -> dict[str, Any]:
        """Return every configuration value by path, after `train.budget` was applied."""
        training = schema.to_mapping(self.training.effective)
        return leaves({"model": schema.to_mapping(self.model), "train": training})


class Report(NamedTuple):
    """Metrics of all points after a step.

    numbers: metrics of each point, by name; infinite if the point diverged
    """

    step: int
    numbers: list[dict[str, float]]


def grouped(points: Sequence[Point]) -> list[list[int]]:
    """Return the indices of the points that can be trained together, by group."""
    groups: dict[Any, list[int]] = {}
    for index, point in enumerate(points):
        fixed = {
            path: "number" if _traced(path, value) else repr(value)
            for path, value in point.leaves().items()
        }
        groups.setdefault(tuple(sorted(fixed.items())), []).append(index)
    return list(groups.values())


def _traced(path: str, value: Any) -> bool:
    return path in PATHS and isinstance(value, int | float) and not isinstance(value, bool)


def free_memory() -> int:
    """Return the bytes that a group may take by default: 90 % of the free memory of an accelerator,
    half of the free RAM on a CPU."""
    return int(footprint.free_memory() * (0.5 if jax.devices()[0].platform == "cpu" else 0.9))


@dataclass
class Together:
    """A group of points, which must be one of `grouped`.

    feed: training and validation batches of all points
    across: how one step is mapped over the points: "vmap" computes all points at once, "map" one
        after another within the program; None for the faster one, which is "map" on a CPU, where
        one point uses all cores (benchmarks/sweep.py)
    stopped: indices of points that need not be trained further
    start: initial weights of all points, or the frozen weights under their adapters; None draws
        them
    """

    points: Sequence[Point]
    feed: Feed
    across: Literal["vmap", "map"] | None = None
    stopped: set[int] = field(default_factory=set)
    start: Any = None

    def __post_init__(self) -> None:
        values = [point.leaves() for point in self.points]
        first = self.points[0]
        self.model, self.training = first.model, first.training.effective
        if self.training.stages:
            allowed = "none: points that are trained together have rows of one length"
            raise BadInput("train.stages", list(self.training.stages), allowed)
        self.mesh = MeshShape().build()
        varied = [path for path in values[0] if len({each[path] for each in values}) > 1]
        self.seeds = sorted({each["train.seed"] for each in values})
        which = [self.seeds.index(each["train.seed"]) for each in values]
        self.numbers: dict[str, np.ndarray] = {
            path: np.array([each[path] for each in values], _dtype(path, values[0][path]))
            for path in varied
        }
        self.which = np.array(which, np.int32)
        self.frozen = None if self.training.adapter is None else self.start

    # The program

    def _trainer(self, numbers: dict[str, Array]) -> Trainer:
        inside: dict[str, dict[str, Array]] = {"model": {}, "train": {}}
        for path, number in numbers.items():
            section, _, rest = path.partition(".")
            inside[section][rest] = number
        model = substituted(self.model, inside["model"])
        return Trainer(model, substituted(self.training, inside["train"]), self.mesh)

    def _map(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Map a function over the leading axis of all arguments."""
        on_cpu = self.mesh.devices.flat[0].platform == "cpu"
        if (self.across or ("map" if on_cpu else "vmap")) == "map":
            return lambda *arguments: jax.lax.map(lambda each: function(*each), arguments)
        return jax.vmap(function)

    def _draw(self, numbers: dict[str, Array], start: Any) -> State:
        def one(numbers: dict[str, Array]) -> State:
            trainer = self._trainer(numbers)
            if start is not None and trainer.adapter is None:
                return trainer.begin(start)
            return trainer.draw(jax.random.key(trainer.training.seed))

        return self._map(one)(numbers) if numbers else self._map(lambda _: one({}))(self.which)

    def _of_seed(self, batches: Any, which: Array) -> Any:
        """Return the batch of one seed from the batches of all seeds.

        With one seed all points share the batch, and the computations that depend only on it.
        """
        return jax.tree.map(lambda all: all[which if len(self.seeds) > 1 else 0], batches)

    def _update(
        self, numbers: Any, which: Array, states: State, step: Array, batches: Any, frozen: Any
    ) -> tuple[State, Metrics]:
        def one(numbers: Any, which: Array, state: State) -> tuple[State, Metrics]:
            batch = self._of_seed(batches, which)
            return self._trainer(numbers).update(state, step, batch, frozen)

        return self._map(one)(numbers, which, states)

    def _validate(
        self, numbers: Any, which: Array, states: State, batches: Any, table: Array, frozen: Any
    ) -> Any:
        def one(numbers: Any, which: Array, state: State) -> Any:
            batch = self._of_seed(batches, which)
            return self._trainer(numbers).validation_sums(state.weights, batch, table, frozen)

        return self._map(one)(numbers, which, states)

    @cached_property
    def compiled(self) -> Any:
        """The compiled training step. Raises BadInput if even one point takes more memory than is
        free."""
        trainer = self._trainer({})
        trainer.frozen = self.frozen
        footprint.require_least(trainer)
        with jax.set_mesh(self.mesh):
            states = jax.eval_shape(self._draw, self.numbers, self.start)
            batches = jax.eval_shape(lambda: self._batch(0))
            step = jax.ShapeDtypeStruct((), jnp.int32)
            function = jax.jit(self._update, donate_argnums=2)
            given = (self.numbers, self.which, states, step, batches, self.frozen)
            return function.lower(*given).compile()

    def memory(self) -> int:
        """Return the bytes of a step, states and batch included."""
        memory = self.compiled.memory_analysis()
        taken = memory.argument_size_in_bytes + memory.temp_size_in_bytes
        return taken + memory.output_size_in_bytes - memory.alias_size_in_bytes

    def fitting(self, budget: int) -> list[Together]:
        """Split this group into parts that each take at most `budget` bytes. A part of one point is
        returned whatever it takes."""
        if len(self.points) == 1 or self.memory() <= budget:
            return [self]
        half = len(self.points) // 2
        return [
            part
            for points in (self.points[:half], self.points[half:])
            for part in self._with(points).fitting(budget)
        ]

    def _with(self, points: Sequence[Point]) -> Together:
        return Together(points, self.feed, self.across, start=self.start)

    # The loop

    def _sources(self, split: Half) -> list[Source]:
        """Return the batches of each seed."""
        sizes = {"batch": self.training.batch, "length": self.training.length}
        return [self.feed.source(split, seed, **sizes) for seed in self.seeds]

    def _batch(self, step: int) -> dict[str, np.ndarray]:
        return _stacked([source.at(step) for source in self._training])

    @cached_property
    def _training(self) -> list[Source]:
        return self._sources("train")

    def run(self, title: str = "training") -> Iterator[Report]:
        """Train to the last step; yield a report whenever metrics are due.

        Ends early if all points are in `stopped`, to which the caller may add points.
        """
        training = self.training
        with jax.set_mesh(self.mesh):
            self.states = jax.jit(self._draw)(self.numbers, self.start)
            step_all, validate = self.compiled, jax.jit(self._validate)
            with (
                Bar(title, training.steps) as bar,
                Prefetch(self._batch, range(training.steps)) as prefetch,
            ):
                for step, batch in enumerate(prefetch, start=1):
                    self.states, metrics = step_all(
                        *(self.numbers, self.which, self.states, np.int32(step - 1), batch),
                        self.frozen,
                    )
                    ends = step == training.steps
                    evaluates = ends or due(step, training.evaluate_every)
                    if not (evaluates or step % training.log_every == 0):
                        continue
                    numbers = self._numbers(metrics, step)
                    if evaluates:
                        for row, validation in zip(numbers, self._evaluate(validate), strict=True):
                            row |= validation if row["loss"] < np.inf else _diverged(validation)
                    losses = [row["loss"] for row in numbers]
                    bar.show(step, {"points": str(len(losses)), "best loss": f"{min(losses):.3f}"})
                    yield Report(step, numbers)
                    if len(self.stopped) == len(self.points):
                        break

    def weights(self, point: int) -> Any:
        """Return the weights of one point after `run`."""
        return jax.tree.map(lambda leaf: leaf[point], self.states.weights)

    def _numbers(self, metrics: Metrics, step: int) -> list[dict[str, float]]:
        values, steps = jax.device_get((metrics, self.states.step))
        names = ("loss", "gradient_norm", "learning_rate")
        rows: list[dict[str, float]] = []
        for point, done in enumerate(steps):
            row = {name: float(getattr(values, name)[point]) for name in names}
            # After a loss or gradient that is not finite, a state no longer changes.
            rows.append(row if done == step else _diverged(row))
        return rows

    def _evaluate(self, validate: Callable[..., Any]) -> list[dict[str, float]]:
        table = jnp.asarray(self.feed.tokenizer.token_bytes(self.model.vocab_size))

        def summed(sources: Sequence[Source], limit: int | None) -> np.ndarray:
            sums = np.zeros((3, len(self.points)))
            for batches in zip(*(source.once(limit) for source in sources), strict=True):
                given = (self.numbers, self.which, self.states, _stacked(batches), table)
                sums += np.array(validate(*given, self.frozen))
            return sums

        found = validated(self._sources("validation"), self.training.validation_batches, summed)
        return [
            {name: float(values[point]) for name, values in found.items()}
            for point in range(len(self.points))
        ]


def _stacked(batches: Sequence[Batch]) -> dict[str, np.ndarray]:
    """Stack the batches of all seeds: every field [seed batch ...]."""
    return {name: np.stack([getattr(batch, name) for batch in batches]) for name in BATCH_FIELDS}


def _diverged(row: dict[str, float]) -> dict[str, float]:
    return dict.fromkeys(row, float("inf"))


def _dtype(path: str, value: Any) -> np.dtype:
    if path == "train.seed":
        return np.dtype(np.uint32)
    return np.dtype(np.int32 if isinstance(value, int) else np.float32)
