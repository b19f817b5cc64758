"""Models: what is built from attention, positions and a plan."""

from mukv.model.base import ForwardResult, LanguageModel
from mukv.model.concept import Concept
from mukv.model.decoder import Decoder
from mukv.model.plan import Layer, Stage

AnyModel = Decoder | Concept

__all__ = ["AnyModel", "Concept", "Decoder", "ForwardResult", "LanguageModel", "Layer", "Stage"]
