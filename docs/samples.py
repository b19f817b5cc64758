"""Write a sample of each task into docs/benchmark.md.

Run: python docs/samples.py
"""

from __future__ import annotations

from pathlib import Path

from mukv.storage.files import write_atomic
from mukv.tasks import TASKS, AnyTask

PAGE = Path(__file__).with_name("benchmark.md")
BEGIN, END = "<!-- samples: python docs/samples.py -->", "<!-- end of samples -->"
MORE = 16
"""Tokens of filler per sample."""


def sample(name: str, task: AnyTask) -> str:
    """Format sample 0 of the test split, with its answers listed separately."""
    samples = task.sample(task.smallest + MORE, 0, "test", 0)
    text, answers = task.questions(samples)
    lines = "\n".join(line.rstrip() for line in text.splitlines())
    listed = ", ".join(" ".join(answer.split()) for answer in answers)
    return f"**{name}** (answers: {listed})\n\n```\n{lines}\n```\n"


def page(text: str) -> str:
    """Return the page with its samples replaced by the current ones."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    samples = "\n".join(sample(name, task) for name, task in TASKS.items())
    return f"{before}{BEGIN}\n\n{samples}\n{END}{after}"


if __name__ == "__main__":
    write_atomic(PAGE, page(PAGE.read_text()))
