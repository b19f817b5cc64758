"""Attention variants. To add one: a file with a class, a line here."""

from typing import Annotated

from mukv.attention.base import Attention, Queries
from mukv.attention.entries import Bag, Entries, Recall, Retrieved
from mukv.attention.grouped import Grouped
from mukv.attention.grouped_tied import GroupedTied
from mukv.attention.latent import Latent
from mukv.attention.mask import Mask
from mukv.attention.recalled import Query, Recalled
from mukv.attention.shared_kv import SharedKV
from mukv.attention.tensor_product import TensorProduct
from mukv.core.table import Table

ATTENTIONS = Table(
    "attention",
    Attention,
    {
        "grouped": Grouped,
        "shared_kv": SharedKV,
        "latent": Latent,
        "grouped_tied": GroupedTied,
        "tensor_product": TensorProduct,
    },
)
AnyAttention = Annotated[Attention, ATTENTIONS]

__all__ = [
    "ATTENTIONS",
    "AnyAttention",
    "Attention",
    "Bag",
    "Entries",
    "Grouped",
    "GroupedTied",
    "Latent",
    "Mask",
    "Queries",
    "Query",
    "Recall",
    "Recalled",
    "Retrieved",
    "SharedKV",
    "TensorProduct",
]
