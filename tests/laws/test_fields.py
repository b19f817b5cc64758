"""Law 3, second half: every field of the configuration changes something, or is refused.

The fields are collected from the root configuration; one that is in no table here fails.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator
from dataclasses import fields, is_dataclass
from functools import cache, partial, reduce
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import jax
import numpy as np
import pytest

from mukv.core.errors import BadInput
from mukv.core.params import named
from mukv.core.table import PartTable
from mukv.data.build import build_tokens
from mukv.runs import config
from mukv.runs.config import Run
from mukv.runs.folder import RunDirectory
from mukv.runs.resolve import open_feed
from mukv.runs.train import train_run
from mukv.tasks import Task
from mukv.train.step import Trainer
from tests.pairs import params

BASE = (
    "model.d_model=8",
    "model.attention={heads: 2, kv_heads: 1, head_dim: 4}",
    "model.attention.position={kind: rope, scaling: {kind: llama3, factor: 4, original_length: 8}}",
    "model.mlp.hidden=12",
    "model.plan=[{pattern: [{}], repeats: 2}]",
    "train.steps=4",
    "train.batch=4",
    "train.length=16",
    "train.learning_rate=0.01",
    "train.schedule.warmup=2",
)
LAYER = "model.plan.0.pattern.0"
PLACE = "model.attention.position"
SHARED = "model.attention={kind: shared_kv, heads: 2, kv_heads: 1, head_dim: 4}"
LATENT = "model.attention={kind: latent, heads: 2, rank: 5, head_dim: 4, rope_dim: 2}"
TIED = "model.attention={kind: grouped_tied, heads: 2, kv_heads: 1, head_dim: 4}"
EXPERTS = "model.mlp={kind: experts, experts: 4, hidden: 6}"
PLAIN = "model.mlp={kind: ungated, hidden: 12}"
HEADS = "{kind: grouped, heads: 1, kv_heads: 1, head_dim: 4}"
INPUTS = "model.layer_inputs={width: 3}"
PRODUCT = "model.attention={kind: tensor_product, heads: 2, head_dim: 4, query_rank: 2, rank: 1}"
HCA = (
    "model.attention={kind: hca, heads: 2, head_dim: 4, rope_dim: 2, query_rank: 3, window: 3, "
    "every: 3, groups: 1, output_rank: 3, position: {kind: rope}}"
)
CSA = (
    "model.attention={kind: csa, heads: 2, head_dim: 4, rope_dim: 2, query_rank: 3, window: 3, "
    "every: 2, groups: 1, output_rank: 3, indexer: {heads: 2, width: 4, top_k: 2}, "
    "position: {kind: rope}}"
)
DELTA = "model.attention={kind: gated_delta, heads: 2, head_dim: 4}"
KIMI = "model.attention={kind: kimi_delta, heads: 2, head_dim: 4}"
BASED = "model.scaling.base={embed: 4, heads: 1, head_dim: 4, value_dim: 4, hidden: 6, layer: 1}"
MEASURED = (BASED, "model.scaling.alignment={hidden: {}, readout: {}}")
READOUT = "model.scaling.alignment.readout"
CONCEPT = "model={kind: concept, encoder: [{pattern: [{window: 8}]}], decoder: []}"
FIXED, DELIMITER, LEARNED = (
    (CONCEPT, f"model.chunker={{kind: {kind}}}")
    for kind in ("fixed, size: 2", "delimiter, room: 2", "learned, ratio: 4")
)
LOCAL = "[{pattern: [{window: 4}]}]"
PREFIX = (CONCEPT, f"model.decoder={LOCAL}", "model.injection={kind: prefix}")
OPTIMIZER = "train.optimizer"
MUON, ATAN2, SGD, ADAFACTOR, LION, ADAMH = (
    f"{OPTIMIZER}={{kind: {kind}}}"
    for kind in ("muon", "adam_atan2", "sgd", "adafactor", "lion", "adamh")
)
SCHEDULE = "train.schedule"
WSD, ROOT = (f"{SCHEDULE}={{kind: {kind}, warmup: 1}}" for kind in ("wsd", "inverse_sqrt"))
POWER = f"{SCHEDULE}={{kind: power, warmup: 1, amplitude: 1}}"
BUDGET = "train.budget={kind: sde, batch: 64, tokens: 1024}"
ADAPTER = "train.adapter={rank: 2}"
GATES = (
    "model.attention.eviction={window: 2}",
    "train.adapter={kind: eviction, ratio: 9, temperature: 1}",
)
THROUGH = "train={policy: 'knorm:0.5', policy_tail: 4}"
STAGED = "train.stages=[{begin: 1, length: 32}]"
MIXED = "data={path: null, mixture: [{path: {own}}, {path: {other}}]}"
NOPE, COPE, FIRE = (f"{PLACE}={{kind: {kind}}}" for kind in ("nope", "cope", "fire"))
LOG = "{kind: log_length, typical: 16}"
STEP = "{kind: step_length, every: 4, strength: 1}"
LINEAR = f"{PLACE}={{kind: rope, scaling: {{kind: linear, factor: 2}}}}"
YARN = (
    f"{PLACE}={{kind: rope, base: 100, scaling: "
    "{kind: yarn, factor: 2, original_length: 16, fast: 2, slow: 0.1}}"
)

CHANGES = {
    "Data.path": "data.path={other}",
    "Data.packing": "data.packing=contiguous",
    "Data.mixture": "data={path: null, mixture: [{path: {other}}]}",
    "MixturePart.path": (MIXED, "data.mixture.0.path={other}"),
    "MixturePart.weight": (MIXED, "data.mixture.0.weight=9"),
    "LanguageModel.vocab_size": "model.vocab_size=272",
    "LanguageModel.d_model": "model.d_model=16",
    "LanguageModel.attention": SHARED,
    "Data.task": "data={path: null, task: {kind: flip_flop, facts: 1, writes: 1}}",
    "Decoder.positions": ("model.context=64", "model.positions=learned"),
    "Decoder.layer_inputs": "model.layer_inputs={}",
    "LayerInputs.width": (INPUTS, "model.layer_inputs.width=4"),
    "LayerInputs.activation": (INPUTS, "model.layer_inputs.activation=silu"),
    "LayerInputs.embedding_scale": (INPUTS, "model.layer_inputs.embedding_scale=root_width"),
    "Branching.layer_scale": "model.residual.layer_scale=true",
    "Decoder.plan": "model.plan=[{repeats: 3}]",
    "LanguageModel.residual": "model.residual={kind: sandwich}",
    "LanguageModel.embedding_scale": "model.embedding_scale=root_width",
    "LanguageModel.readout": "model.readout=tied",
    "LanguageModel.logit_softcap": "model.logit_softcap=0.1",
    "Run.model": CONCEPT,
    "Training.adapter": ADAPTER,
    "Adapter.rank": (ADAPTER, "train.adapter.rank=1"),
    "Adapter.alpha": (ADAPTER, "train.adapter.alpha=3"),
    "Adapter.weights": (ADAPTER, "train.adapter.weights=[query]"),
    "Adapter.ratio": (ADAPTER, "train.adapter.ratio=2"),
    "Grouped.eviction": GATES[0],
    "Eviction.window": (*GATES, "model.attention.eviction.window=5"),
    "EvictionGates.ratio": (*GATES, "train.adapter.ratio=2"),
    "EvictionGates.ramp": (*GATES, "train.adapter.ramp=2"),
    "EvictionGates.temperature": (*GATES, "train.adapter.temperature=2"),
    "Architecture.encoder": (CONCEPT, "model.encoder=[]"),
    "Architecture.decoder": (CONCEPT, f"model.decoder={LOCAL}"),
    "Architecture.chunker": (CONCEPT, "model.chunker={kind: fixed}"),
    "Architecture.pool": (CONCEPT, "model.pool={kind: max}"),
    "Architecture.injection": (CONCEPT, "model.injection={kind: cross}"),
    "Concepts.d_model": (CONCEPT, "model.concepts.d_model=12"),
    "Concepts.attention": (CONCEPT, f"model.concepts.attention={HEADS}"),
    "Concepts.mlp": (CONCEPT, "model.concepts.mlp={kind: gated, hidden: 8}"),
    "Concepts.plan": (CONCEPT, "model.concepts.plan=[{repeats: 2}]"),
    "Fixed.size": (*FIXED, "model.chunker.size=3"),
    "Delimiter.delimiters": (*DELIMITER, "model.chunker.delimiters=[101]"),
    "Delimiter.room": (*DELIMITER, "model.chunker.room=4"),
    "Delimiter.span": (*DELIMITER, "model.pool={kind: sum}", "model.chunker.span=3"),
    "Learned.ratio": (*LEARNED, "model.chunker.ratio=5"),
    "Learned.weight": (*LEARNED, "model.chunker.weight=1"),
    "Learned.room": (*LEARNED, "model.chunker.room=2"),
    "Learned.span": (*LEARNED, "model.pool={kind: sum}", "model.chunker.span=2"),
    "Prefix.slots": (*PREFIX, "model.injection.slots=1"),
    "Stage.pattern": "model.plan=[{pattern: [{}, {}], repeats: 2}]",
    "Stage.repeats": "model.plan.0.repeats=1",
    "Layer.attention": f"{LAYER}.attention={{kind: grouped, heads: 1, kv_heads: 1, head_dim: 4}}",
    "Layer.position": f"{LAYER}.position={{kind: nope}}",
    "Layer.mlp": f"{LAYER}.mlp={{kind: gated, hidden: 8}}",
    "Layer.window": f"{LAYER}.window=3",
    "Layer.reads": "model.plan=[{}, {pattern: [{reads: 0}]}]",
    "Layer.indexed_by": (
        LATENT,
        "model.attention.query_rank=3",
        "model.attention.indexer={heads: 2, width: 4, top_k: 2}",
        "model.plan=[{}, {}]",
        "model.plan=[{}, {pattern: [{indexed_by: 0}]}]",
    ),
    "Attention.heads": "model.attention.heads=4",
    "Attention.scale": "model.attention.scale=0.9",
    "Attention.softcap": "model.attention.softcap=0.1",
    "Attention.sinks": "model.attention.sinks=learned",
    "Attention.gate": ("model.attention.gate=head", "model.attention.gate=channel"),
    "Attention.position": "model.attention.position={kind: nope}",
    "Groups.kv_heads": "model.attention.kv_heads=2",
    "Groups.head_dim": "model.attention.head_dim=8",
    "Groups.norm": "model.attention.norm={}",
    "Grouped.norm_over": ("model.attention.norm={}", "model.attention.norm_over=projection"),
    "Grouped.norm_values": ("model.attention.norm={}", "model.attention.norm_values=true"),
    "Grouped.biases": "model.attention.biases=[value]",
    "Latent.rank": (LATENT, "model.attention.rank=6"),
    "Latent.head_dim": (LATENT, "model.attention.head_dim=3"),
    "Latent.rope_dim": (LATENT, "model.attention.rope_dim=4"),
    "Latent.rope_parts": (
        LATENT.replace("rope_dim: 2", "rope_dim: 4"),
        "model.attention.rope_parts=2",
    ),
    "Latent.norm": (LATENT, "model.attention.norm=null"),
    "Latent.head_value_dim": (LATENT, "model.attention.head_value_dim=3"),
    "Latent.query_rank": (LATENT, "model.attention.query_rank=3"),
    "Latent.indexer": (
        LATENT,
        "model.attention.query_rank=3",
        "model.attention.indexer={heads: 2, width: 4, top_k: 2}",
    ),
    "GroupedTied.kv_heads": (TIED, "model.attention.kv_heads=2"),
    "GroupedTied.head_dim": (TIED, "model.attention.head_dim=8"),
    "TensorProduct.head_dim": (PRODUCT, "model.attention.head_dim=8"),
    "TensorProduct.query_rank": (PRODUCT, "model.attention.query_rank=3"),
    "TensorProduct.rank": (PRODUCT, "model.attention.rank=2"),
    "CompressedAttention.head_dim": (HCA, "model.attention.head_dim=8"),
    "CompressedAttention.rope_dim": (HCA, "model.attention.rope_dim=4"),
    "CompressedAttention.query_rank": (HCA, "model.attention.query_rank=4"),
    "CompressedAttention.window": (HCA, "model.attention.window=4"),
    "CompressedAttention.every": (HCA, "model.attention.every=4"),
    "CompressedAttention.groups": (HCA, "model.attention.groups=2"),
    "CompressedAttention.output_rank": (HCA, "model.attention.output_rank=4"),
    "CSA.every": (CSA, "model.attention.every=3"),
    "Indexer.heads": (CSA, "model.attention.indexer.heads=3"),
    "Indexer.width": (CSA, "model.attention.indexer.width=6"),
    "Indexer.top_k": (CSA, "model.attention.indexer.top_k=1"),
    "Indexer.loss": (CSA, "model.attention.indexer.loss=0.5"),
    "DeltaLayer.heads": (DELTA, "model.attention.heads=4"),
    "DeltaLayer.head_dim": (DELTA, "model.attention.head_dim=8"),
    "DeltaLayer.taps": (DELTA, "model.attention.taps=3"),
    "GatedDelta.key_heads": (DELTA, "model.attention.key_heads=1"),
    "GatedDelta.head_value_dim": (DELTA, "model.attention.head_value_dim=8"),
    "GatedDelta.beta": (DELTA, "model.attention.beta=2"),
    "KimiDelta.decay_floor": (KIMI, "model.attention.decay_floor=-5"),
    "NoPE.temperature": (NOPE, f"{PLACE}.temperature={{kind: log_length}}"),
    "LogLength.typical": (
        f"{PLACE}={{kind: nope, temperature: {LOG}}}",
        f"{PLACE}.temperature.typical=9",
    ),
    "StepLength.every": (
        f"{PLACE}={{kind: nope, temperature: {STEP}}}",
        f"{PLACE}.temperature.every=5",
    ),
    "StepLength.strength": (
        f"{PLACE}={{kind: nope, temperature: {STEP}}}",
        f"{PLACE}.temperature.strength=2",
    ),
    "CoPE.positions": (COPE, f"{PLACE}.positions=5"),
    "CoPE.scaled": (COPE, f"{PLACE}.scaled=false"),
    "FIRE.hidden": (FIRE, f"{PLACE}.hidden=5"),
    "FIRE.threshold": (FIRE, f"{PLACE}.threshold=4"),
    "RoPE.base": f"{PLACE}.base=50",
    "RoPE.scaling": f"{PLACE}.scaling=null",
    "RoPE.pairing": f"{PLACE}.pairing=interleaved",
    "RoPE.partial": f"{PLACE}.partial=0.5",
    "RoPE.p": f"{PLACE}.p=0.5",
    "Slower.factor": (LINEAR, f"{PLACE}.scaling.factor=3"),
    "YaRN.factor": (YARN, f"{PLACE}.scaling.factor=3"),
    "YaRN.original_length": (YARN, f"{PLACE}.scaling.original_length=64"),
    "YaRN.fast": (YARN, f"{PLACE}.scaling.rounded=false", f"{PLACE}.scaling.fast=1.5"),
    "YaRN.slow": (YARN, f"{PLACE}.scaling.slow=0.01"),
    "YaRN.rounded": (YARN, f"{PLACE}.scaling.rounded=false"),
    "YaRN.temperature": (YARN, f"{PLACE}.scaling.temperature=none"),
    "Llama3.factor": f"{PLACE}.scaling.factor=2",
    "Llama3.low_frequency_factor": f"{PLACE}.scaling.low_frequency_factor=0.001",
    "Llama3.high_frequency_factor": f"{PLACE}.scaling.high_frequency_factor=1.1",
    "Llama3.original_length": f"{PLACE}.scaling.original_length=64",
    "Gated.hidden": "model.mlp.hidden=16",
    "Gated.activation": "model.mlp.activation=gelu",
    "Ungated.hidden": (PLAIN, "model.mlp.hidden=16"),
    "Ungated.activation": (PLAIN, "model.mlp.activation=silu"),
    "Ungated.biases": (PLAIN, "model.mlp.biases=true"),
    "LanguageModel.mlp": EXPERTS,
    "Experts.experts": (EXPERTS, "model.mlp.experts=5"),
    "Experts.top_k": (EXPERTS, "model.mlp.top_k=3"),
    "Experts.hidden": (EXPERTS, "model.mlp.hidden=8"),
    "Experts.shared": (EXPERTS, "model.mlp.shared=1"),
    "Experts.activation": (EXPERTS, "model.mlp.activation=gelu"),
    "Experts.limit": (EXPERTS, "model.mlp.limit=0.01"),
    "Experts.up_offset": (EXPERTS, "model.mlp.up_offset=1"),
    "Experts.shared_gate": (EXPERTS, "model.mlp.shared=1", "model.mlp.shared_gate=true"),
    "Experts.biases": (EXPERTS, "model.mlp.biases=true"),
    "Experts.router": (EXPERTS, "model.mlp.router=sigmoid"),
    "Experts.normalise": (EXPERTS, "model.mlp.normalise=false"),
    "Experts.scale": (EXPERTS, "model.mlp.scale=2"),
    "Experts.groups": (EXPERTS, "model.mlp.groups=2"),
    "Experts.top_groups": (EXPERTS, "model.mlp.groups=2", "model.mlp.top_groups=2"),
    "Experts.group_best": (EXPERTS, "model.mlp.groups=2", "model.mlp.group_best=1"),
    "Experts.choice_bias": (EXPERTS, "model.mlp.choice_bias=true"),
    "Experts.expert_scale": (EXPERTS, "model.mlp.expert_scale=true"),
    "MLPAndExperts.router_scale": (
        "model.mlp={kind: mlp_and_experts, experts: {experts: 4, hidden: 6}}",
        "model.mlp.router_scale=0.5",
    ),
    "Experts.balance": (EXPERTS, "model.mlp.balance=1"),
    "Experts.z_loss": (EXPERTS, "model.mlp.z_loss=1"),
    "Experts.capacity": (EXPERTS, "model.mlp.capacity=0.5"),
    "RMSNorm.epsilon": "model.norm.epsilon=0.01",
    "RMSNorm.centred": "model.norm.centred=true",
    "RMSNorm.stored": "model.norm.stored=offset",
    "Training.steps": "train.steps=9",
    "Training.seed": "train.seed=1",
    "Training.batch": "train.batch=8",
    "Training.length": "train.length=8",
    "Training.learning_rate": "train.learning_rate=0.02",
    "Training.clip_norm": "train.clip_norm=0.01",
    "Training.policy": THROUGH,
    "Training.policy_tail": (THROUGH, "train.policy_tail=8"),
    "Scaling.base": BASED,
    "Scaling.alignment": (BASED, "model.scaling.alignment=none"),
    "Scaling.exponents": (
        BASED,
        "model.scaling={kind: custom, exponents: "
        "{embedding: [0, 0], hidden: [0.25, 0.25], readout: [0, 1]}}",
    ),
    "Scaling.depth": (BASED, "model.scaling.depth=0.5"),
    "Scaling.zeros": "model.scaling.zeros=[query]",
    "Constants.embedding": "model.scaling.rate.embedding=2",
    "Constants.hidden": "model.scaling.multiplier.hidden=2",
    "Constants.readout": "model.scaling.deviation.readout=2",
    "Constants.router": (EXPERTS, "model.scaling.rate.router=2"),
    "Constants.vector": "model.scaling.rate.vector=2",
    "Alignment.alpha": (*MEASURED, f"{READOUT}.both=0.5", f"{READOUT}.alpha=0.6"),
    "Alignment.omega": (*MEASURED, "model.scaling.alignment.readout.omega=0.6"),
    "Alignment.both": (
        *MEASURED,
        "model.scaling.alignment.hidden.alpha=0.5",
        "model.scaling.alignment.hidden.both=0.6",
    ),
    "Training.schedule": f"{SCHEDULE}={{kind: linear}}",
    "Training.stages": "train.stages=[{begin: 1, length: 32}]",
    "LengthStage.begin": (STAGED, "train.stages.0.begin=2"),
    "LengthStage.length": (STAGED, "train.stages.0.length=64"),
    "Training.optimizer": LION,
    "Training.budget": BUDGET,
    "Budget.batch": (BUDGET, "train.budget.batch=128"),
    "Budget.tokens": (BUDGET, "train.budget.tokens=512"),
    "PowerLaw.exponent": (BUDGET.replace("sde", "power"), "train.budget.exponent=-1"),
    "HyperP.exponent": (BUDGET.replace("sde", "hyperp"), "train.budget.exponent=-1"),
    "Schedule.warmup": f"{SCHEDULE}.warmup=1",
    "Falling.final": f"{SCHEDULE}.final=0.5",
    "Prolongable.decay": (WSD, f"{SCHEDULE}.decay=0.5"),
    "Prolongable.shape": (WSD, f"{SCHEDULE}.decay=0.9", f"{SCHEDULE}.shape=linear"),
    "InverseSqrt.reference": (ROOT, f"{SCHEDULE}.reference=1"),
    "Power.amplitude": (POWER, f"{SCHEDULE}.amplitude=2"),
    "Power.exponent": (POWER, f"{SCHEDULE}.exponent=-0.6"),
    "Optimizer.weight_decay": f"{OPTIMIZER}.weight_decay=0",
    "Optimizer.decay": (
        BASED,
        f"{OPTIMIZER}.weight_decay=1",
        f"{OPTIMIZER}.decay=coupled",
    ),
    "AdamW.beta1": f"{OPTIMIZER}.beta1=0.5",
    "AdamW.beta2": f"{OPTIMIZER}.beta2=0.5",
    "AdamW.epsilon": f"{OPTIMIZER}.epsilon=0.1",
    "AdamW.epsilon_by": (BASED, f"{OPTIMIZER}.epsilon=0.1", f"{OPTIMIZER}.epsilon_by=layer"),
    "AdamAtan2.beta1": (ATAN2, f"{OPTIMIZER}.beta1=0.5"),
    "AdamAtan2.beta2": (ATAN2, f"{OPTIMIZER}.beta2=0.5"),
    "AdamAtan2.outer": (ATAN2, f"{OPTIMIZER}.outer=2"),
    "AdamAtan2.inner": (ATAN2, f"{OPTIMIZER}.inner=2"),
    "Lion.beta1": (LION, f"{OPTIMIZER}.beta1=0.1"),
    "Lion.beta2": (LION, f"{OPTIMIZER}.beta2=0.1"),
    "SGD.momentum": (SGD, f"{OPTIMIZER}.momentum=0.5"),
    "SGD.weight_decay": (SGD, f"{OPTIMIZER}.weight_decay=0.5"),
    "Adafactor.decay_rate": (ADAFACTOR, f"{OPTIMIZER}.decay_rate=0.3"),
    "Adafactor.clip_threshold": (ADAFACTOR, f"{OPTIMIZER}.clip_threshold=0.1"),
    "Adafactor.weight_decay": (ADAFACTOR, f"{OPTIMIZER}.weight_decay=0.5"),
    "Muon.momentum": (MUON, f"{OPTIMIZER}.momentum=0.5"),
    "Muon.iterations": (MUON, f"{OPTIMIZER}.iterations=2"),
    "Muon.rate": (MUON, f"{OPTIMIZER}.rate=0.5"),
    "Muon.beta1": (MUON, f"{OPTIMIZER}.beta1=0.5"),
    "Muon.beta2": (MUON, f"{OPTIMIZER}.beta2=0.5"),
    "Muon.epsilon": (MUON, f"{OPTIMIZER}.epsilon=0.1"),
    "Muon.epsilon_by": (
        *(BASED, MUON, f"{OPTIMIZER}.epsilon=0.1"),
        f"{OPTIMIZER}.epsilon_by=layer",
    ),
    "Hyperball.rate": (ADAMH, f"{OPTIMIZER}.rate=0.5"),
    "Hyperball.weight_decay": (ADAMH, f"{OPTIMIZER}.weight_decay=0.5"),
    "Compute.dtype": "train.compute.dtype=bfloat16",
    "Compute.operands": "train.compute.operands=bfloat16",
    # Kernels of other platforms can't be lowered for a CPU.
    "Compute.platform": ("train.compute.core=fused", "train.compute.platform=tpu"),
    "MeshShape.data": "mesh.data=2",
    "MeshShape.tensor": "mesh.tensor=2",
    "MeshShape.replica": "mesh.replica=2",
    "MeshShape.context": "mesh.context=2",
}
"""Fields that change the programs of training, or the numbers of its first four steps."""
NUMBERS = {"Data.path", "Data.packing", "Data.mixture", "MixturePart.path", "MixturePart.weight"}
NUMBERS |= {"Training.seed", "Training.stages", "LengthStage.begin", "LengthStage.length"}
"""The program is the same; a change in it would not be that of the field."""

LOOP = {
    "Training.log_every": "train.log_every=3",
    "Training.evaluate_every": "train.evaluate_every=2",
    "Training.validation_batches": "train.validation_batches=1",
    "Training.checkpoint_every": "train.checkpoint_every=3",
    "Training.keep_last": "train.keep_last=2",
    "Training.keep_best": "train.keep_best=4",
}
"""Fields that change the files of a run."""

SAME = {
    "Compute.unroll": "train.compute.unroll=false",
    "Compute.rematerialise": "train.compute.rematerialise=true",
    "Compute.fused": "train.compute.fused=false",
    "Compute.core": "train.compute.core=plain",
    "Compute.attention_chunk": "train.compute.attention_chunk=5",
    "Compute.loss_chunk": "train.compute.loss_chunk=5",
    "Training.accumulate": "train.accumulate=2",
}
"""Fields that change memory and time, but no numbers."""

REFUSED = {
    "LanguageModel.context": ("model.context=8", r"train\.length: got 16; at most model.context")
}

ELSEWHERE = {
    "Training.start": "weights of another model: tests/hub/test_convert.py",
    "Training.teacher": "another model: tests/runs/test_teacher.py",
    "Distillation.weight": "of a teacher: tests/train/test_distillation.py",
    "Distillation.temperature": "of a teacher: tests/train/test_distillation.py",
    "Training.profile": "writes a profile beside the run",
    "Training.trackers": "packages that are not installed here; unknown names: test_bad_input.py",
}


@cache
def walked() -> set[str]:
    """Return every field as "Class.field", by the class that declares it.

    Left out are `kind`, which only names the class, and fields of one class, whose own fields are
    collected.
    """
    found = set()
    for cls in classes():
        hints = get_type_hints(cls, include_extras=True)
        for field in fields(cls):
            hint = hints[field.name]
            several = get_args(hint) and get_origin(hint) is not Annotated
            chosen = len(inside(hint)) != 1 or several
            if chosen and not (field.name == "kind" and get_origin(hint) in (Literal, Annotated)):
                found.add(f"{declaring(cls, field.name)}.{field.name}")
    return found


def declaring(cls: type, field: str) -> str:
    """Return the name of the class that a field is inherited from."""
    return next(base.__name__ for base in cls.__mro__ if field in base.__annotations__)


def inside(hint: Any) -> list[type]:
    """Return the dataclasses in an annotation."""
    if isinstance(hint, type) and is_dataclass(hint):
        return [hint]
    if isinstance(hint, PartTable):
        return list(hint.values())
    if get_origin(hint) is Annotated:
        return [cls for part in hint.__metadata__ for cls in inside(part)]
    return [cls for part in get_args(hint) for cls in inside(part)]


def classes() -> set[type]:
    """Return all classes of a configuration."""
    found, waiting = set(), [Run]
    while waiting:
        cls = waiting.pop()
        found.add(cls)
        inner = {
            each
            for hint in get_type_hints(cls, include_extras=True).values()
            for each in inside(hint)
        }
        # The fields of tasks are tested in test_tasks.py.
        waiting += {cls for cls in inner - found if not issubclass(cls, Task)}
    return found


def test_every_field_is_in_one_table():
    tables = (CHANGES, LOOP, SAME, REFUSED, ELSEWHERE)
    assert sorted(name for table in tables for name in table) == sorted(walked())


@pytest.fixture(scope="module")
def load(token_file, tmp_path_factory):
    folder = tmp_path_factory.mktemp("other")
    (folder / "a.txt").write_text("Other text, of one document. " * 40)
    other = build_tokens([str(folder / "a.txt")], folder / "tokens").path

    def load(*overrides: str) -> Run:
        paths = {"{other}": str(other), "{own}": str(token_file)}
        given = [reduce(lambda t, p: t.replace(*p), paths.items(), text) for text in overrides]
        return config.load("tiny", [f"data.path={token_file}", *BASE, *given])

    return load


def batches_of(run: Run) -> Any:
    """Return the training batches of all stages."""
    feed, training = open_feed(run)[1], run.train
    sources = [feed.source("train", training.seed, *size) for size in training.sizes]
    return SimpleNamespace(at=lambda step: sources[training.stage_at(step)].at(step))


def programs(run: Run) -> Iterator[str]:
    """Lower the programs to validate, to draw weights, to apply a gradient and to make a step, on
    the mesh of the run; the cheapest come first."""
    trainer = Trainer(run.model, run.train, run.mesh.build())
    batch = jax.eval_shape(lambda: trainer.put(batches_of(run).at(0)))
    token_bytes = jax.ShapeDtypeStruct((run.model.vocab_size,), np.int32)
    state, frozen = trainer.abstract_state(), trainer.frozen
    draw = jax.jit(trainer.draw, out_shardings=trainer.shardings())
    optimize = jax.jit(trainer.optimizer.update)
    lowered = (
        partial(jax.jit(trainer.validation_sums).lower, state.weights, batch, token_bytes, frozen),
        partial(draw.lower, jax.random.key(0)),
        partial(optimize.lower, state.weights, state.optimizer, state.weights),
        partial(jax.jit(trainer.learning_rate).lower, state.step),
        partial(jax.jit(trainer.update).lower, state, 0, batch, frozen),
    )
    for lower in lowered:
        with jax.set_mesh(trainer.mesh):
            text = lower().as_text()
        yield text


class Programs:
    """The lowered programs of a run, each made at its first use."""

    def __init__(self, run: Run):
        self._made, self._rest = [], programs(run)

    def __iter__(self) -> Iterator[str]:
        for number in itertools.count():
            if number == len(self._made):
                following = next(self._rest, None)
                if following is None:
                    return
                self._made.append(following)
            yield self._made[number]


def trained(run: Run) -> tuple[list[float], dict[str, np.ndarray]]:
    """Return losses, norms and rates of four steps, and the weights after them."""
    trainer = Trainer(run.model, run.train, config.MeshShape().build())
    batches, (state, seen) = batches_of(run), (trainer.initial_state(), [])
    for step in range(4):
        state, metrics = trainer.step(state, step, trainer.put(batches.at(step)))
        seen += map(float, (metrics.loss, metrics.gradient_norm, metrics.learning_rate))
    return seen, {name: np.asarray(leaf) for name, leaf in named(state.weights).items()}


@pytest.fixture(scope="module")
def outcome(load):
    """Return a function that returns what four steps give, by overrides."""
    return cache(lambda *overrides: trained(load(*overrides)))


@pytest.fixture(scope="module")
def compiled(load):
    """Return a function that returns the programs, by overrides."""
    return cache(lambda *overrides: Programs(load(*overrides)))


def differ(one: Iterable[str], two: Iterable[str]) -> bool:
    """Return whether a program differs; those after it are not made."""
    return any(first != second for first, second in zip(one, two, strict=True))


@pytest.mark.product
def test_equal_runs_have_equal_programs(load):
    """Equal runs lower to equal programs; otherwise every field would seem to change them."""
    for overrides in ((CONCEPT, MUON), (ADAPTER,)):
        assert not differ(programs(load(*overrides)), programs(load(*overrides)))


@pytest.mark.parametrize("name", params(CHANGES, [*CHANGES][::5]))
def test_field_changes_a_program_or_a_number(compiled, outcome, name):
    """Each field changes a program or a number of training, and not only what `describe` shows."""
    change = CHANGES[name]
    *before, last = [change] if isinstance(change, str) else change
    if name not in NUMBERS and differ(compiled(*before, last), compiled(*before)):
        return
    (seen, weights), (base_seen, base_weights) = outcome(*before, last), outcome(*before)
    assert seen != base_seen
    assert any((leaf != base_weights[name]).any() for name, leaf in weights.items())


@pytest.mark.product
@pytest.mark.parametrize("name", params(SAME, [*SAME][::3]))
def test_field_changes_no_number(load, outcome, name):
    run = load(SAME[name])
    assert run != load()
    np.testing.assert_allclose(outcome(SAME[name])[0], outcome()[0], rtol=1e-4)


@pytest.mark.parametrize("name", REFUSED)
def test_field_is_refused(load, name):
    override, message = REFUSED[name]
    with pytest.raises(BadInput, match=message):
        load(override)


OFTEN = (
    "batch=2",
    "length=8",
    "log_every=1",
    "evaluate_every=1",
    "validation_batches=9",
    "checkpoint_every=1",
    "keep_last=3",
    "keep_best=0",
)


@pytest.fixture(scope="module")
def written(load, tmp_path_factory):
    """Return a function that returns which numbers are logged at which steps, the validation
    losses, and which steps are kept."""

    @cache
    def run(*overrides: str) -> Any:
        folder = tmp_path_factory.mktemp("run") / "run"
        often = [f"train.{text}" for text in (*OFTEN, "batch=2", "length=8")]
        train_run(load(*often, "train.validation_batches=9", *overrides), RunDirectory(folder))
        lines = map(json.loads, Path(folder / "metrics.jsonl").read_text().splitlines())
        logged = [(line["step"], sorted(line), line.get("validation_loss")) for line in lines]
        return logged, sorted(path.name for path in (folder / "checkpoints").iterdir())

    return run


@pytest.mark.product
@pytest.mark.parametrize("name", params(LOOP, [*LOOP][::3]))
def test_field_changes_the_files_of_a_run(written, name):
    assert written(LOOP[name]) != written()
