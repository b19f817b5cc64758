"""Test a model with prompts: the share of right answers, how near wrong ones are, and all of them.

An answer is right if it contains what was asked for, as in RULER (Hsieh et al. 2024). The cache
policy chooses after the whole prompt, its question included.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

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
    """Return the model with solved samples of the task before each prompt."""
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
    """Ask a model. Raises BadInput for a length that is too short.

    tick: called with the number of samples that are answered
    """
    prompts = asker.fitting(form, length, settings.seed, np.arange(settings.samples))
    texts, taken = asker.answers(prompts, settings.policy, tick)
    wanted = [(row, answer) for row, prompt in enumerate(prompts) for answer in prompt.answers]
    right = np.array([names(texts[row], answer) for row, answer in wanted])
    near = np.array([closeness(texts[row], answer) for row, answer in wanted])
    depth = np.array([prompts[row].depth for row, _ in wanted])
    model = asker.model
    if settings.policy == FULL:
        compute = settled(model.run.train.compute, model.network.vocab_size)
        taken = cache_bytes(model.network, 1, length, 0, compute.type)
    row = {
        "task": name,
        "length": length,
        "form": asker.form,
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
    """Return the mean nearness of the right answers of other samples: what form alone scores.

    None for one sample.
    """
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
    """Whether the independent solver names the answers from the message alone."""
    found = SOLVERS_IN_WORDS[form.task.kind](prompt.message)
    return sorted(found) == sorted(prompt.answers)


def shown(entry: dict[str, Any], ends: int = 400) -> str:
    """Return a prompt and its answer as a text: both ends of the prompt, and what is expected."""
    whole = str(entry["prompt"])
    if len(whole) > 2 * ends:
        left = len(whole) - 2 * ends
        whole = f"{whole[:ends]}\n[... {left:,} characters ...]\n{whole[-ends:]}"
    return f"{whole}\n[expected: {', '.join(entry['expected'])}]"
