"""Tests share compiled programs between runs and keep XLA from optimising what runs once."""

from __future__ import annotations

import os

os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", ".cache/jax")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")
