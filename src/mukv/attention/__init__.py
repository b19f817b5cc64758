"""Attention variants. To add one, write a file with a class and add a line to ATTENTIONS."""

from typing import Annotated

from mukv.attention.base import Attention, Queries
from mukv.attention.compressed import HCA
from mukv.attention.entries import Bag, Entries, Recall, Retrieved
from mukv.attention.grouped import Grouped
from mukv.attention.grouped_tied import GroupedTied
from mukv.attention.latent import Latent
from mukv.attention.mask import Mask
from mukv.attention.mixer import Carried, EntryStore, Mixer, StateStore, Written
from mukv.attention.recalled import Query, Recalled
from mukv.attention.shared_kv import SharedKV
from mukv.attention.tensor_product import TensorProduct
from mukv.core.table import PartTable

ATTENTIONS = PartTable(
    "attention",
    Attention,
    {
        "grouped": Grouped,
        "shared_kv": SharedKV,
        "latent": Latent,
        "grouped_tied": GroupedTied,
        "tensor_product": TensorProduct,
        "hca": HCA,
    },
)
AnyAttention = Annotated[Attention, ATTENTIONS]

__all__ = [
    "ATTENTIONS",
    "HCA",
    "AnyAttention",
    "Attention",
    "Bag",
    "Carried",
    "Entries",
    "EntryStore",
    "Grouped",
    "GroupedTied",
    "Latent",
    "Mask",
    "Mixer",
    "Queries",
    "Query",
    "Recall",
    "Recalled",
    "Retrieved",
    "SharedKV",
    "StateStore",
    "TensorProduct",
    "Written",
]
