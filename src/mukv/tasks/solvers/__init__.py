"""Independent solvers: compute the answers to a task's questions from its text alone.

Solvers share no code with the generators, so that their answers follow from the text alone. A
solver receives the text with " ?" in place of each answer and returns the answers in order.
"""

from collections.abc import Callable

from mukv.tasks.solvers import copying, frequency, needle, program, recall, states, tracking

SOLVERS: dict[str, Callable[[str], list[str]]] = {
    "mqar": recall.pairs,
    "noisy_recall": recall.pairs,
    "fuzzy_recall": recall.motifs,
    "needle": needle.numbers,
    "no_literal": needle.numbers,
    "variable_tracking": tracking.values,
    "common_words": frequency.most,
    "frequent_words": frequency.most,
    "selective_copy": copying.capitals,
    "indirect_indexing": copying.neighbours,
    "flip_flop": states.flip_flop,
    "counting": states.counts,
    "program": program.comments,
}
"""Solvers by the kind of the task."""

__all__ = ["SOLVERS"]
