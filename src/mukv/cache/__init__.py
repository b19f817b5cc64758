"""The cache of a decoding model: a large body that is only read, a small tail, static shapes.

A policy says which entries the body keeps, how they are stored and which of them a query reads.
"""

from mukv.cache.base import Body, Cache, Reader, Ring, Slot
from mukv.cache.policy import FULL, NAMES, Calibrated, Policy
from mukv.cache.recorded import RECORD, Recorded

__all__ = [
    "FULL",
    "NAMES",
    "RECORD",
    "Body",
    "Cache",
    "Calibrated",
    "Policy",
    "Reader",
    "Recorded",
    "Ring",
    "Slot",
]
