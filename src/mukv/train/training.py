"""The training plan: the section `train` of a configuration."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from mukv.cache import Policy
from mukv.core.compute import Compute
from mukv.core.counts import INT32, require_counts
from mukv.core.errors import BadInput
from mukv.model.through import Through
from mukv.scaling.budget import AnyBudget
from mukv.scaling.optimizers import AdamW, AnyOptimizer
from mukv.scaling.schedules import AnySchedule, Cosine
from mukv.train.adapters import AnyAdapter
from mukv.train.distillation import Distillation


@dataclass(frozen=True)
class LengthStage:
    """A part of training with longer rows, and as many fewer rows per step.

    begin: number of updates done before the stage
    length: tokens per row, a multiple of `train.length`
    """

    begin: int
    length: int

    def __post_init__(self) -> None:
        require_counts(self, "begin", "length")


@dataclass(frozen=True)
class Training:
    """How a model is trained.

    start: initial weights: a run directory or a Hugging Face folder; None draws them
    adapter: low-rank adapters of the weights of `start`, or the gates of learned eviction; if
        given, only these are trained; None trains all weights
    teacher: a model with the same vocabulary whose predictions are learnt: a run directory, a
        Hugging Face folder, a GGUF file or a hub id; None to learn from the text alone
    distillation: how the teacher counts beside the text
    policy: a cache policy that drops entries while rows are read, such as snapkv:0.25, so that the
        model learns to do without them; its choices get no gradient; None to keep all entries
    policy_tail: tokens between two choices of the policy, as in the tail of a cache in decoding
    steps: number of updates
    seed: 32-bit seed of the initial weights and the order of the data
    batch: rows per step over all devices
    length: tokens per row
    stages: later parts of training with longer rows and as many tokens per step: `batch` is divided
        by the factor by which rows are longer
    learning_rate: peak learning rate
    schedule: how the learning rate changes over the steps
    optimizer: rule by which gradients change the weights
    budget: batch and tokens that the hyperparameters were tuned for; None means those of this run
    clip_norm: largest norm of the whole gradient; None means no limit
    accumulate: pieces into which a batch is divided to save device memory; their gradients are
        summed
    compute: settings of the forward pass, such as dtypes
    log_every: steps between two records of metrics
    evaluate_every: steps between two validations; None means only at the end
    validation_batches: maximum number of validation batches; None means all
    checkpoint_every: steps between two checkpoints; None means only at the end
    keep_last: number of newest checkpoints that are kept
    keep_best: number of checkpoints with the lowest validation loss that are kept as well
    profile: whether steps 10 to 15 are profiled
    trackers: destinations of metrics besides metrics.jsonl: tensorboard, wandb, or the dotted path
        of a class
    """

    start: str | None = None
    adapter: AnyAdapter | None = None
    teacher: str | None = None
    distillation: Distillation = field(default_factory=Distillation)
    policy: str | None = None
    policy_tail: int = 64
    steps: int = 100
    seed: int = 0
    batch: int = 8
    length: int = 256
    stages: tuple[LengthStage, ...] = ()
    learning_rate: float = 3e-3
    schedule: AnySchedule = field(default_factory=Cosine)
    optimizer: AnyOptimizer = field(default_factory=AdamW)
    budget: AnyBudget | None = None
    clip_norm: float | None = 1.0
    accumulate: int = 1
    compute: Compute = field(default_factory=Compute)
    log_every: int = 10
    evaluate_every: int | None = 100
    validation_batches: int | None = 16
    checkpoint_every: int | None = None
    keep_last: int = 2
    keep_best: int = 1
    profile: bool = False
    trackers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        require_counts(self, "steps", "batch", "length", "accumulate", "log_every", "keep_last")
        require_counts(self, "evaluate_every", "checkpoint_every", "validation_batches")
        if not 0 <= self.keep_best <= INT32:
            raise BadInput("keep_best", self.keep_best, f"0 to {INT32:,}")
        for name in ("start", "teacher"):
            if "\0" in (getattr(self, name) or ""):
                raise BadInput(name, getattr(self, name), "a path, which has no NUL character")
        if not 0 <= self.seed < 1 << 32:
            raise BadInput("seed", self.seed, "0 to 4294967295 (32 bits)")
        if self.learning_rate <= 0:
            raise BadInput("learning_rate", self.learning_rate, "greater than 0")
        if self.clip_norm is not None and self.clip_norm <= 0:
            raise BadInput("clip_norm", self.clip_norm, "greater than 0, or null")
        if self.batch % self.accumulate:
            raise BadInput("accumulate", self.accumulate, f"must divide batch ({self.batch})")
        require_counts(self, "policy_tail")
        self._check_stages()
        _ = self.effective, self.through

    def _check_stages(self) -> None:
        before = LengthStage(1, self.length)
        for number, stage in enumerate(self.stages):
            where = f"stages.{number}"
            if number and stage.begin <= before.begin:
                raise BadInput(f"{where}.begin", stage.begin, f"more than {before.begin}")
            if stage.length % before.length or stage.length == before.length:
                allowed = f"a multiple of the length before it ({before.length}), and longer"
                raise BadInput(f"{where}.length", stage.length, allowed)
            factor = stage.length // self.length
            if self.batch % (factor * self.accumulate):
                by = f"{factor} times as long as train.length ({self.length})"
                rows = f"batch / accumulate ({self.batch // self.accumulate})"
                allowed = f"{by}, which must divide {rows}"
                raise BadInput(f"{where}.length", stage.length, allowed)
            before = stage

    @property
    def through(self) -> Through | None:
        """The policy that is in place while rows are read."""
        if self.policy is None:
            return None
        return Through(Policy.parse(self.policy), self.policy_tail)

    def stage_at(self, step: int) -> int:
        """Return the number of the stage in which update number `step` (from 0) is: 0 before the
        first of `stages`."""
        return sum(stage.begin <= step for stage in self.stages)

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """Rows per step and tokens per row of each stage; first those before the first of
        `stages`."""
        lengths = (self.length, *(stage.length for stage in self.stages))
        return tuple((self.batch * self.length // length, length) for length in lengths)

    @property
    def effective(self) -> Training:
        """The plan with the hyperparameters that `budget` gives for this batch and number of
        tokens.
        """
        if self.budget is None:
            return self
        tokens = self.batch * self.length
        change = self.budget.change(tokens, tokens * self.steps)
        return replace(
            self,
            learning_rate=self.learning_rate * change.rate,
            optimizer=self.optimizer.changed(change),
            budget=None,
        )
