"""The memory of a decoding model: a large frozen body, a small tail, both of static shape."""

from mukv.cache.base import Cache, Slot

__all__ = ["Cache", "Slot"]
