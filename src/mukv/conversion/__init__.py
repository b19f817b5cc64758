"""Conversions of trained models to a smaller memory. To add one, write a file with a class and add
a line here."""

from mukv.conversion.base import Conversion, ConvertedLayer, SourceLayer
from mukv.conversion.convert import check, convert
from mukv.conversion.examples import examples_of, windows
from mukv.conversion.kv_heads import FewerHeads
from mukv.conversion.latent import TruncatedLatent
from mukv.conversion.named import CONVERSIONS, parse
from mukv.conversion.reuse import CrossLayer
from mukv.conversion.shared_kv import SharedVectors

__all__ = [
    "CONVERSIONS",
    "Conversion",
    "ConvertedLayer",
    "CrossLayer",
    "FewerHeads",
    "SharedVectors",
    "SourceLayer",
    "TruncatedLatent",
    "check",
    "convert",
    "examples_of",
    "parse",
    "windows",
]
