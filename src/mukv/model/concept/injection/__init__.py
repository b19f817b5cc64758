"""Injections, which pass concepts to tokens.

To add one, write a file with a class and add a line to INJECTIONS.
"""

from typing import Annotated

from mukv.core.table import PartTable
from mukv.model.concept.injection.base import (
    CONCEPT,
    Injection,
    InjectionInputs,
    Joint,
    Lasting,
    at_width,
)
from mukv.model.concept.injection.cross import Cross
from mukv.model.concept.injection.prefix import Prefix
from mukv.model.concept.injection.residual import ResidualInjection

INJECTIONS = PartTable(
    "injection",
    Injection,
    {
        "residual": ResidualInjection,
        "prefix": Prefix,
        "cross": Cross,
    },
)
AnyInjection = Annotated[Injection, INJECTIONS]

__all__ = [
    "CONCEPT",
    "INJECTIONS",
    "AnyInjection",
    "Cross",
    "Injection",
    "InjectionInputs",
    "Joint",
    "Lasting",
    "Prefix",
    "ResidualInjection",
    "at_width",
]
