"""Feed-forward parts. To add one, write a file with a class and add a line to FEEDFORWARDS."""

from typing import Annotated

from mukv.core.table import PartTable
from mukv.model.block import Feedforward, Gated, Ungated
from mukv.model.experts import Experts

FEEDFORWARDS = PartTable(
    "mlp", Feedforward, {"gated": Gated, "ungated": Ungated, "experts": Experts}
)
AnyFeedforward = Annotated[Feedforward, FEEDFORWARDS]

__all__ = ["FEEDFORWARDS", "AnyFeedforward", "Experts", "Feedforward", "Gated", "Ungated"]
