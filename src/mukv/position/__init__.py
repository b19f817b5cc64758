"""Position encodings. To add one: a file with a class, a line here."""

from mukv.position.base import Position
from mukv.position.nope import NoPE
from mukv.position.rope import Llama3, RoPE

POSITIONS: dict[str, type[Position]] = {"nope": NoPE, "rope": RoPE}
AnyPosition = NoPE | RoPE

__all__ = ["POSITIONS", "AnyPosition", "Llama3", "NoPE", "Position", "RoPE"]
