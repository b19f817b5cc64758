"""Test a model with prompts: compute the fraction of right answers, and the nearness of all.

An answer is right if it contains the expected number or word, as in RULER (Hsieh et al. 2024). The
cache policy first chooses before the question is read, as in kvpress' leaderboard, or after it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from mukv.bench.asking import Asker
from mukv.bench.examine import DEPTHS, Examination, ExamineSettings
from mukv.bench.grading import closeness, names, shares
from mukv.cache import FULL
from mukv.core.compute import settled
from mukv.core.statistics import wilson
from mukv.model.counting import cache_bytes
from mukv.runs.loaded import Model
from mukv.tasks.prompts import Prompt, PromptForm
from mukv.tasks.solvers.prompts import SOLVERS_IN_WORDS


def asker_of(model: Model, form: PromptForm, settings: ExamineSettings) -> Asker:
    """Return the `Asker` of a model for the form and the number of shots of the settings."""
    indices = np.arange(settings.shots)
    shots = (
        form.batch(form.task.smallest, settings.seed, "train", indices) if settings.shots else []
    )
    return Asker(model, None if settings.form is None else settings.form == "chat", shots)


def examine_prompts(
    asker: Asker,
    name: str,
    form: PromptForm,
    length: int,
    settings: ExamineSettings,
    tick: Callable[[int], None] = lambda done: None,
) -> Examination:
    """Test a model with prompts of one task at one length. Raises BadInput for a length that is too
    short.

    tick: called with the number of samples that are answered
    """
    prompts = asker.fitting(form, length, settings.seed, np.arange(settings.samples))
    # With the full cache the order makes no difference, and reading in one pass is faster.
    aware = settings.aware or settings.policy == FULL
    texts, taken = asker.answers(prompts, settings.policy, aware, tick)
    wanted = [(row, answer) for row, prompt in enumerate(prompts) for answer in prompt.answers]
    right = np.array([names(texts[row], answer) for row, answer in wanted])
    near = np.array([closeness(texts[row], answer) for row, answer in wanted])
    depth = np.array([prompts[row].depth for row, _ in wanted])
    model = asker.model
    if settings.policy == FULL:
        compute = settled(model.run.train.compute)
        taken = cache_bytes(model.network, 1, length, 0, compute.type)
    row = {
        "task": name,
        "length": length,
        "form": asker.form,
        "aware": settings.aware,
        "facts": form.task.facts,
        "exact_match": float(right.mean()),
        "interval": wilson(int(right.sum()), len(right)),
        "partial": float(near.mean()),
        "partial_chance": unrelated(prompts),
        "chance": form.chance,
        "oracle": float(np.mean([solved(form, prompt) for prompt in prompts])),
        "cache_bytes_per_token": taken / length,
        "samples": len(prompts),
        "answers": len(right),
        "by_depth": shares(right, depth, DEPTHS),
    }
    every = [
        {
            "length": length,
            "sample": at,
            "prompt": asker.whole(prompt),
            "expected": list(prompt.answers),
            "answer": text,
            "right": [names(text, answer) for answer in prompt.answers],
            "partial": [round(closeness(text, answer), 4) for answer in prompt.answers],
            "depth": round(prompt.depth, 4),
        }
        for at, (prompt, text) in enumerate(zip(prompts, texts, strict=True))
    ]
    return Examination(row, every)


def unrelated(prompts: Sequence[Prompt]) -> float | None:
    """Return the mean nearness of the right answers of other samples, as a baseline; None for a
    single sample."""
    if len(prompts) < 2:
        return None
    others = [*prompts[1:], prompts[0]]
    near = [
        closeness(", ".join(other.answers), answer)
        for prompt, other in zip(prompts, others, strict=True)
        for answer in prompt.answers
    ]
    return float(np.mean(near))


def solved(form: PromptForm, prompt: Prompt) -> bool:
    """Whether the independent solver finds the answers in the message."""
    found = SOLVERS_IN_WORDS[form.task.kind](prompt.message)
    return sorted(found) == sorted(prompt.answers)


def shown(prompt: str, answers: Sequence[str], ends: int = 400) -> str:
    """Return a text with both ends of a prompt, of at most `ends` characters each, and the right
    answers."""
    if len(prompt) > 2 * ends:
        left = len(prompt) - 2 * ends
        prompt = f"{prompt[:ends]}\n[... {left:,} characters ...]\n{prompt[-ends:]}"
    return f"{prompt}\n[expected: {', '.join(answers)}]"
