"""Position encodings, by name. To add one: a file with a class, and a line in `POSITIONS`."""

from typing import Annotated

from mukv.core.table import Table
from mukv.position.alibi import ALiBi
from mukv.position.base import Pairs, Position
from mukv.position.cope import CoPE
from mukv.position.fire import FIRE
from mukv.position.kerple import KERPLE
from mukv.position.nope import LogLength, NoPE, StepLength
from mukv.position.rope import RoPE
from mukv.position.rope_scaling import NTK, LinearScaling, Llama3, Slower, YaRN

POSITIONS = Table(
    "position",
    Position,
    {
        "nope": NoPE,
        "rope": RoPE,
        "alibi": ALiBi,
        "cope": CoPE,
        "fire": FIRE,
        "kerple": KERPLE,
    },
)
AnyPosition = Annotated[Position, POSITIONS]

__all__ = [
    "FIRE",
    "KERPLE",
    "NTK",
    "POSITIONS",
    "ALiBi",
    "AnyPosition",
    "CoPE",
    "LinearScaling",
    "Llama3",
    "LogLength",
    "NoPE",
    "Pairs",
    "Position",
    "RoPE",
    "Slower",
    "StepLength",
    "YaRN",
]
