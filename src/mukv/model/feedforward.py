"""Feed-forward parts. To add one, write a file with a class and add a line to FEEDFORWARDS."""

from typing import Annotated

from mukv.core.table import PartTable
from mukv.model.block import Feedforward, Gated, Ungated
from mukv.model.experts import Experts
from mukv.model.mlp_and_experts import MLPAndExperts

FEEDFORWARDS = PartTable(
    "mlp",
    Feedforward,
    {"gated": Gated, "ungated": Ungated, "experts": Experts, "mlp_and_experts": MLPAndExperts},
)
AnyFeedforward = Annotated[Feedforward, FEEDFORWARDS]

__all__ = [
    "FEEDFORWARDS",
    "AnyFeedforward",
    "Experts",
    "Feedforward",
    "Gated",
    "MLPAndExperts",
    "Ungated",
]
