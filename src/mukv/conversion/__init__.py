"""Conversions of trained models to a smaller memory. To add one: a file with a class, a line
here."""

from __future__ import annotations

import re
from dataclasses import MISSING, fields
from typing import Any, get_args, get_type_hints

from mukv.conversion.base import Conversion, ConvertedLayer, SourceLayer
from mukv.conversion.convert import convert, require_plain
from mukv.conversion.examples import examples_of
from mukv.conversion.kv_heads import FewerHeads
from mukv.conversion.latent import LowRank
from mukv.conversion.reuse import CrossLayer
from mukv.conversion.shared_kv import SharedVectors
from mukv.core.errors import BadInput, unknown_name
from mukv.core.table import PartTable

CONVERSIONS = PartTable(
    "conversion",
    Conversion,
    {"gqa": FewerHeads, "shared_kv": SharedVectors, "mla": LowRank, "reuse": CrossLayer},
    kinds=False,
)
