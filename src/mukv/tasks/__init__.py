"""Synthetic tasks that test long-context recall; `docs/benchmark.md` shows a sample of each."""

from typing import Annotated

from mukv.core.table import PartTable
from mukv.tasks.base import SPLITS, Samples, Split, Task
from mukv.tasks.copying import IndirectIndexing, SelectiveCopy
from mukv.tasks.draws import Draws
from mukv.tasks.frequency import CommonWords, FrequentWords
from mukv.tasks.needle import Needle, NoLiteral
from mukv.tasks.program import Program
from mukv.tasks.recall import FuzzyRecall, Mqar, NoisyRecall
from mukv.tasks.states import Counting, FlipFlop
from mukv.tasks.tracking import VariableTracking

TASK_KINDS = PartTable(
    "task",
    Task,
    {
        "mqar": Mqar,
        "noisy_recall": NoisyRecall,
        "fuzzy_recall": FuzzyRecall,
        "needle": Needle,
        "no_literal": NoLiteral,
        "variable_tracking": VariableTracking,
        "common_words": CommonWords,
        "frequent_words": FrequentWords,
        "selective_copy": SelectiveCopy,
        "flip_flop": FlipFlop,
        "counting": Counting,
        "indirect_indexing": IndirectIndexing,
        "program": Program,
    },
)
AnyTask = Annotated[Task, TASK_KINDS]

TASKS: dict[str, AnyTask] = {
    "mqar": Mqar(),
    "compositional_mqar": Mqar(parts=2),
    "forgetting_mqar": Mqar(updates=2),
    "noisy_recall": NoisyRecall(),
    "fuzzy_recall": FuzzyRecall(),
    "needle": Needle(),
    "needle_multi_key": Needle(distractors=6),
    "needle_multi_value": Needle(values=3, distractors=3),
    "needle_multi_query": Needle(facts=3, distractors=3),
    "no_literal": NoLiteral(),
    "variable_tracking": VariableTracking(),
    "common_words": CommonWords(),
    "frequent_words": FrequentWords(),
    "selective_copy": SelectiveCopy(),
    "flip_flop": FlipFlop(),
    "counting": Counting(),
    "indirect_indexing": IndirectIndexing(),
    "program": Program(),
}
"""The tasks of `mukv bench` with their default parameters."""

__all__ = [
    "SPLITS",
    "TASKS",
    "TASK_KINDS",
    "AnyTask",
    "CommonWords",
    "Counting",
    "Draws",
    "FlipFlop",
    "FrequentWords",
    "FuzzyRecall",
    "IndirectIndexing",
    "Mqar",
    "Needle",
    "NoLiteral",
    "NoisyRecall",
    "Program",
    "Samples",
    "SelectiveCopy",
    "Split",
    "Task",
    "VariableTracking",
]
