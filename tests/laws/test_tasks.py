"""Law 12: on every task an oracle scores 1, and a guesser and position alone score chance; splits
are disjoint; a sample is a function of its number alone."""

from __future__ import annotations

import ast
import re
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest

from mukv import tasks
from mukv.core.errors import BadInput
from mukv.tasks import SPLITS, TASKS
from mukv.tasks.draws import Draws
from mukv.tasks.feed import tokenizer
from mukv.tasks.prompts import PROMPTED, PromptForm
from mukv.tasks.solvers import SOLVERS
from mukv.tasks.solvers.prompts import SOLVERS_IN_WORDS

COUNT = 1000
EVERY = pytest.mark.parametrize("name", TASKS)
KNOBS = ("facts", "distractors", "updates", "hops", "resets", "statements", "writes", "values")
"""Fields of tasks; those that a task has are increased by one, one at a time or several."""


def samples(name, split="test", count=COUNT, extra=40):
    task = TASKS[name]
    return task, task.batch(task.smallest + extra, 3, split, np.arange(count))


def words(texts):
    return [" ".join(text.split()) for text in texts]


def within(rate, chance, count):
    """Return whether a score is within four standard errors of chance, plus a few answers."""
    return abs(rate - chance) <= 4 * (chance * (1 - chance) / count) ** 0.5 + 4 / count


@EVERY
def test_an_oracle_scores_one(name):
    task, found = samples(name)
    solve = SOLVERS[task.kind]
    for row in range(COUNT):
        text, answers = task.questions(found, row)
        assert words(solve(text)) == words(answers), text


@pytest.mark.parametrize("name", PROMPTED)
def test_an_oracle_answers_every_prompt(name):
    """The solver answers from the message alone; question and opening don't contain the answer."""
    form = PromptForm(PROMPTED[name])
    for prompt in form.batch(form.task.smallest + 25, 3, "test", np.arange(300)):
        solved = SOLVERS_IN_WORDS[form.task.kind](prompt.message)
        assert sorted(solved) == sorted(prompt.answers), prompt.message
        asked = prompt.question + prompt.opening
        assert not any(answer in asked for answer in prompt.answers)


@pytest.mark.parametrize("name", PROMPTED)
def test_a_guess_of_the_right_form_scores_chance(name):
    """The answer of another sample, which has the same form, scores chance."""
    form = PromptForm(PROMPTED[name])
    prompts = form.batch(form.task.smallest, 3, "test", np.arange(COUNT))
    pairs = zip(prompts, [*prompts[1:], prompts[0]], strict=True)
    hits = np.array([a in other.answers for prompt, other in pairs for a in prompt.answers])
    assert within(hits.mean(), form.chance, hits.size)


@EVERY
def test_a_guesser_scores_chance(name):
    task, found = samples(name)
    hits = found.right(task.guess(found, Draws.of(9, 0, np.arange(COUNT))))[found.present]
    assert within(hits.mean(), task.chance(found), hits.size)


@EVERY
def test_position_alone_scores_chance(name):
    """Answering with the commonest training token at the same place, or of the same answer number,
    scores chance."""
    task, found = samples(name)
    _, seen = samples(name, "train")
    places = [np.bincount(column, minlength=task.vocab_size) for column in seen.tokens.T]
    by_place = np.broadcast_to(np.argmax(places, axis=1), found.tokens.shape)
    hits = found.right(by_place)[found.present]
    assert hits.mean() <= task.chance(found) + 4 / np.sqrt(hits.size) * 0.5
    if task.ends:
        return
    # The baseline that also knows which answer of the row is asked for.
    predicted = found.tokens.copy()
    for number in range(found.start.shape[1]):
        width = int((found.stop - found.start)[0, number])
        for place in range(width):
            at, to = (s.start[:, number] + place for s in (seen, found))
            counts = np.bincount(seen.tokens[np.arange(COUNT), at])
            predicted[np.arange(COUNT), to] = counts.argmax()
    hits = found.right(predicted)[found.present]
    assert hits.mean() <= task.chance(found) + 2 / np.sqrt(hits.size)


@EVERY
def test_splits_can_not_meet(name):
    task = TASKS[name]
    for number, split in enumerate(SPLITS):
        for length in (task.smallest, task.smallest + 31):
            found = task.batch(length, 3, split, np.arange(50))
            for row in found.tokens:
                assert (row[0] + task.content(row).sum()) % len(SPLITS) == number
    salts = [np.bincount(samples(name, split)[1].tokens[:, 0], minlength=3) for split in SPLITS]
    # Salts are equally frequent in every split.
    assert np.min(salts) > COUNT / 3 - 4 * np.sqrt(COUNT * 2 / 9)


@EVERY
def test_a_sample_depends_on_its_number_alone(name):
    task, whole = samples(name, count=40)
    length = whole.tokens.shape[1]
    shuffled = np.random.default_rng(0).permutation(40)
    parts = [task.batch(length, 3, "test", part) for part in np.split(shuffled, 4)]
    for field in whole._fields:
        joined = np.concatenate([getattr(part, field) for part in parts])
        np.testing.assert_array_equal(joined, getattr(whole, field)[shuffled])
    assert not np.array_equal(whole.tokens, task.batch(length, 4, "test", np.arange(40)).tokens)


@EVERY
def test_the_same_puzzle_at_another_length(name):
    task = TASKS[name]
    lengths = task.smallest, task.smallest + 77
    short, long = (task.batch(length, 1, "train", np.arange(30)) for length in lengths)
    for row in range(30):
        np.testing.assert_array_equal(
            task.content(short.tokens[row]), task.content(long.tokens[row])
        )
        assert short.tokens[row, 0] == long.tokens[row, 0]
        answers = [each.tokens[row][each.graded[row]].tolist() for each in (short, long)]
        assert answers[0] == answers[1]


@EVERY
def test_samples_are_distinct_and_in_range(name):
    task, found = samples(name, extra=9)
    assert found.tokens.dtype == np.int32
    assert found.tokens.shape == (COUNT, task.smallest + 9)
    assert found.tokens.min() >= 0
    assert found.tokens.max() < task.vocab_size
    assert found.present.any(axis=1).all()
    assert (found.distance > 0).all()
    assert ((found.depth > 0) & (found.depth < 1)).all()
    # Every answer's facts lie before it, in the text that asks it.
    assert (np.diff(found.start, axis=1) > 0).all()
    assert len(np.unique(found.tokens, axis=0)) == COUNT


@EVERY
def test_fields_are_independent(name):
    task = TASKS[name]
    for knob in KNOBS:
        if hasattr(task, knob):
            other = replace(task, **{knob: getattr(task, knob) + 1})
            found = other.batch(other.smallest + 5, 0, "test", np.arange(20))
            solve = SOLVERS[task.kind]
            for row in range(20):
                text, answers = other.questions(found, row)
                assert words(solve(text)) == words(answers), (knob, text)


@EVERY
def test_every_field_changes_something_or_is_refused(name):
    task = TASKS[name]
    _, before = samples(name, count=5)
    for field in fields(task):
        if field.name == "kind":
            continue
        value = getattr(task, field.name)
        for other in (value + 1, value - 1):
            try:
                changed = replace(task, **{field.name: other})
            except BadInput:
                continue
            length = max(before.tokens.shape[1], changed.smallest)
            after = changed.batch(length, 3, "test", np.arange(5)).tokens
            assert changed.vocab_size != task.vocab_size or not np.array_equal(
                after, task.batch(length, 3, "test", np.arange(5)).tokens
            ), field.name


@EVERY
def test_its_tokenizer_reads_its_text(name):
    task, found = samples(name, count=20)
    assert len(set(task.vocabulary.spelling)) == task.vocab_size
    for row in found.tokens:
        text = task.render(row)
        np.testing.assert_array_equal(tokenizer(task).encode(text), row)
        assert tokenizer(task).decode(row) == text


@EVERY
def test_too_short_a_length_names_the_smallest(name):
    task = TASKS[name]
    with pytest.raises(BadInput, match=f"at least {task.smallest} "):
        task.batch(task.smallest - 1, 0, "test", np.arange(2))
    assert task.batch(task.smallest, 0, "test", np.arange(200)).tokens.shape[1] == task.smallest


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: tasks.Mqar(facts=100), "keys"),
        (lambda: tasks.Mqar(updates=9), "updates"),
        (lambda: tasks.Mqar(parts=2, keys=50), "keys"),
        (lambda: tasks.Mqar(facts=0), "facts"),
        (lambda: tasks.FlipFlop(filler=2), "filler"),
        (lambda: tasks.Needle(filler=99), "filler"),
        (lambda: tasks.NoLiteral(keys=40), "keys"),
        (lambda: tasks.VariableTracking(hops=40), "names"),
        (lambda: tasks.CommonWords(often=2, seldom=2), "seldom"),
        (lambda: tasks.FrequentWords(often=2), "often"),
        (lambda: tasks.IndirectIndexing(farthest=16), "farthest"),
        (lambda: tasks.FuzzyRecall(facts=300), "facts"),
        (lambda: tasks.Program(shortest=4), "shortest"),
    ],
)
def test_contradictory_fields_are_refused(make, field):
    with pytest.raises(BadInput) as caught:
        make()
    assert caught.value.where == field


def test_solvers_and_generators_share_no_code():
    folder = Path(tasks.__file__).parent
    for path in (folder / "solvers").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                assert re.match(r"mukv\.tasks\.solvers(\.needle)?$|collections", node.module or "")
            elif isinstance(node, ast.Import):
                assert {alias.name for alias in node.names} <= {"re"}
    for path in folder.glob("*.py"):
        assert "tasks.solvers" not in path.read_text(), path
