"""Models: what is built from attention, positions and a plan."""

from mukv.model.base import LanguageModel, Reading
from mukv.model.decoder import Decoder
from mukv.model.plan import Layer, Stage

AnyModel = Decoder

__all__ = ["AnyModel", "Decoder", "LanguageModel", "Layer", "Reading", "Stage"]
