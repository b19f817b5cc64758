"""Phrase tasks as English prompts, for models that were tuned to follow instructions.

Instructions and questions are those of RULER (Hsieh et al. 2024). Each filler word of a sample
becomes a sentence of a haystack, each item (a fact, an assignment, a word) a sentence of its own,
and all questions of a sample are asked at once.
"""

from __future__ import annotations

import re
import textwrap
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import Any, ClassVar, NamedTuple

import numpy as np
from jaxtyping import Int

from mukv.core.errors import BadInput
from mukv.tasks import TASKS, AnyTask, Samples, Split
from mukv.tasks.needle import CITIES, Haystack
from mukv.tasks.words import invented

NOISE = (
    *("The grass is green.", "The sky is blue.", "The sun is yellow."),
    *("Here we go.", "There and back again."),
)
"""RULER's filler."""
LONGEST = 300
"""Most characters of a sentence of a user's haystack."""
WORDS = """
abrupt amber bashful brisk candid clumsy dapper eager fancy frosty gentle giddy hasty hollow icy
jolly lanky lively mellow nimble ornate placid quaint rusty shiny sturdy tidy timid upbeat vivid
wary zesty
anchor badger basket beacon canyon castle comet dragon ember falcon garden glacier hammer harbor
island jacket kettle lantern marble meadow needle orchard pebble pigeon quarry ribbon saddle temple
tunnel violin walnut window
"""
ADJECTIVES, NOUNS = WORDS.split()[:32], WORDS.split()[32:]


class Prompt(NamedTuple):
    """A sample in words.

    context: instruction and text
    question: line with the question, which follows the context
    opening: first words of the answer, which the model continues
    answers: texts that a right answer contains, in any order
    depth: mean relative position of the facts in the text: 0 at its beginning, 1 at its end
    """

    context: str
    question: str
    opening: str
    answers: tuple[str, ...]
    depth: float

    @property
    def message(self) -> str:
        """Context and question."""
        return f"{self.context}\n{self.question}"


class Question(NamedTuple):
    """The question at the end of a text; its fields are those of `Prompt`."""

    text: str
    opening: str
    answers: tuple[str, ...]


class Wording(ABC):
    """Base class of the wordings of a kind of task.

    item, ask: names of the groups of tokens that begin an item, and that begin a question
    """

    item: ClassVar[str]
    ask: ClassVar[str]

    @abstractmethod
    def instruction(self, task: Any) -> str:
        """Return the instruction, which comes before the text."""

    @abstractmethod
    def sentence(self, task: Any, tokens: Sequence[int]) -> str:
        """Return an item as a sentence."""

    @abstractmethod
    def question(self, task: Any, samples: Samples, row: int) -> Question:
        """Return the question about a row."""

    @abstractmethod
    def chance(self, task: Any) -> float:
        """Return the expected fraction of answers that a random guess of this form contains."""


class NumberWords(Wording):
    """Needles: special magic numbers, in RULER's words."""

    item, ask = "fact", "question"

    def instruction(self, task: Haystack) -> str:
        several = task.facts * task.values + task.distractors > 1
        first = "Some special magic numbers are" if several else "A special magic number is"
        return (
            f"{first} hidden within the following text. Make sure to memorize it. I will quiz you "
            f"about the number{'s' if several else ''} afterwards."
        )

    def sentence(self, task: Haystack, tokens: Sequence[int]) -> str:
        number = self._number(task, tokens[3 : 3 + task.digits])
        return f"One of the special magic numbers for {self._name(task, tokens[1])} is: {number}."

    def question(self, task: Haystack, samples: Samples, row: int) -> Question:
        tokens, ids = samples.tokens[row], task.vocabulary
        asked = [
            self._name(task, token) for token in tokens[np.flatnonzero(tokens == ids.question) + 1]
        ]
        answers = [
            self._number(task, tokens[at : at + task.digits])
            for start, stop in zip(samples.start[row], samples.stop[row], strict=True)
            for at in range(start, stop, task.digits)
        ]
        names = listed(asked)
        if len(answers) == 1:
            about = f"special magic number for {names} mentioned in the provided text"
            return Question(f"What is the {about}?", f" The {about} is", tuple(answers))
        about = f"special magic numbers for {names} mentioned in the provided text"
        return Question(f"What are all the {about}?", f" The {about} are", tuple(answers))

    def chance(self, task: Haystack) -> float:
        return 10.0**-task.digits

    def _name(self, task: Haystack, token: int) -> str:
        key = int(token) - task.vocabulary.key
        adjective, noun = key % len(ADJECTIVES), (key // len(ADJECTIVES) + key) % len(NOUNS)
        return f"{ADJECTIVES[adjective]} {NOUNS[noun]}"

    def _number(self, task: Haystack, tokens: Sequence[int]) -> str:
        return "".join(str(int(token) - task.vocabulary.digit) for token in tokens)


class CityWords(NumberWords):
    """Needles whose question names the country of the city that the fact names."""

    def _name(self, task: Haystack, token: int) -> str:
        cities, ids = list(CITIES.items()), task.vocabulary
        if token >= ids.country:
            return f"the capital of {cities[int(token) - ids.country][1]}"
        return cities[int(token) - ids.key][0]


class VariableWords(Wording):
    """Chains of assignments in RULER's words. Unlike RULER, the question asks for the value of the
    last name."""

    item, ask = "let", "ask"

    def instruction(self, task: Any) -> str:
        return (
            "Memorize and track the chain(s) of variable assignment hidden in the following text."
        )

    def sentence(self, task: Any, tokens: Sequence[int]) -> str:
        _, name, _, source = tokens
        ids = task.vocabulary
        value = (
            self._value(task, source) if source >= ids.value else f"VAR {self._name(task, source)}"
        )
        return f"VAR {self._name(task, name)} = {value}."

    def question(self, task: Any, samples: Samples, row: int) -> Question:
        tokens, ids = samples.tokens[row], task.vocabulary
        asked = tokens[np.flatnonzero(tokens == ids.ask) + 1]
        names = listed([self._name(task, token) for token in asked])
        answers = tuple(self._value(task, tokens[at]) for at in samples.start[row])
        plural, verb = ("s", "are") if len(answers) > 1 else ("", "is")
        return Question(
            f"Question: What {verb} the value{plural} of the variable{plural} {names} in the text "
            "above?",
            " Answer: According to the chain(s) of variable assignment in the text above, the "
            f"value{plural} of {names} {verb}",
            answers,
        )

    def chance(self, task: Any) -> float:
        return 1 / task.values

    def _name(self, task: Any, token: int) -> str:
        return invented(task.names)[int(token) - task.vocabulary.name].upper()

    def _value(self, task: Any, token: int) -> str:
        return task.vocabulary.spelling[token].strip()


class MentionWords(Wording):
    """Words in capital letters that are to be counted."""

    item, ask = "word", "ask"

    def __init__(self, most: str):
        """Set the adjective of the questions: "common" or "frequent"."""
        self.most = most

    def instruction(self, task: Any) -> str:
        return (
            "In the following text some words are in capital letters. Some of them appear more "
            "often than others. Memorize the ones that appear most often."
        )

    def sentence(self, task: Any, tokens: Sequence[int]) -> str:
        return f"{self._word(task, tokens[0])}."

    def question(self, task: Any, samples: Samples, row: int) -> Question:
        tokens = samples.tokens[row]
        answers = tokens[samples.start[row, 0] : samples.stop[row, 0]]
        plural, verb = ("s", "are") if task.facts > 1 else ("", "is")
        about = f"{task.facts} most {self.most} word{plural} in capital letters in the above text"
        return Question(
            f"Question: What {verb} the {about}?",
            f" Answer: The {about} {verb}:",
            tuple(self._word(task, token) for token in answers),
        )

    def chance(self, task: Any) -> float:
        return task.facts / task.words

    def _word(self, task: Any, token: int) -> str:
        return task.vocabulary.spelling[token].strip()


WORDINGS: dict[str, Wording] = {
    "needle": NumberWords(),
    "no_literal": CityWords(),
    "variable_tracking": VariableWords(),
    "common_words": MentionWords("common"),
    "frequent_words": MentionWords("frequent"),
}
"""Wordings by the kind of the task."""

DIGITS = 7
"""Digits of RULER's numbers."""
PROMPTED: dict[str, AnyTask] = {
    name: replace(task, digits=DIGITS) if isinstance(task, Haystack) else task
    for name, task in TASKS.items()
    if task.kind in WORDINGS
}
"""Tasks of the benchmark that have a wording; numbers have as many digits as RULER's."""


@dataclass(frozen=True)
class PromptForm:
    """A task in words. Raises BadInput for a task without a wording.

    haystack: sentences between the items; each sample takes them in order, but starts at another
        sentence
    """

    task: AnyTask
    haystack: tuple[str, ...] = NOISE

    def __post_init__(self) -> None:
        if self.task.kind not in WORDINGS:
            allowed = f"a task that can be asked in words: {', '.join(WORDINGS)}"
            raise BadInput("--tasks", self.task.kind, allowed)
        if not self.haystack:
            raise BadInput("--haystack", "no sentence", "a text with at least one")
        most = len(ADJECTIVES) * len(NOUNS)
        keys = getattr(self.task, "keys", 0)
        if keys > most:
            raise BadInput("keys", keys, f"at most the {most} names of a prompt")

    @property
    def wording(self) -> Wording:
        return WORDINGS[self.task.kind]

    @property
    def chance(self) -> float:
        """Expected fraction of answers that a random guess of the right form contains."""
        return self.wording.chance(self.task)

    def batch(
        self, size: int, seed: int, split: Split, indices: Int[np.ndarray, " row"]
    ) -> list[Prompt]:
        """Make prompts from samples of `size` tokens. Raises BadInput if the size is too small."""
        samples = self.task.batch(size, seed, split, indices)
        return [self._prompt(samples, row, int(at)) for row, at in enumerate(indices)]

    def _prompt(self, samples: Samples, row: int, index: int) -> Prompt:
        task, wording, ids = self.task, self.wording, self.task.vocabulary
        tokens = samples.tokens[row]
        first = getattr(ids, wording.item)
        items = range(first, first + len(ids.groups[wording.item]))
        filler = range(ids.filler, ids.filler + task.filler)
        end = int(np.flatnonzero(tokens == getattr(ids, wording.ask))[0])
        parts: list[list[int]] = []
        for token in tokens[1:end].tolist():
            if token in filler or token in items:
                parts.append([])
            parts[-1].append(token)
        # 7919 is a prime number, so that neighbouring samples start at distant sentences.
        noise = (self.haystack[at % len(self.haystack)] for at in count(7919 * index))
        sentences = (
            next(noise) if part[0] in filler else wording.sentence(task, part) for part in parts
        )
        asked = wording.question(task, samples, row)
        context = f"{wording.instruction(task)}\n{' '.join(sentences)}"
        depth = float(samples.depth[row, samples.present[row]].mean())
        return Prompt(context, asked.text, asked.opening, asked.answers, depth)


def sentences_of(text: str) -> tuple[str, ...]:
    """Split a text into sentences without line ends. Sentences are split into parts of at most
    LONGEST characters.
    """
    found = []
    for sentence in re.split(r"(?<=[.!?])[\"'\u201d\u2019)]*\s+|\n\s*\n", text):
        found += textwrap.wrap(" ".join(sentence.split()), LONGEST)
    return tuple(found)


def listed(names: Sequence[str]) -> str:
    """Return "a", "a, and b" or "a, b, and c", as RULER does."""
    *before, last = names
    return f"{', '.join(before)}, and {last}" if before else last
