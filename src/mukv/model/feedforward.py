"""The kinds of feed-forward parts. To add one: a file with a class, a line here."""

from mukv.model.block import Feedforward, Gated
from mukv.model.experts import Experts

FEEDFORWARDS: dict[str, type[Feedforward]] = {"gated": Gated, "experts": Experts}
AnyFeedforward = Gated | Experts

__all__ = ["FEEDFORWARDS", "AnyFeedforward", "Experts", "Feedforward", "Gated"]
