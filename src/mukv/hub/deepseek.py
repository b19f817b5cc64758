"""DeepSeek-V3 and R1 (DeepSeek-AI 2024, 2025), Kimi K2 and Moonlight (Moonshot AI 2025).

Latent attention in all layers; a gated MLP in the first layers, and in the others experts that are
chosen from groups by sigmoid scores and a choice bias. The latent and the rotated key of a token
are one tensor, and so are the keys and values that each head makes of the latent. Files whose
weights are quantised to FP8 are refused; layers that predict further tokens are not read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from mukv.attention import Attention, Latent
from mukv.core.errors import BadInput
from mukv.core.norm import RMSNorm
from mukv.hub.base import Rule, TensorRows, blocks
from mukv.hub.family import MOST_HEADS, Family, differences
from mukv.hub.feedforward import WRITTEN, FeedforwardKeys, alike, chosen, require
from mukv.hub.llama import ENDS, LAYER
from mukv.hub.qwen import EXPERTS
from mukv.hub.rotation import read_rope, rope_settings, write_rope, write_scaling
from mukv.hub.settings import ACTIVATIONS, SMALLEST_NUMBER, Given
from mukv.model import Decoder
from mukv.model.block import Feedforward, Gated, PreNorm
from mukv.model.experts import MOST_EXPERTS, Experts
from mukv.position import RoPE, YaRN

LATENT_NORM = RMSNorm()
"""Norm of the latents, whose epsilon does not follow `rms_norm_eps`."""
MOST_FURTHER = 8
"""Layers after the last one that a file may have; published ones have one."""


def from_residual(number: int) -> Callable[[Latent], TensorRows]:
    """Return the rows of the latent (0) or of the rotated key (1) in the tensor that has both."""
    return lambda latent: blocks((latent.rank, latent.rope_dim), number, 1)


def from_latent(number: int) -> Callable[[Latent], TensorRows]:
    """Return the rows of keys (0) or values (1) in the tensor that has both for each head."""
    return lambda latent: blocks((latent.head_dim, latent.value_dim), number, latent.heads)


ATTENTION, MLP = f"{LAYER}.self_attn", f"{LAYER}.mlp"
DOWN, UP = f"{ATTENTION}.kv_a_proj_with_mqa.weight", f"{ATTENTION}.kv_b_proj.weight"
RULES = (
    *ENDS,
    Rule(f"{ATTENTION}.q_proj.weight", "read.query", "(heads query_dim) embed"),
    Rule(f"{ATTENTION}.q_a_proj.weight", "read.query_latent", "query_latent embed"),
    Rule(f"{ATTENTION}.q_a_layernorm.weight", "read.query_norm.gain", "query_latent"),
    Rule(f"{ATTENTION}.q_b_proj.weight", "read.query", "(heads query_dim) query_latent"),
    Rule(DOWN, "write.latent", "latent embed", rows=from_residual(0)),
    Rule(DOWN, "write.key", "rope_dim embed", rows=from_residual(1)),
    Rule(f"{ATTENTION}.kv_a_layernorm.weight", "write.norm.gain", "latent"),
    Rule(UP, "read.key_up", "(heads head_dim) latent", rows=from_latent(0)),
    Rule(UP, "read.value_up", "(heads value_dim) latent", rows=from_latent(1)),
    Rule(f"{ATTENTION}.o_proj.weight", "read.output", "embed (heads value_dim)"),
    *EXPERTS,
    Rule(f"{MLP}.gate.e_score_correction_bias", "mlp.choice_bias", "experts"),
    Rule(f"{MLP}.shared_experts.gate_proj.weight", "mlp.shared.gate", "shared_hidden embed"),
    Rule(f"{MLP}.shared_experts.up_proj.weight", "mlp.shared.up", "shared_hidden embed"),
    Rule(f"{MLP}.shared_experts.down_proj.weight", "mlp.shared.down", "embed shared_hidden"),
    Rule(f"{LAYER}.input_layernorm.weight", "attention_norm.gain", "embed"),
    Rule(f"{LAYER}.post_attention_layernorm.weight", "mlp_norm.gain", "embed"),
    Rule("model.norm.weight", "final_norm.gain", "embed"),
)
DEFAULTS = {
    "vocab_size": 129_280,
    "hidden_size": 7168,
    "intermediate_size": 18_432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "n_shared_experts": 1,
    "n_routed_experts": 256,
    "routed_scaling_factor": 2.5,
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "qk_nope_head_dim": 128,
    "n_group": 8,
    "topk_group": 4,
    "num_experts_per_tok": 8,
    "first_k_dense_replace": 3,
    "norm_topk_prob": True,
    "hidden_act": "silu",
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "pad_token_id": None,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "tie_word_embeddings": False,
    "rope_interleave": True,
    "rope_theta": 10_000.0,
}


@dataclass(frozen=True)
class GroupedExperts(FeedforwardKeys):
    """A gated MLP in the first `first_k_dense_replace` layers, and the same experts in the others,
    chosen by sigmoid scores and a choice bias (DeepSeek-V3).

    other_count: another key of the number of experts, which transformers reads first
    """

    other_count: str = "num_local_experts"

    def read(self, given: Given, layers: int) -> Sequence[Feedforward]:
        given.require("moe_layer_freq", 1)
        dense = min(given.whole("first_k_dense_replace", low=0), layers)
        first = [self.gated(given)] * dense if dense else []
        return first if dense == layers else [*first, *[self.experts(given)] * (layers - dense)]

    def experts(self, given: Given) -> Experts:
        """Read the experts."""
        other = self.other_count
        count = chosen(given, other if other in given.mapping else "n_routed_experts")
        return Experts(
            **count,
            **self.routing(given, **count),
            hidden=given.whole("moe_intermediate_size"),
            shared=given.whole("n_shared_experts", high=MOST_EXPERTS),
            activation=given.one_of(self.activation, ACTIVATIONS),
            scale=given.number("routed_scaling_factor"),
        )

    def routing(self, given: Given, experts: int, top_k: int) -> dict[str, Any]:
        """Read how the router chooses `top_k` of the experts for a token."""
        given.require("scoring_func", "sigmoid")
        given.require("topk_method", "noaux_tc")
        normalise = given.flag("norm_topk_prob")
        if normalise and top_k == 1:
            allowed = "false with num_experts_per_tok 1, whose only weight would always be one"
            raise BadInput(f"{given.where}: norm_topk_prob", True, allowed)
        groups = read_groups(given, experts, top_k, 2)
        return {"router": "sigmoid", "normalise": normalise, "choice_bias": True, **groups}

    def check(self, part: Experts) -> None:
        """Raise BadInput for experts that a router of this family does not choose."""
        require(part, router="sigmoid", choice_bias=True, **free(part))

    def keys_of_routing(self, part: Experts) -> dict[str, Any]:
        """Return the keys of the router."""
        keys = {"n_group": part.groups, "topk_group": part.top_groups}
        return {"norm_topk_prob": part.normalise, **keys}

    def write(self, parts: Sequence[Feedforward]) -> dict[str, Any]:
        dense = [part for part in parts if isinstance(part, Gated)]
        keys: dict[str, Any] = {"first_k_dense_replace": len(dense)}
        if dense:
            keys |= self.keys_of_gated(alike(dense, Gated))
        if len(dense) == len(parts):
            return keys
        part = alike(parts[len(dense) :], Experts)
        self.check(part)
        if not part.shared:
            raise BadInput("mlp.shared", part.shared, "at least 1")
        written = WRITTEN[part.activation]
        if keys.setdefault(self.activation, written) != written:
            raise BadInput("plan: mlp.activation", part.activation, "one in all layers")
        return keys | {
            "n_routed_experts": part.experts,
            "num_experts_per_tok": part.top_k,
            "moe_intermediate_size": part.hidden,
            "n_shared_experts": part.shared,
            "routed_scaling_factor": part.scale,
            **self.keys_of_routing(part),
        }


def free(part: Experts) -> dict[str, Any]:
    """Return the values that `require` is given for fields of the experts: those that a config.json
    expresses are allowed as they are, the others are at their defaults."""
    expressed = ("scale", "groups", "top_groups")
    plain = {"limit": None, "up_offset": 0.0, "biases": False, "shared_gate": False}
    return plain | {name: getattr(part, name) for name in expressed}


def read_groups(given: Given, experts: int, top_k: int, best: int) -> dict[str, int]:
    """Read the groups of the experts, whose `best` best scores are summed to compare them."""
    groups = given.whole("n_group", high=MOST_EXPERTS)
    size, rest = divmod(experts, groups)
    if rest or size < best:
        allowed = f"a number that divides n_routed_experts ({experts}) into groups of at least"
        raise BadInput(f"{given.where}: n_group", groups, f"{allowed} {best}")
    top_groups = given.whole("topk_group", high=groups)
    if top_k > top_groups * size:
        allowed = f"at least {-(-top_k // size)}: {top_k} experts per token in groups of {size}"
        raise BadInput(f"{given.where}: topk_group", top_groups, allowed)
    return {"groups": groups, "top_groups": top_groups, "group_best": best}


def read_tempered(
    given: Given, query_dim: int, pairing: Literal["half", "interleaved"]
) -> tuple[RoPE, float | None]:
    """Read the rotation, and the scale of the logits; None for 1 / sqrt(query_dim).

    pairing: of the rotation

    A scaled rotation with `mscale_all_dim` multiplies all logits by (0.1 mscale_all_dim ln(factor)
    + 1)^2. With `mscale_all_dim` 1, and rotated parts that are not multiplied, as in DeepSeek-V3,
    this is YaRN's temperature "logits".
    """
    position = replace(read_rope(given), pairing=pairing)
    settings = rope_settings(given)
    scaling = position.scaling
    if scaling is None or not settings.mapping.get("mscale_all_dim"):
        return position, None
    times = settings.number("mscale_all_dim")
    factor = scaling.factor if isinstance(scaling, YaRN) else settings.number("factor")
    unrotated = isinstance(scaling, YaRN) and (scaling.temperature == "none" or factor == 1)
    if unrotated and times == 1:
        return replace(position, scaling=replace(scaling, temperature="logits")), None
    return position, query_dim**-0.5 * (0.1 * times * math.log(factor) + 1) ** 2


def times_of(attention: Latent) -> float | None:
    """Return the `mscale_all_dim` of this attention, with which all its logits are multiplied by
    (0.1 mscale_all_dim ln(factor) + 1)^2; None if their scale is not of this form."""
    place = attention.position
    scaling = place.scaling if isinstance(place, RoPE) else None
    if not isinstance(scaling, YaRN) or scaling.factor == 1 or attention.scale is None:
        return None
    if scaling.temperature != "none":
        return None
    times = (attention.scale * attention.query_dim**0.5) ** 0.5 - 1
    # Digits that are rounding errors of the inverse are dropped.
    times = float(f"{times / (0.1 * math.log(scaling.factor)):.12g}")
    return times if times > SMALLEST_NUMBER else None


def write_tempered(attention: Latent) -> dict[str, Any]:
    """Return the keys of the rotation and of the scale of the logits."""
    position, times = attention.position, times_of(attention)
    assert isinstance(position, RoPE)
    scaling = position.scaling
    if isinstance(scaling, YaRN) and scaling.temperature == "logits":
        position, times = replace(position, scaling=replace(scaling, temperature="none")), 1.0
    keys = write_rope(position)
    if times is None:
        return keys
    keys["rope_scaling"].pop("attention_factor")
    tempered = {"mscale": times, "mscale_all_dim": times}
    return keys | {"rope_scaling": {**keys["rope_scaling"], **tempered}}


@dataclass(frozen=True)
class LatentFamily(Family):
    """A family whose layers have latent attention."""

    def ignored(self, model: Decoder) -> str:
        further = "|".join(str(len(model.layers) + number) for number in range(MOST_FURTHER))
        return rf"^model\.layers\.({further})\."

    def read_attention(self, given: Given, width: int) -> Attention:
        given.require("attention_bias", False)
        heads = given.whole("num_attention_heads", high=MOST_HEADS)
        key_heads = given.whole("num_key_value_heads", null=True) or heads
        if key_heads != heads:
            allowed = f"num_attention_heads ({heads}), since all heads read one latent"
            raise BadInput(f"{given.where}: num_key_value_heads", key_heads, allowed)
        rotated = given.whole("qk_rope_head_dim", high=MOST_HEADS)
        if rotated % 2:
            raise BadInput(f"{given.where}: qk_rope_head_dim", rotated, "an even number")
        if given.whole("head_dim", rotated) != rotated:
            allowed = f"qk_rope_head_dim ({rotated}), or left out"
            raise BadInput(f"{given.where}: head_dim", given.mapping["head_dim"], allowed)
        still = given.whole("qk_nope_head_dim", high=MOST_HEADS)
        pairing = self.pairing
        if self.pairing_key:
            pairing = "interleaved" if given.flag(self.pairing_key) else "half"
        position, scale = read_tempered(given, still + rotated, pairing)
        return Latent(
            position=position,
            heads=heads,
            scale=scale,
            rank=given.whole("kv_lora_rank", high=MOST_HEADS),
            head_dim=still,
            rope_dim=rotated,
            head_value_dim=given.whole("v_head_dim", high=MOST_HEADS),
            query_rank=given.whole("q_lora_rank", high=MOST_HEADS, null=True),
            norm=LATENT_NORM,
        )

    def written_scale(self, attention: Attention) -> float | None:
        tempered = isinstance(attention, Latent) and times_of(attention)
        return attention.scale if tempered else None

    def misfits(self, model: Decoder) -> Iterator[BadInput]:
        first = model.layers[0].attention
        if not isinstance(first, Latent):
            yield BadInput("attention.kind", getattr(first, "kind", "?"), "latent")
            return
        place = first.position
        if not isinstance(place, RoPE):
            yield BadInput("attention.position.kind", place.kind, "rope")
            return
        try:
            self.feedforward.write([layer.mlp for layer in model.layers])
            self.windows.write([layer.window for layer in model.layers])
            if not isinstance(place.scaling, YaRN):
                write_scaling(place.scaling)
        except BadInput as error:
            yield error
        wanted: dict[str, tuple[Any, ...]] = {
            "plan: reads": (any(layer.reads is not None for layer in model.layers), False),
            "plan: attention": ({layer.attention for layer in model.layers}, {first}),
            "attention.position.p": (place.p, 1),
            "attention.position.partial": (place.partial, 1),
            "attention.rope_parts": (first.rope_parts, 1),
            "attention.norm": (first.norm, LATENT_NORM),
            "attention.indexer": (first.indexer, None),
            "attention.softcap": (first.softcap, None),
            "attention.sinks": (first.sinks, None),
            "attention.gate": (first.gate, None),
            "norm.centred": (model.norm.centred, False),
            "norm.stored": (model.norm.stored, self.norm),
            "positions": (model.positions, None),
            "layer_inputs": (model.layer_inputs, None),
            "residual.layer_scale": (model.residual.layer_scale, False),
            "residual.kind": (model.residual.kind, PreNorm().kind),
            "embedding_scale": (model.embedding_scale, None),
            "logit_softcap": (model.logit_softcap, None),
        }
        yield from differences(wanted)

    def write(self, model: Decoder, context: int) -> dict[str, Any]:
        attention = model.layers[0].attention
        assert isinstance(attention, Latent)
        assert isinstance(attention.position, RoPE)
        pairing = {}
        if self.pairing_key:
            pairing[self.pairing_key] = attention.position.pairing == "interleaved"
        return {
            **self.common_keys(model, context),
            "num_attention_heads": attention.heads,
            "num_key_value_heads": attention.heads,
            "kv_lora_rank": attention.rank,
            "q_lora_rank": attention.query_rank,
            "qk_nope_head_dim": attention.head_dim,
            "qk_rope_head_dim": attention.rope_dim,
            "v_head_dim": attention.value_dim,
            "attention_bias": False,
            "num_nextn_predict_layers": 0,
            **self.feedforward.write([layer.mlp for layer in model.layers]),
            **pairing,
            **write_tempered(attention),
        }


DEEPSEEK3 = LatentFamily(
    "DeepseekV3ForCausalLM",
    "deepseek_v3",
    RULES,
    DEFAULTS,
    feedforward=GroupedExperts(),
    other_types=("kimi_k2",),
    pairing_key="rope_interleave",
)
