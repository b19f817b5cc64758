"""The concept model and its parts: chunkers, reductions, injections."""

from mukv.model.concept.architecture import Concepts
from mukv.model.concept.chunkers import CHUNKERS, Delimiter, Fixed, Learned
from mukv.model.concept.injection import INJECTIONS, Cross, Prefix, Residually
from mukv.model.concept.model import Concept
from mukv.model.concept.pooling import (
    POOLS,
    Attend,
    Concatenate,
    Max,
    SelectPool,
    Sum,
    Weighted,
)

__all__ = [
    "CHUNKERS",
    "INJECTIONS",
    "POOLS",
    "Attend",
    "Concatenate",
    "Concept",
    "Concepts",
    "Cross",
    "Delimiter",
    "Fixed",
    "Learned",
    "Max",
    "Prefix",
    "Residually",
    "SelectPool",
    "Sum",
    "Weighted",
]
