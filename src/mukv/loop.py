"""The training loop: steps until the end, and everything that must happen on the way.

Batches are a pure function of the step, so a run continues from its last checkpoint to the same
bits. SIGTERM and SIGINT save and leave. A number that is not finite stops the run with the step,
the layer and the last good checkpoint named. Knows no root configuration, only the parts.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from mukv.checkpoint import Checkpoints
from mukv.core.device import peak_flops
from mukv.core.errors import Failed
from mukv.data.batches import Prefetch
from mukv.data.feed import Source
from mukv.metrics import Trackers, read_metrics
from mukv.model.counting import flops_per_token
from mukv.progress import Bar
from mukv.train import Metrics, State, Trainer

PROFILED_STEPS = range(10, 16)


@dataclass(frozen=True)
class Outcome:
    """How a run ended. step: updates done. loss: nats per token at the last logged step.
    wait_fraction: share of the time that steps waited for data.
    """

    state: State
    step: int
    loss: float
    validation_loss: float | None
    validation_bits_per_byte: float | None
    tokens_per_second: float
    wait_fraction: float
    finished: bool

    def require_finished(self, folder: Path) -> None:
        """For what is done with the whole run. Raises Failed where a signal stopped it."""
        if not self.finished:
            raise Failed(
                f"{folder}: stopped at step {self.step}; the same command goes on from there"
            )


@dataclass
class Clock:
    """Speed since the first step, which compiles and does not count; pauses left out."""

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


class StopSignal:
    """SIGTERM or SIGINT asks the loop to save and leave; a second one leaves at once."""

    def __init__(self) -> None:
        self.name: str | None = None
        self.before: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        for number in (signal.SIGTERM, signal.SIGINT):
            self.before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        self.name = signal.Signals(number).name
        signal.signal(number, self.before[number])

    def agreed(self) -> bool:
        """Whether any process was asked; all processes must ask this together."""
        mine = np.asarray(self.name is not None)
        if jax.process_count() == 1:
            return bool(mine)
        return bool(np.any(multihost_utils.process_allgather(mine)))


@dataclass
class Loop:
    """One run of one trainer in one folder."""

    trainer: Trainer
    batches: Source
    validation: Source
    token_bytes: np.ndarray
    checkpoints: Checkpoints
    folder: Path
    title: str = "training"
    begin: Callable[[], State] | None = None
    """The state before the first step; drawn by the trainer if None."""
    last: dict[str, float] = field(default_factory=dict)

    def run(self) -> Outcome:
        """Train from the latest checkpoint, or from the beginning, to the last step."""
        training, trainer = self.trainer.training, self.trainer
        start = self.checkpoints.latest() or 0
        state = self.restore()
        clock = Clock(training.batch * training.length)
        peak = peak_flops(trainer.mesh.size)
        flops = flops_per_token(trainer.model, training.length)
        step, finished = start, True
        stable = training.schedule.stable_until(training.steps)
        self.last = known_so_far(self.folder / "metrics.jsonl", start)
        with ExitStack() as stack:
            stack.enter_context(jax.set_mesh(trainer.mesh))
            stop = stack.enter_context(StopSignal())
            silent = jax.process_index() > 0
            trackers = Trackers(self.folder, training.trackers, start, silent)
            stack.callback(trackers.close)
            bar = stack.enter_context(Bar(self.title, training.steps, start, silent))
            if start >= training.steps:
                bar.say(f"all {start} steps were done before: figures are those of then")
            prefetch = Prefetch(
                lambda step: self.batches.at(step, **trainer.share), range(start, training.steps)
            )
            stack.enter_context(prefetch)
            for step, batch in enumerate(prefetch, start=start + 1):
                state, metrics = trainer.step(state, step - 1, trainer.put(batch))
                if training.profile:
                    _profile(step - start, training.steps - start, self.folder)
                clock.tick()
                ends = step == training.steps
                logs = ends or step % training.log_every == 0 or step == start + 1
                # Asking the other processes costs a collective: only now and then.
                leaves = (logs or jax.process_count() == 1) and stop.agreed()
                evaluates = ends or _due(step, training.evaluate_every)
                saves = ends or leaves or _due(step, training.checkpoint_every) or step == stable
                if logs or evaluates or saves:
                    self.require_sound(state, step, metrics)
                if logs:
                    rate = clock.tokens_per_second
                    numbers = {
                        "loss": float(metrics.loss),
                        "gradient_norm": float(metrics.gradient_norm),
                        "learning_rate": float(metrics.learning_rate),
                        **{f"{name}_per_token": float(n) for name, n in metrics.counts.items()},
                        "tokens": step * clock.tokens_per_step,
                        "tokens_per_second": rate,
                        "mfu": rate * flops / peak,
                        "wait_fraction": prefetch.wait_seconds / max(clock.seconds, 1e-9),
                    }
                    self.last |= numbers
                    trackers.log(step, numbers)
                    bar.show(step, _shown(self.last))
                if evaluates:
                    with clock.pause():
                        validation = self.evaluate(state)
                    self.last |= validation
                    trackers.log(step, validation)
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
            validation_loss=self.last.get("validation_loss"),
            validation_bits_per_byte=self.last.get("validation_bits_per_byte"),
            tokens_per_second=self.last.get("tokens_per_second", 0.0),
            wait_fraction=self.last.get("wait_fraction", 0.0),
            finished=finished,
        )

    def restore(self) -> State:
        """The latest checkpoint on this mesh, or a new state."""
        if self.checkpoints.latest() is None:
            return (self.begin or self.trainer.initial_state)()
        return self.checkpoints.restore(None, self.trainer.abstract_state())

    def require_sound(self, state: State, step: int, metrics: Metrics) -> None:
        """Raise Failed where a loss or gradient was not finite; the state stopped there."""
        sound = int(state.step)
        if sound == step:
            return
        batch = self.batches.at(sound, **self.trainer.share)
        culprit = self.trainer.blame(state, self.trainer.put(batch))
        self.checkpoints.wait()
        # One of this very step would fail again: it holds the weights that failed.
        good = [str(saved) for saved in self.checkpoints.steps() if saved < sound]
        saved = f"the last good checkpoint is {good[-1]}" if good else "there is no good checkpoint"
        raise Failed(
            f"step {sound + 1}: not a finite number in {culprit}; {saved} in {self.folder}"
        )

    def evaluate(self, state: State) -> dict[str, float]:
        """Loss on the validation windows: nats per token and bits per byte."""
        training = self.trainer.training
        windows: Iterable[Any] = self.validation.once(
            training.validation_batches, **self.trainer.share
        )
        total = np.zeros(3)
        table = jnp.asarray(self.token_bytes, jnp.int32)
        for batch in windows:
            sums = self.trainer.validate(state.weights, self.trainer.put(batch), table)
            total += np.asarray([float(number) for number in sums])
        return validation_metrics(*total)


def known_so_far(path: Path, step: int) -> dict[str, float]:
    """The latest value of each number that was logged up to a step."""
    known: dict[str, float] = {}
    for record in read_metrics(path):
        if record["step"] <= step:
            known |= record
    known.pop("step", None)
    return known


def validation_metrics(nats: float, tokens: float, read: float) -> dict[str, float]:
    """From summed loss, number of tokens and of bytes."""
    return {
        "validation_loss": nats / max(tokens, 1),
        "validation_bits_per_byte": nats / math.log(2) / max(read, 1),
    }


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


def _shown(last: Mapping[str, float]) -> dict[str, str]:
    shown = {"loss": f"{last['loss']:.3f}", "tok/s": f"{last['tokens_per_second']:,.0f}"}
    if math.isfinite(last["mfu"]):
        shown["mfu"] = f"{last['mfu']:.0%}"
    if "validation_bits_per_byte" in last:
        shown["bits/byte"] = f"{last['validation_bits_per_byte']:.3f}"
    return shown


def _profile(done: int, steps: int, folder: Path) -> None:
    """Trace a few steps, once compiled and warm, for TensorBoard's or Perfetto's profiler."""
    if done == PROFILED_STEPS.start < steps:
        jax.profiler.start_trace(str(folder / "profile"))
    if PROFILED_STEPS.start < done == min(PROFILED_STEPS.stop, steps):
        jax.profiler.stop_trace()
