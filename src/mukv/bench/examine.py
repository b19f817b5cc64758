"""Test one model on one task at one length: count correct answers and the bytes of the cache.

A model that was trained on the task receives the samples as ids, any other model as text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

import numpy as np

from mukv.bench.asking import Form
from mukv.bench.grading import closeness, shares
from mukv.bench.oracle import solved
from mukv.bench.scoring import AnswerScores, score
from mukv.bench.text import TextForm
from mukv.cache import FULL, Policy
from mukv.core.compute import settled
from mukv.core.errors import BadInput, unknown_name
from mukv.core.statistics import wilson
from mukv.model.counting import cache_bytes
from mukv.runs.loaded import Model
from mukv.tasks import AnyTask, Samples
from mukv.tasks.prompts import NOISE, WORDINGS

DEPTHS = [0.0, 0.25, 0.5, 0.75]
CHECKED = 50
"""Number of samples that the independent solver answers as well."""


@dataclass(frozen=True)
class ExamineSettings:
    """Settings of the test of a model.

    samples: number of samples per task and length
    free: number of samples whose last answer is also decoded, without the right answer's tokens as
        input
    shots: number of solved samples before each text
    policy: cache policy of decoding
    form: form in which a model is asked that was not trained on a task; None for prompts if the
        task has them, in the model's chat template if it has one
    haystack: sentences between the items of prompts
    aware: whether the policy first chooses after the question of a prompt was read
    """

    samples: int = 200
    seed: int = 0
    free: int = 16
    shots: int = 0
    policy: Policy = FULL
    form: Form | None = None
    haystack: tuple[str, ...] = NOISE
    aware: bool = False

    def __post_init__(self) -> None:
        if self.form is not None and self.form not in get_args(Form):
            raise unknown_name("--form", self.form, get_args(Form))
        for name, low in (("samples", 1), ("free", 0), ("shots", 0)):
            if getattr(self, name) < low:
                raise BadInput(f"--{name}", getattr(self, name), f"at least {low}")
        if self.policy != FULL and not self.free:
            raise BadInput("--free", 0, "at least 1: a cache policy changes only what is decoded")


@dataclass(frozen=True)
class Examination:
    """Result of a test.

    row: row of the table
    answers: every answer of every sample
    decoded: answers that were decoded from a text of the task, with this text
    """

    row: dict[str, Any]
    answers: list[dict[str, Any]]
    decoded: list[dict[str, Any]] = field(default_factory=list)


def check(model: Model, task: AnyTask, length: int) -> None:
    """Raise BadInput if a model can't be tested at this length."""
    context = model.network.context
    if context is not None and length > context:
        raise BadInput("--lengths", length, f"at most the model's context ({context})")
    if own(model, task):
        task.check_length(length)


def own(model: Model, task: AnyTask) -> bool:
    """Whether the model was trained on ids of this task's vocabulary."""
    trained = model.run.data.task
    return trained is not None and trained.vocabulary.spelling == task.vocabulary.spelling


def in_words(model: Model, task: AnyTask, settings: ExamineSettings) -> bool:
    """Whether a model is asked with prompts."""
    if own(model, task) or settings.form == "text":
        return False
    return settings.form is not None or task.kind in WORDINGS


def examine(
    model: Model,
    name: str,
    task: AnyTask,
    length: int,
    settings: ExamineSettings,
    split: Any = "test",
) -> Examination:
    """Test a model. Raises BadInput if it can't be tested at this length."""
    check(model, task, length)
    indices = np.arange(settings.samples)
    if own(model, task):
        samples = task.batch(length, settings.seed, split, indices)
        known = samples
    else:
        form = TextForm(task, model.tokenizer, settings.shots)
        samples = form.batch(length, settings.seed, indices)
        known = task.batch(max(task.smallest, 64), settings.seed, split, indices)
    scores = score(model.network, model.scaled, samples, model.run.train.compute)
    checked = solved(task, Samples(*(part[:CHECKED] for part in known)))
    compute = settled(model.run.train.compute)
    right = scores.right[scores.present]
    taken = cache_bytes(model.network, 1, length, 0, compute.type)
    answers = _answers(model, samples, scores, length)
    free, graded, made = None, right, []
    near = [each["partial"] for each in answers]
    if settings.free:
        made, allocated = decoded(model, samples, settings, length)
        free = np.array([each["right"] for each in made])
        if settings.policy != FULL:
            # A policy has an effect only with a cache: count answers as they were decoded.
            graded, taken = free, allocated
            near = [each["partial"] for each in made]
    row = {
        "task": name,
        "length": length,
        "form": "ids" if own(model, task) else "text",
        "facts": task.facts,
        "exact_match": float(graded.mean()),
        "interval": wilson(int(graded.sum()), len(graded)),
        "partial": float(np.mean(near)),
        "teacher_forced": float(right.mean()),
        "free_running": None if free is None else float(free.mean()),
        "token_accuracy": float(scores.tokens[scores.present].mean()),
        "bits": float(scores.bits[scores.present].mean()),
        "calibration_error": scores.calibration_error,
        "chance": task.chance(known),
        "oracle": float(checked.mean()),
        "cache_bytes_per_token": taken / length,
        "samples": settings.samples,
        "answers": len(graded),
        "by_distance": shares(right, samples.distance[scores.present], distances(length)),
        "by_depth": shares(right, samples.depth[scores.present], DEPTHS),
    }
    return Examination(row, answers, made)


def distances(length: int) -> list[float]:
    """Return the edges of distance buckets (tokens): powers of four."""
    edges = [0.0]
    while 4 ** len(edges) < length:
        edges.append(4.0 ** len(edges))
    return edges


def decoded(
    model: Model, samples: Samples, settings: ExamineSettings, length: int
) -> tuple[list[dict[str, Any]], float]:
    """Decode the last answer of the first `free` samples greedily.

    Returns an entry for each, with the text before the answer, and the bytes of the allocated cache
    per row.
    """
    rows = np.arange(min(settings.free, len(samples.tokens)))
    # Answers are in the order of the text; absent ones may be anywhere among them.
    last = np.argmax(np.where(samples.present, samples.start, -1), axis=1)[rows]
    start, stop = samples.start[rows, last], samples.stop[rows, last]
    prompts = [samples.tokens[row, :end].tolist() for row, end in zip(rows, start, strict=True)]
    longest = int((stop - start).max())
    made = model.generate_ids(prompts, longest, policy=settings.policy)
    entries = []
    for row, prompt in zip(rows, prompts, strict=True):
        wanted = samples.tokens[row, start[row] : stop[row]].tolist()
        given = made.tokens[row][: len(wanted)]
        entries.append(
            {
                "length": length,
                "sample": int(row),
                "prompt": model.tokenizer.decode_further(prompt),
                **_texts(model, wanted, given),
                "right": given == wanted,
            }
        )
    return entries, made.cache_bytes / len(rows)


def _texts(model: Model, wanted: Sequence[int], given: Sequence[int]) -> dict[str, Any]:
    """Return the expected and the given answer as texts, and the nearness of the given answer."""
    expected, answer = (model.tokenizer.decode_further(ids) for ids in (wanted, given))
    near = 1.0 if given == wanted else round(closeness(answer, expected), 4)
    return {"expected": expected, "answer": answer, "partial": near}


def _answers(
    model: Model, samples: Samples, scores: AnswerScores, length: int
) -> list[dict[str, Any]]:
    """Return one entry per answer."""
    entries = []
    for row, number in zip(*np.nonzero(scores.present), strict=True):
        cut = slice(samples.start[row, number], samples.stop[row, number])
        wanted, given = (tokens[row, cut].tolist() for tokens in (samples.tokens, scores.likeliest))
        entries.append(
            {
                "length": length,
                "sample": int(row),
                "answer_number": int(number),
                **_texts(model, wanted, given),
                "right": bool(scores.right[row, number]),
                "tokens_right": float(scores.tokens[row, number]),
                "bits": round(float(scores.bits[row, number]), 4),
                "distance": int(samples.distance[row, number]),
                "depth": round(float(samples.depth[row, number]), 4),
            }
        )
    return entries
