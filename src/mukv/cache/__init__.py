"""The KV cache of a decoding model, and the policies that compress it.

Its shapes are static. Decoding steps only read the large body and write the small tail. A policy
decides which entries the body keeps, how they are stored and which of them a query reads.
"""

from mukv.cache.base import Body, Cache, Reader, Ring, Slot
from mukv.cache.kept import choosing
from mukv.cache.policy import FULL, Calibrated, Policy
from mukv.cache.recorded import RECORD, Recorded
from mukv.cache.tables import NAMES

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
    "choosing",
]
