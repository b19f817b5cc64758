"""Models: what is built from attention, positions and a plan."""

from mukv.model.decoder import Decoder
from mukv.model.plan import Layer, Stage

AnyModel = Decoder

__all__ = ["AnyModel", "Decoder", "Layer", "Stage"]
