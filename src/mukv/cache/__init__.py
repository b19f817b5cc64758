"""The memory of a decoding model: a large frozen body, a small tail, both of static shape.

A policy says what of it is kept, how it is stored and what of it is read.
"""

from mukv.cache.base import Body, Cache, Reader, Ring, Slot
from mukv.cache.policy import FULL, NAMES, Calibrated, Policy

__all__ = ["FULL", "NAMES", "Body", "Cache", "Calibrated", "Policy", "Reader", "Ring", "Slot"]
