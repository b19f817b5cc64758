"""Language models, built from attention, feed-forward parts and a layer plan."""

from typing import Annotated

from mukv.core.table import PartTable
from mukv.model.base import ForwardResult, LanguageModel
from mukv.model.concept import Concept
from mukv.model.decoder import Decoder
from mukv.model.plan import Layer, Stage

MODELS = PartTable("model", LanguageModel, {"decoder": Decoder, "concept": Concept})
AnyModel = Annotated[LanguageModel, MODELS]

__all__ = ["AnyModel", "Concept", "Decoder", "ForwardResult", "LanguageModel", "Layer", "Stage"]
