"""One training step.

A step is a pure function of (state, batch). It sums loss and gradient over all pieces of the batch,
divides them by the sum of the loss weights, clips the gradient and applies the update. If loss or
gradient is not finite, this step and all later ones leave the state unchanged, so that the failure
can be examined with the weights that caused it. `loop.py` runs the steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from mukv.core import params
from mukv.core.errors import BadInput
from mukv.core.mesh import (
    ROWS,
    batch_sharding,
    replicated,
    share_of_batch,
    size_of,
    weight_shardings,
)
from mukv.core.tap import capture
from mukv.core.typing import Array, Float, Int
from mukv.model.base import LanguageModel
from mukv.model.loss import Losses, Teacher, summed_loss
from mukv.scaling.schedules import Plan
from mukv.scaling.updates import global_norm
from mukv.train import distillation
from mukv.train.division import require_split
from mukv.train.state import Metrics, State, state_shardings
from mukv.train.training import Training

BATCH_FIELDS = ("tokens", "targets", "weight", "position", "segment")
BatchArrays = Mapping[str, Array]
"""tokens, targets, position, segment: int32 [batch token]; weight: float32 [batch token]."""


class Trainer:
    """The compiled functions of one model, training plan and mesh.

    `share` is the part of each batch that this process reads (`host` of `hosts`). `declared` and
    `resolved` describe the weights that are trained. `frozen` is the tree of the model's weights,
    which are not trained when adapters are: arrays on the mesh, or `jax.ShapeDtypeStruct` before
    `freeze` has received them; None without adapters. `taught` is the tree of a teacher's weights,
    scaled: arrays on the mesh, or `jax.ShapeDtypeStruct` before `teach` has received them; None if
    no teacher is run.
    """

    def __init__(
        self,
        model: LanguageModel,
        training: Training,
        mesh: Mesh,
        teacher: LanguageModel | None = None,
    ):
        """Build the functions.

        teacher: the model that `training.teacher` names; None if it names none

        Raises BadInput if the batch can't be split over the mesh, for a teacher that is named and
        not given, and for a cache policy that does not fit the model.
        """
        if training.teacher is not None and teacher is None:
            allowed = "null here: only `mukv train` learns from a teacher"
            raise BadInput("train.teacher", training.teacher, allowed)
        require_split(training, dict(mesh.shape))
        if training.through is not None:
            for _, length in training.sizes:
                model.check_through(training.through, length)
        training = training.effective
        self.model, self.training, self.mesh = model, training, mesh
        self.share = share_of_batch(mesh)
        self.platform = mesh.devices.flat[0].platform
        self.compute = training.compute.resolve(self.platform)
        self.adapter, family = training.adapter, training.optimizer.family
        self.frozen: Any = None
        if self.adapter is None:
            self.declared, self.resolved = model.params(), model.resolved(family)
        else:
            self.declared = self.adapter.params(model.params())
            self.resolved = self.adapter.resolved(model, family)
            self.thaw()
        # With weight 0 the program is that of training without a teacher.
        self.teacher = teacher if training.distillation.weight else None
        self.taught: Any = None
        if self.teacher is not None:
            self.taught = distillation.abstract_weights(self.teacher, self.compute, mesh)
        self.optimizer = training.optimizer.transform(self.declared, self.resolved)
        self._compiled: dict[tuple[int, ...], Any] = {}
        self._step = jax.jit(
            self.update,
            donate_argnums=0,
            out_shardings=(self.shardings(), replicated(mesh)),
        )
        self._validate = jax.jit(self.validation_sums, out_shardings=replicated(mesh))

    def step(self, state: State, step: int, batch: BatchArrays) -> tuple[State, Metrics]:
        """Do update number `step`, counted from 0; the given state is donated."""
        compiled = self._compiled.get(batch["tokens"].shape, self._step)
        result = compiled(state, step, batch, self.frozen, self.taught)
        if self.platform == "cpu" and self.mesh.size > 1:
            # Simulated devices share one pool of threads. A second program could occupy the threads
            # that the first needs to finish a collective, which is a deadlock.
            jax.block_until_ready(result)
        return result

    def validate(self, weights: Any, batch: BatchArrays, token_bytes: Int[Array, " vocab"]) -> Any:
        """Compute `validation_sums`, compiled."""
        return self._validate(weights, batch, token_bytes, self.frozen)

    def compile(self, batch: Any) -> Any:
        """Compile the step for batches of these shapes; `step` then uses the result.

        batch: `jax.ShapeDtypeStruct` by field, with shardings
        """
        with jax.set_mesh(self.mesh):
            others = jax.tree.map(_abstract, (self.frozen, self.taught))
            lowered = self._step.lower(self.abstract_state(), 0, batch, *others)
            compiled = self._compiled[batch["tokens"].shape] = lowered.compile()
        return compiled

    def abstract_state(self) -> State:
        """Return shapes and shardings of the state without allocating it."""
        return jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            jax.eval_shape(self.draw, jax.random.key(0)),
            self.shardings(),
        )

    def abstract_weights(self, like: Any = None) -> Any:
        """Return shapes and shardings of all weights of the model.

        like: tree of arrays or abstract arrays whose dtypes the weights have; None for float32
        """
        declared = self.model.params()
        types = params.abstract(declared) if like is None else like

        def one(param: params.Param, sharding: Any, typed: Any) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(param.shape, typed.dtype, sharding=sharding)

        return params.map_params(one, declared, weight_shardings(declared, self.mesh), types)

    def freeze(self, weights: Any) -> None:
        """Put the model's weights, which are frozen while adapters are trained, on the mesh.

        weights: of any dtype, which is kept
        """
        self.frozen = jax.device_put(weights, weight_shardings(self.model.params(), self.mesh))

    def thaw(self) -> None:
        """Drop the frozen weights. Unless `freeze` is called, `initial_state` then draws them."""
        self.frozen = None if self.adapter is None else self.abstract_weights()

    def teach(self, weights: Any) -> None:
        """Put the teacher's weights on the mesh. weights: as they are saved, of any dtype."""
        if self.teacher is not None:
            given = self.teacher, weights, self.taught, self.mesh
            self.taught = distillation.placed_weights(*given)

    def initial_state(self, seed: int | None = None) -> State:
        """Draw the state before the first update; each device draws its own shard.

        seed: random seed; None for the seed of the training plan

        With adapters, their weights are drawn, and also the frozen weights of the model if `freeze`
        has not received any.
        """
        with jax.set_mesh(self.mesh):
            key = jax.random.key(self.training.seed if seed is None else seed)
            if self.adapter is not None and not self.has_frozen:
                whole = weight_shardings(self.model.params(), self.mesh)
                self.frozen = jax.jit(self.model.draw, out_shardings=whole)(key)
            return jax.jit(self.draw, out_shardings=self.shardings())(key)

    @property
    def has_frozen(self) -> bool:
        """Whether the frozen weights are allocated."""
        return any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(self.frozen))

    def state_of(self, weights: Any) -> State:
        """Make the state before the first update from these weights, of any dtype."""

        with jax.set_mesh(self.mesh):
            return jax.jit(self.begin, out_shardings=self.shardings())(weights)

    def shardings(self) -> State:
        """Return the sharding of each part of the state."""
        return state_shardings(self.declared, self.optimizer, self.mesh)

    def put(self, batch: Any) -> BatchArrays:
        """Convert this process's share of a batch (NumPy arrays) to global arrays on the mesh."""
        sharding = batch_sharding(self.mesh)

        def placed(own: Any) -> Array:
            # Every process has whole rows, also where it needs only some of their tokens.
            shape = self.share["hosts"] * len(own), *own.shape[1:]
            return jax.make_array_from_process_local_data(sharding, own, shape)

        return {name: placed(getattr(batch, name)) for name in BATCH_FIELDS}

    def learning_rate(self, step: Int[Array, ""]) -> Float[Array, ""]:
        """Compute the schedule's learning rate of update number `step`."""
        training = self.training
        tokens = training.batch * training.length
        plan = Plan(training.learning_rate, training.steps, tokens)
        return training.schedule.rate(step, plan)

    def blame(self, state: State, batch: BatchArrays) -> str:
        """Name the place where the first number that is not finite appears, forward and then
        backward.
        """
        with jax.set_mesh(self.mesh):
            seen = jax.jit(self._finite)(state.weights, batch, self.frozen)
            for name, finite in seen.items():
                if not finite:
                    return f"the output of {name}"
            slope = jax.jit(jax.grad(self._objective, has_aux=True))
            batch = self.drawn(batch, state.step)
            gradient = slope(state.weights, batch, self.frozen, self.taught)[0]
            # Gradients flow from the last layer to the first, so the last bad one is the cause.
            broken = [
                name
                for name, leaf in params.named(gradient).items()
                if not jnp.isfinite(leaf).all()
            ]
        return f"the gradient of {broken[-1]}" if broken else "the norm of the gradient"

    # Traced

    def draw(self, key: Array) -> State:
        """Draw the state before the first update."""
        if self.adapter is None:
            weights = self.model.draw(key)
        else:
            deviations = jax.tree.map(lambda weight: weight.deviation, self.resolved)
            weights = params.initialise(self.declared, deviations, key)
        return State(weights, self.optimizer.init(weights), jnp.zeros((), jnp.int32))

    def begin(self, weights: Any) -> State:
        """Make the state before the first update from all weights of a model."""
        wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), weights)
        return State(wide, self.optimizer.init(wide), jnp.zeros((), jnp.int32))

    def whole(self, weights: Any, frozen: Any = None) -> Any:
        """Return all weights as the forward pass takes them.

        weights: trained weights. frozen: weights of the model under adapters; None without.
        """
        if self.adapter is None:
            return self.model.scaled(weights)
        return self.adapter.attached(self.model, frozen, weights)

    def drawn(self, batch: BatchArrays, step: Any) -> BatchArrays:
        """Return the batch of a step with what the objective draws for its rows."""
        adapter, training = self.adapter, self.training
        return batch if adapter is None else adapter.drawn(batch, training, step)

    def _objective(
        self, weights: Any, batch: BatchArrays, frozen: Any, taught: Any = None
    ) -> tuple[Float[Array, ""], Losses]:
        losses = self._losses(weights, batch, frozen, taught)
        return losses.objective, losses

    def _losses(self, weights: Any, batch: BatchArrays, frozen: Any, taught: Any = None) -> Losses:
        """Compute the summed losses. taught: weights of the teacher; None to leave it out."""
        teacher, through = None, self.training.through
        if self.teacher is not None and taught is not None:
            plan = self.training.distillation
            teacher = Teacher(self.teacher, taught, plan.weight, plan.temperature)
        whole = self.whole(weights, frozen)
        arrays = (self.model, whole, *(batch[name] for name in BATCH_FIELDS))
        if self.adapter is not None:
            teacher = self.adapter.teacher(batch, self.model, whole, teacher)
            through = self.adapter.reading(batch, through)
        return summed_loss(*arrays, compute=self.compute, teacher=teacher, through=through)

    def validation_sums(
        self,
        weights: Any,
        batch: BatchArrays,
        token_bytes: Int[Array, " vocab"],
        frozen: Any = None,
    ) -> tuple[Float[Array, ""], Float[Array, ""], Float[Array, ""]]:
        """Return the summed cross-entropy (nats), the number of targets, and their UTF-8 bytes."""
        counted = batch["weight"] > 0
        read = jnp.where(counted, token_bytes[batch["targets"]], 0)
        # Float32 counts exactly up to 2**24, far beyond one batch.
        nats = self._losses(weights, batch, frozen).cross_entropy
        return nats, jnp.sum(batch["weight"]), jnp.sum(read * 1.0)

    def _finite(self, weights: Any, batch: BatchArrays, frozen: Any) -> dict[str, Array]:
        with capture() as taps:
            self._losses(weights, batch, frozen)
        return {name: jnp.isfinite(value).all() for name, value in taps.items()}

    def _gradient(
        self, weights: Any, batch: BatchArrays, frozen: Any, taught: Any = None
    ) -> tuple[Losses, Any]:
        """Compute the summed losses of the whole batch and the gradient of the objective.

        On a CPU whose simulated devices split only the batch, each device computes the sums of its
        own rows, and these are added by a collective. This is 1.4 times as fast, because the
        partitioner does not support the layouts that make matrix products fast there
        (core/linear.py). Elsewhere the partitioner splits the whole computation.
        """
        mesh = self.mesh
        if self.platform != "cpu" or size_of(mesh, *ROWS) < mesh.size or mesh.size == 1:
            return self._accumulated(weights, batch, frozen, taught)

        def local(weights: Any, batch: BatchArrays, frozen: Any, taught: Any) -> tuple[Losses, Any]:
            return jax.lax.psum(self._accumulated(weights, batch, frozen, taught), ROWS)

        whole = PartitionSpec()
        split = {name: PartitionSpec(ROWS) for name in batch}
        return jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(whole, split, whole, whole),
            out_specs=whole,
            check_vma=False,
        )(weights, dict(batch), frozen, taught)

    def _accumulated(
        self, weights: Any, batch: BatchArrays, frozen: Any, taught: Any
    ) -> tuple[Losses, Any]:
        """Compute losses and gradient as `_gradient` does, in `accumulate` pieces of the batch, one
        after another."""
        pieces = self.training.accumulate

        def losses_and_gradient(weights: Any, batch: BatchArrays) -> tuple[Losses, Any]:
            (_, losses), gradient = jax.value_and_grad(self._objective, has_aux=True)(
                weights, batch, frozen, taught
            )
            return losses, gradient

        if pieces == 1:
            return losses_and_gradient(weights, batch)

        def split(array: Array) -> Array:
            # Row r goes to piece r modulo pieces, so that every device keeps its own rows.
            return array.reshape(-1, pieces, *array.shape[1:]).swapaxes(0, 1)

        def add(total: Any, piece: BatchArrays) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, losses_and_gradient(weights, piece)), None

        shapes = jax.eval_shape(losses_and_gradient, weights, batch)
        start = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        total, _ = jax.lax.scan(add, start, jax.tree.map(split, dict(batch)))
        return total

    def update(
        self,
        state: State,
        step: Int[Array, ""],
        batch: BatchArrays,
        frozen: Any = None,
        taught: Any = None,
    ) -> tuple[State, Metrics]:
        """Do update number `step`, counted from 0. If it is not the next update of the state, the
        state is returned unchanged.

        frozen: weights of the model, which adapters change; None without adapters
        taught: weights of the teacher; None without one
        """
        training, batch = self.training, self.drawn(batch, state.step)
        losses, gradient = self._gradient(state.weights, batch, frozen, taught)
        weight = jnp.maximum(jnp.sum(batch["weight"]), 1.0)
        loss, gradient = jax.tree.map(lambda leaf: leaf / weight, (losses.cross_entropy, gradient))
        size = batch["tokens"].size
        counts = {name: total / size for name, total in losses.counts.items()}
        if losses.divergence is not None:
            counts["divergence"] = losses.divergence / weight
        norm = global_norm(self.declared, gradient)
        if training.clip_norm is not None:
            factor = jnp.minimum(1.0, training.clip_norm / jnp.maximum(norm, 1e-12))
            gradient = jax.tree.map(lambda leaf: leaf * factor, gradient)
        rate = self.learning_rate(state.step)
        updates, optimizer = self.optimizer.update(gradient, state.optimizer, state.weights)
        weights = training.optimizer.apply(
            self.declared, self.resolved, state.weights, updates, rate
        )
        sound = jnp.isfinite(loss) & jnp.isfinite(norm) & (state.step == step)
        updated = State(weights, optimizer, state.step + 1)
        kept = jax.tree.map(lambda new, old: jnp.where(sound, new, old), updated, state)
        return kept, Metrics(loss, norm, rate, counts)


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
