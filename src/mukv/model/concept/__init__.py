"""The concept model and its parts: chunkers, pooling and injections."""

from mukv.model.concept.architecture import Concepts
from mukv.model.concept.chunkers import CHUNKERS, Chunker, Delimiter, Fixed, Learned
from mukv.model.concept.injection import INJECTIONS, Cross, Injection, Prefix, ResidualInjection
from mukv.model.concept.model import Concept
from mukv.model.concept.pooling import (
    POOLS,
    Attend,
    Concatenate,
    Max,
    Pool,
    SelectPool,
    Sum,
    Weighted,
)

__all__ = [
    "CHUNKERS",
    "INJECTIONS",
    "POOLS",
    "Attend",
    "Chunker",
    "Concatenate",
    "Concept",
    "Concepts",
    "Cross",
    "Delimiter",
    "Fixed",
    "Injection",
    "Learned",
    "Max",
    "Pool",
    "Prefix",
    "ResidualInjection",
    "SelectPool",
    "Sum",
    "Weighted",
]
