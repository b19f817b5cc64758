"""Attention and other mixers. To add one, write a class in a file and a line in ATTENTIONS."""

from typing import Annotated

from mukv.attention.base import Attention, Queries
from mukv.attention.compressed import HCA
from mukv.attention.entries import Bag, Entries, Recall, Retrieved
from mukv.attention.eviction import Eviction
from mukv.attention.gated_delta import GatedDelta
from mukv.attention.grouped import Grouped
from mukv.attention.grouped_tied import GroupedTied
from mukv.attention.indexer import Indexer
from mukv.attention.kimi_delta import KimiDelta
from mukv.attention.latent import Latent
from mukv.attention.mask import Mask
from mukv.attention.mixer import DIRECT, Carried, EntryStore, Mixer, StateStore, Written
from mukv.attention.recalled import Query, Recalled
from mukv.attention.shared_kv import SharedKV
from mukv.attention.sparse_compressed import CSA
from mukv.attention.tensor_product import TensorProduct
from mukv.core.table import PartTable

ATTENTIONS = PartTable(
    "attention",
    Mixer,
    {
        "grouped": Grouped,
        "shared_kv": SharedKV,
        "latent": Latent,
        "grouped_tied": GroupedTied,
        "tensor_product": TensorProduct,
        "hca": HCA,
        "csa": CSA,
        "gated_delta": GatedDelta,
        "kimi_delta": KimiDelta,
    },
)
AnyAttention = Annotated[Mixer, ATTENTIONS]

__all__ = [
    "ATTENTIONS",
    "CSA",
    "DIRECT",
    "HCA",
    "AnyAttention",
    "Attention",
    "Bag",
    "Carried",
    "Entries",
    "EntryStore",
    "Eviction",
    "GatedDelta",
    "Grouped",
    "GroupedTied",
    "Indexer",
    "KimiDelta",
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
