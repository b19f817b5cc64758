"""mukv: a JAX laboratory for transformers with a small memory.

`mukv.load(path)` reads a run directory, a Hugging Face folder, a GGUF file or a hub id as a model:
`model.logits(tokens)`, `model.generate(prompt)`, `model.attention(text)`. The classes that YAML
names build networks: `network = mukv.Decoder(attention=mukv.Grouped(heads=8))`,
`weights = network.init(seed=0)`, `network(weights, tokens)`. Every name is imported on first use,
so that `import mukv` is quick.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from mukv.core.version import VERSION

if TYPE_CHECKING:
    from mukv.attention import CSA as CSA
    from mukv.attention import HCA as HCA
    from mukv.attention import Attention as Attention
    from mukv.attention import Eviction as Eviction
    from mukv.attention import GatedDelta as GatedDelta
    from mukv.attention import Grouped as Grouped
    from mukv.attention import GroupedTied as GroupedTied
    from mukv.attention import Indexer as Indexer
    from mukv.attention import KimiDelta as KimiDelta
    from mukv.attention import Latent as Latent
    from mukv.attention import Mixer as Mixer
    from mukv.attention import SharedKV as SharedKV
    from mukv.attention import TensorProduct as TensorProduct
    from mukv.cache.policy import Policy as Policy
    from mukv.cache.tables import CUR as CUR
    from mukv.cache.tables import DMS as DMS
    from mukv.cache.tables import FP8 as FP8
    from mukv.cache.tables import H2O as H2O
    from mukv.cache.tables import TOVA as TOVA
    from mukv.cache.tables import Adaptive as Adaptive
    from mukv.cache.tables import All as All
    from mukv.cache.tables import Clusters as Clusters
    from mukv.cache.tables import Compactor as Compactor
    from mukv.cache.tables import Critical as Critical
    from mukv.cache.tables import Drop as Drop
    from mukv.cache.tables import Every as Every
    from mukv.cache.tables import Everything as Everything
    from mukv.cache.tables import Exact as Exact
    from mukv.cache.tables import Expected as Expected
    from mukv.cache.tables import Folds as Folds
    from mukv.cache.tables import Hold as Hold
    from mukv.cache.tables import Int4 as Int4
    from mukv.cache.tables import Int8 as Int8
    from mukv.cache.tables import Keep as Keep
    from mukv.cache.tables import KeyDiff as KeyDiff
    from mukv.cache.tables import KeyNorm as KeyNorm
    from mukv.cache.tables import KVzap as KVzap
    from mukv.cache.tables import KVzip as KVzip
    from mukv.cache.tables import LagKV as LagKV
    from mukv.cache.tables import Layers as Layers
    from mukv.cache.tables import Leverage as Leverage
    from mukv.cache.tables import Merge as Merge
    from mukv.cache.tables import Nearest as Nearest
    from mukv.cache.tables import Pages as Pages
    from mukv.cache.tables import Pyramid as Pyramid
    from mukv.cache.tables import Random as Random
    from mukv.cache.tables import Refine as Refine
    from mukv.cache.tables import Rotated as Rotated
    from mukv.cache.tables import Select as Select
    from mukv.cache.tables import SnapKV as SnapKV
    from mukv.cache.tables import SparQ as SparQ
    from mukv.cache.tables import Spread as Spread
    from mukv.cache.tables import Store as Store
    from mukv.cache.tables import Streaming as Streaming
    from mukv.cache.tables import ThinK as ThinK
    from mukv.cache.tables import Threshold as Threshold
    from mukv.cache.tables import TopK as TopK
    from mukv.cache.tables import TopP as TopP
    from mukv.cache.tables import Uniform as Uniform
    from mukv.cache.tables import When as When
    from mukv.cache.tables import WholeChunks as WholeChunks
    from mukv.conversion import Conversion as Conversion
    from mukv.conversion import ConvertedLayer as ConvertedLayer
    from mukv.conversion import CrossLayer as CrossLayer
    from mukv.conversion import FewerHeads as FewerHeads
    from mukv.conversion import SharedVectors as SharedVectors
    from mukv.conversion import SourceLayer as SourceLayer
    from mukv.conversion import TruncatedLatent as TruncatedLatent
    from mukv.conversion import convert as convert
    from mukv.conversion import examples_of as examples_of
    from mukv.core.compute import Compute as Compute
    from mukv.core.errors import BadInput as BadInput
    from mukv.core.errors import Failed as Failed
    from mukv.core.mesh import MeshShape as MeshShape
    from mukv.core.norm import RMSNorm as RMSNorm
    from mukv.core.params import Param as Param
    from mukv.data.mixture import MixturePart as MixturePart
    from mukv.hub.family import Family as Family
    from mukv.infer.sampling import Sampling as Sampling
    from mukv.model import Concept as Concept
    from mukv.model import Decoder as Decoder
    from mukv.model import LanguageModel as LanguageModel
    from mukv.model import Layer as Layer
    from mukv.model import Stage as Stage
    from mukv.model.block import Branching as Branching
    from mukv.model.block import Feedforward as Feedforward
    from mukv.model.block import Gated as Gated
    from mukv.model.block import PostNorm as PostNorm
    from mukv.model.block import PreNorm as PreNorm
    from mukv.model.block import SandwichNorm as SandwichNorm
    from mukv.model.block import Ungated as Ungated
    from mukv.model.concept import Attend as Attend
    from mukv.model.concept import Chunker as Chunker
    from mukv.model.concept import Concatenate as Concatenate
    from mukv.model.concept import Concepts as Concepts
    from mukv.model.concept import Cross as Cross
    from mukv.model.concept import Delimiter as Delimiter
    from mukv.model.concept import Fixed as Fixed
    from mukv.model.concept import Injection as Injection
    from mukv.model.concept import Learned as Learned
    from mukv.model.concept import Max as Max
    from mukv.model.concept import Pool as Pool
    from mukv.model.concept import Prefix as Prefix
    from mukv.model.concept import ResidualInjection as ResidualInjection
    from mukv.model.concept import SelectPool as SelectPool
    from mukv.model.concept import Sum as Sum
    from mukv.model.concept import Weighted as Weighted
    from mukv.model.feedforward import Experts as Experts
    from mukv.model.feedforward import MLPAndExperts as MLPAndExperts
    from mukv.model.layer_inputs import LayerInputs as LayerInputs
    from mukv.position import FIRE as FIRE
    from mukv.position import KERPLE as KERPLE
    from mukv.position import NTK as NTK
    from mukv.position import ALiBi as ALiBi
    from mukv.position import CoPE as CoPE
    from mukv.position import LinearScaling as LinearScaling
    from mukv.position import Llama3 as Llama3
    from mukv.position import LogLength as LogLength
    from mukv.position import NoPE as NoPE
    from mukv.position import Position as Position
    from mukv.position import RoPE as RoPE
    from mukv.position import Slower as Slower
    from mukv.position import StepLength as StepLength
    from mukv.position import YaRN as YaRN
    from mukv.runs.config import Data as Data
    from mukv.runs.config import Run as Run
    from mukv.runs.loaded import Model as Model
    from mukv.runs.loaded import Text as Text
    from mukv.runs.loaded import load as load
    from mukv.runs.parts import register as register
    from mukv.scaling.budget import Budget as Budget
    from mukv.scaling.budget import HyperP as HyperP
    from mukv.scaling.budget import PowerLaw as PowerLaw
    from mukv.scaling.budget import SquareRoot as SquareRoot
    from mukv.scaling.optimizers import SGD as SGD
    from mukv.scaling.optimizers import Adafactor as Adafactor
    from mukv.scaling.optimizers import AdamAtan2 as AdamAtan2
    from mukv.scaling.optimizers import AdamH as AdamH
    from mukv.scaling.optimizers import AdamW as AdamW
    from mukv.scaling.optimizers import Lion as Lion
    from mukv.scaling.optimizers import Muon as Muon
    from mukv.scaling.optimizers import MuonH as MuonH
    from mukv.scaling.optimizers import Optimizer as Optimizer
    from mukv.scaling.parameterization import Constants as Constants
    from mukv.scaling.parameterization import Measured as Measured
    from mukv.scaling.parameterization import Scaling as Scaling
    from mukv.scaling.rows import Parameterization as Parameterization
    from mukv.scaling.schedules import WSD as WSD
    from mukv.scaling.schedules import Cosine as Cosine
    from mukv.scaling.schedules import InverseSqrt as InverseSqrt
    from mukv.scaling.schedules import Linear as Linear
    from mukv.scaling.schedules import Power as Power
    from mukv.scaling.schedules import Schedule as Schedule
    from mukv.scaling.stability import Alignment as Alignment
    from mukv.tasks import CommonWords as CommonWords
    from mukv.tasks import Counting as Counting
    from mukv.tasks import FlipFlop as FlipFlop
    from mukv.tasks import FrequentWords as FrequentWords
    from mukv.tasks import FuzzyRecall as FuzzyRecall
    from mukv.tasks import IndirectIndexing as IndirectIndexing
    from mukv.tasks import Mqar as Mqar
    from mukv.tasks import Needle as Needle
    from mukv.tasks import NoisyRecall as NoisyRecall
    from mukv.tasks import NoLiteral as NoLiteral
    from mukv.tasks import Program as Program
    from mukv.tasks import SelectiveCopy as SelectiveCopy
    from mukv.tasks import Task as Task
    from mukv.tasks import VariableTracking as VariableTracking
    from mukv.train.adapted import Adapting as Adapting
    from mukv.train.adapter import Adapter as Adapter
    from mukv.train.distillation import Distillation as Distillation
    from mukv.train.eviction import EvictionGates as EvictionGates
    from mukv.train.training import LengthStage as LengthStage
    from mukv.train.training import Training as Training

__version__ = VERSION
_MODULES = {
    "mukv.attention": (
        "Attention CSA Eviction GatedDelta Grouped GroupedTied HCA Indexer KimiDelta Latent Mixer "
        "SharedKV TensorProduct"
    ),
    "mukv.cache.policy": "Policy",
    "mukv.cache.tables": (
        "Adaptive All Clusters Compactor Critical CUR DMS Drop Every Everything Exact Expected "
        "Folds FP8 H2O Hold Int4 Int8 Keep KeyDiff KeyNorm KVzap KVzip LagKV Layers Leverage Merge "
        "Nearest Pages Pyramid Random Refine Rotated Select SnapKV SparQ Spread Store "
        "Streaming ThinK Threshold TopK TopP TOVA Uniform When WholeChunks"
    ),
    "mukv.conversion": (
        "Conversion ConvertedLayer CrossLayer FewerHeads SharedVectors SourceLayer TruncatedLatent "
        "convert examples_of"
    ),
    "mukv.core.compute": "Compute",
    "mukv.core.errors": "BadInput Failed",
    "mukv.core.mesh": "MeshShape",
    "mukv.core.norm": "RMSNorm",
    "mukv.core.params": "Param",
    "mukv.data.mixture": "MixturePart",
    "mukv.infer.sampling": "Sampling",
    "mukv.model": "Concept Decoder LanguageModel Layer Stage",
    "mukv.model.block": "Branching Feedforward Gated PostNorm PreNorm SandwichNorm Ungated",
    "mukv.model.feedforward": "Experts MLPAndExperts",
    "mukv.model.layer_inputs": "LayerInputs",
    "mukv.model.concept": (
        "Attend Chunker Concatenate Concepts Cross Delimiter Fixed Injection Learned Max "
        "Pool Prefix ResidualInjection SelectPool Sum Weighted"
    ),
    "mukv.position": (
        "ALiBi CoPE FIRE KERPLE LinearScaling Llama3 LogLength NTK NoPE Position RoPE "
        "Slower StepLength YaRN"
    ),
    "mukv.runs.config": "Data Run",
    "mukv.hub.family": "Family",
    "mukv.runs.parts": "register",
    "mukv.runs.loaded": "Model Text load",
    "mukv.scaling.budget": "Budget HyperP PowerLaw SquareRoot",
    "mukv.scaling.optimizers": "Adafactor AdamAtan2 AdamH AdamW Lion Muon MuonH Optimizer SGD",
    "mukv.scaling.parameterization": "Constants Measured Scaling",
    "mukv.scaling.rows": "Parameterization",
    "mukv.scaling.schedules": "Cosine InverseSqrt Linear Power Schedule WSD",
    "mukv.scaling.stability": "Alignment",
    "mukv.tasks": (
        "CommonWords Counting FlipFlop FrequentWords FuzzyRecall IndirectIndexing Mqar "
        "Needle NoLiteral NoisyRecall Program SelectiveCopy Task VariableTracking"
    ),
    "mukv.train.adapted": "Adapting",
    "mukv.train.adapter": "Adapter",
    "mukv.train.distillation": "Distillation",
    "mukv.train.eviction": "EvictionGates",
    "mukv.train.training": "LengthStage Training",
}
"""The public names, by the module that has them. Type checkers read the imports above; a test
compares the two."""
_PLACES = {name: module for module, names in _MODULES.items() for name in names.split()}
__all__ = ["__version__", *_PLACES]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'mukv' has no attribute {name!r}")
    return getattr(import_module(_PLACES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_PLACES})
