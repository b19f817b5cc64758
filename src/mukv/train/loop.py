"""The training loop: steps, logging, validation, checkpoints, stop signals.

Batches are a pure function of the step, so a resumed run gives the same bits. SIGTERM and SIGINT
save a checkpoint and stop. A number that is not finite stops the run and names the step, the layer
and the last good checkpoint. The loop receives parts of a run's configuration, not the whole.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from mukv.core.device import peak_flops
from mukv.core.errors import Failed
from mukv.data.batches import Batch, Prefetch
from mukv.data.feed import Source
from mukv.model.counting import flops_per_token
from mukv.show.progress import Bar
from mukv.storage.checkpoint import Checkpoints
from mukv.train.metrics import Trackers, read_metrics
from mukv.train.state import Metrics, State
from mukv.train.step import Trainer
from mukv.train.stopping import StopSignal
from mukv.train.validation import validated

PROFILED_STEPS = range(10, 16)


@dataclass(frozen=True)
class Outcome:
    """Result of a run.

    step: updates done
    loss: training loss of one batch in nats per token, before the update `loss_step`
    validation_loss: nats per token after `validation_step` updates; None without validation
    wait_fraction: fraction of the time in which steps waited for data
    finished: false if a signal stopped the run
    """

    state: State
    step: int
    loss: float
    validation_loss: float | None
    validation_bits_per_byte: float | None
    tokens_per_second: float
    wait_fraction: float
    finished: bool
    loss_step: int | None = None
    validation_step: int | None = None

    def require_finished(self, folder: Path) -> None:
        """Raise Failed if a signal stopped the run."""
        if not self.finished:
            raise Failed(
                f"{folder}: stopped at step {self.step}; the same command goes on from there"
            )


AGREE_EVERY = 8
"""Steps between two collectives in which the processes agree whether to stop. Each waits for the
devices, which costs a few milliseconds."""


@dataclass
class Clock:
    """Measures speed from the end of the first step (which compiles), without pauses."""

    tokens_per_step: int
    began: float | None = None
    steps: int = 0
    paused: float = 0.0

    def tick(self) -> None:
        if self.began is None:
            self.began = time.monotonic()
        else:
            self.steps += 1

    @contextmanager
    def pause(self) -> Iterator[None]:
        start = time.monotonic()
        yield
        self.paused += time.monotonic() - start

    @property
    def seconds(self) -> float:
        return 0.0 if self.began is None else time.monotonic() - self.began - self.paused

    @property
    def tokens_per_second(self) -> float:
        return self.tokens_per_step * self.steps / self.seconds if self.steps else 0.0


@dataclass
class Loop:
    """One run of one trainer in one folder.

    batches, validation: sources of training and validation batches of each stage of training
    token_bytes: UTF-8 bytes of each id, int [vocab]
    """

    trainer: Trainer
    batches: Sequence[Source]
    validation: Sequence[Source]
    token_bytes: np.ndarray
    checkpoints: Checkpoints
    folder: Path
    title: str = "training"
    begin: Callable[[], State] | None = None
    """Function that makes the state before the first step; None lets the trainer draw it."""
    last: dict[str, float] = field(default_factory=dict)
    """Latest value of each metric."""
    seen: dict[str, int] = field(default_factory=dict)
    """Step of each latest value."""

    def run(self) -> Outcome:
        """Train from the latest checkpoint, or from the beginning, to the last step."""
        training, trainer = self.trainer.training, self.trainer
        start = self.checkpoints.latest() or 0
        state = self.restore()
        clock = Clock(training.batch * training.length)
        peak = peak_flops(trainer.mesh.size)
        adapters = trainer.declared if trainer.adapter is not None else None
        flops = [flops_per_token(trainer.model, size, adapters) for _, size in training.sizes]
        step, finished = start, True
        stable = training.schedule.stable_until(training.steps)
        self.last, self.seen = known_so_far(self.folder / "metrics.jsonl", start)
        with ExitStack() as stack:
            stack.enter_context(jax.set_mesh(trainer.mesh))
            stop = stack.enter_context(StopSignal())
            silent = jax.process_index() > 0
            trackers = Trackers(self.folder, training.trackers, start, silent)
            stack.callback(trackers.close)
            bar = stack.enter_context(Bar(self.title, training.steps, start, silent))
            if start >= training.steps:
                bar.say(
                    f"all {start} steps are already done; metrics are those of the finished run"
                )
            prefetch = Prefetch(self.batch_at, range(start, training.steps))
            stack.enter_context(prefetch)
            for step, batch in enumerate(prefetch, start=start + 1):
                state, metrics = trainer.step(state, step - 1, trainer.put(batch))
                if training.profile:
                    _profile(step - start, training.steps - start, self.folder)
                clock.tick()
                ends = step == training.steps
                logs = ends or step % training.log_every == 0 or step == start + 1
                asks = logs or jax.process_count() == 1 or step % AGREE_EVERY == 0
                leaves = asks and stop.agreed()
                logs = logs or leaves
                evaluates = ends or due(step, training.evaluate_every)
                saves = ends or leaves or due(step, training.checkpoint_every) or step == stable
                if logs or evaluates or saves:
                    self.require_sound(state, step, metrics)
                if logs:
                    rate = clock.tokens_per_second
                    numbers = {
                        "loss": float(metrics.loss),
                        "gradient_norm": float(metrics.gradient_norm),
                        "learning_rate": float(metrics.learning_rate),
                        **{name: float(n) for name, n in metrics.counts.items()},
                        "tokens": step * clock.tokens_per_step,
                        "tokens_per_second": rate,
                        "mfu": rate * flops[training.stage_at(step - 1)] / peak,
                        "wait_fraction": prefetch.wait_seconds / max(clock.seconds, 1e-9),
                    }
                    self.note(step, numbers)
                    trackers.log(step, numbers)
                if evaluates:
                    with clock.pause():
                        validation = self.evaluate(state, step)
                    self.note(step, validation)
                    trackers.log(step, validation)
                if logs or evaluates:
                    bar.show(step, shown(step, self.last, self.seen))
                if saves:
                    with clock.pause():
                        score = self.last.get("validation_loss") if evaluates else None
                        self.checkpoints.save(step, state, score)
                if leaves:
                    finished = ends
                    bar.say(f"{stop.name or 'another process'}: saved step {step}, leaving")
                    break
            self.checkpoints.wait()
        return Outcome(
            state=state,
            step=step,
            loss=self.last.get("loss", float("nan")),
            loss_step=self.seen.get("loss"),
            validation_step=self.seen.get("validation_loss"),
            validation_loss=self.last.get("validation_loss"),
            validation_bits_per_byte=self.last.get("validation_bits_per_byte"),
            tokens_per_second=self.last.get("tokens_per_second", 0.0),
            wait_fraction=self.last.get("wait_fraction", 0.0),
            finished=finished,
        )

    def note(self, step: int, numbers: Mapping[str, float]) -> None:
        """Record the latest values and their step."""
        self.last |= numbers
        self.seen |= dict.fromkeys(numbers, step)

    def restore(self) -> State:
        """Return the latest checkpoint on this mesh, or a new state."""
        if self.checkpoints.latest() is None:
            return (self.begin or self.trainer.initial_state)()
        return self.checkpoints.restore(None, self.trainer.abstract_state())

    def require_sound(self, state: State, step: int, metrics: Metrics) -> None:
        """Raise Failed if a loss or gradient was not finite, after which the state no longer
        changes."""
        sound = int(state.step)
        if sound == step:
            return
        batch = self.batch_at(sound)
        culprit = self.trainer.blame(state, self.trainer.put(batch))
        self.checkpoints.wait()
        # A checkpoint of step `sound` has the weights of the failed step.
        good = [str(saved) for saved in self.checkpoints.steps() if saved < sound]
        saved = f"the last good checkpoint is {good[-1]}" if good else "there is no good checkpoint"
        raise Failed(
            f"step {sound + 1}: not a finite number in {culprit}; {saved} in {self.folder}"
        )

    def batch_at(self, step: int) -> Batch:
        """Return this process's rows of a training batch."""
        source = self.batches[self.trainer.training.stage_at(step)]
        return source.at(step, **self.trainer.share)

    def evaluate(self, state: State, step: int) -> dict[str, float]:
        """Compute the loss on the validation windows: nats per token and bits per byte. Of a
        mixture, that of each part, and their mean with its weights.

        step: updates done. Windows have the length of the last one's stage
        """
        training = self.trainer.training
        source = self.validation[training.stage_at(step - 1)]

        def summed(sources: Sequence[Source], limit: int | None) -> np.ndarray:
            (only,) = sources
            return self.summed(state, only, limit)

        found = validated([source], training.validation_batches, summed)
        return {name: float(value) for name, value in found.items()}

    def summed(self, state: State, source: Source, limit: int | None) -> np.ndarray:
        """Sum nats, tokens and bytes over at most `limit` validation batches [3]."""
        total = np.zeros(3)
        table = jnp.asarray(self.token_bytes, jnp.int32)
        for batch in source.once(limit, **self.trainer.share):
            sums = self.trainer.validate(state.weights, self.trainer.put(batch), table)
            total += np.asarray([float(number) for number in sums])
        return total


def known_so_far(path: Path, step: int) -> tuple[dict[str, float], dict[str, int]]:
    """Read the latest logged value of each metric up to a step, and the step of each."""
    known: dict[str, float] = {}
    seen: dict[str, int] = {}
    for record in read_metrics(path):
        at = int(record.pop("step"))
        if at <= step:
            known |= record
            seen |= dict.fromkeys(record, at)
    return known, seen


def due(step: int, every: int | None) -> bool:
    """Return whether something that happens every `every` steps happens at this one."""
    return every is not None and step % every == 0


def shown(step: int, last: Mapping[str, float], seen: Mapping[str, int]) -> dict[str, str]:
    """Format the numbers of the progress line. A number from an earlier step is shown with the
    number of that step.
    """
    text = {"training loss": f"{last['loss']:.3f}"}
    if "validation_bits_per_byte" in last:
        at = seen["validation_bits_per_byte"]
        stale = "" if at == step else f" (step {at})"
        text["validation bits/byte"] = f"{last['validation_bits_per_byte']:.3f}{stale}"
    if last["tokens_per_second"]:  # known from the second step, as the first one compiles
        text["tokens/s"] = f"{last['tokens_per_second']:,.0f}"
    if last["mfu"] and math.isfinite(last["mfu"]):
        text["mfu"] = f"{last['mfu']:.0%}"
    return text


def _profile(done: int, steps: int, folder: Path) -> None:
    """Trace a few steps, compiled and warm, for the profilers of TensorBoard and Perfetto."""
    if done == PROFILED_STEPS.start < steps:
        jax.profiler.start_trace(str(folder / "profile"))
    if PROFILED_STEPS.start < done == min(PROFILED_STEPS.stop, steps):
        jax.profiler.stop_trace()
