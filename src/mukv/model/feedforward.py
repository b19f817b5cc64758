"""The kinds of feed-forward parts. To add one: a file with a class, a line here."""

from typing import Annotated

from mukv.core.table import PartTable
from mukv.model.block import Feedforward, Gated
from mukv.model.experts import Experts

FEEDFORWARDS = PartTable("mlp", Feedforward, {"gated": Gated, "experts": Experts})
AnyFeedforward = Annotated[Feedforward, FEEDFORWARDS]

__all__ = ["FEEDFORWARDS", "AnyFeedforward", "Experts", "Feedforward", "Gated"]
