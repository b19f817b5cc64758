"""Feed-forward parts. To add one: a file with a class, a line here."""

from typing import Annotated

from mukv.core.table import PartTable
from mukv.model.block import Feedforward, Gated

FEEDFORWARDS = PartTable("mlp", Feedforward, {"gated": Gated})
AnyFeedforward = Annotated[Feedforward, FEEDFORWARDS]

__all__ = ["FEEDFORWARDS", "AnyFeedforward", "Feedforward", "Gated"]
