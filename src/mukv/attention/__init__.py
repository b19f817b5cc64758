"""Attention variants. To add one: a file with a class (params, write, read), a line here."""

from mukv.attention.base import Attention
from mukv.attention.entries import Entries
from mukv.attention.grouped import Grouped
from mukv.attention.mask import Mask

ATTENTIONS: dict[str, type[Attention]] = {"grouped": Grouped}
AnyAttention = Grouped

__all__ = ["ATTENTIONS", "AnyAttention", "Attention", "Entries", "Grouped", "Mask"]
