"""Measure a model under cache policies: perplexity, recall, bytes and speed."""

from mukv.compress.judge import Result, grid, judge
from mukv.compress.rows import USUAL, Rows, rows_of
from mukv.compress.table import write

__all__ = ["USUAL", "Result", "Rows", "grid", "judge", "rows_of", "write"]
