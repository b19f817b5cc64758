"""Measure a model under cache policies: perplexity, recall, bytes and speed."""

from mukv.compress.command import CompressSettings
from mukv.compress.judge import Comparison, Result

__all__ = ["Comparison", "CompressSettings", "Result"]
