"""Gemma 2 and the text model of Gemma 3 (Gemma Team 2024, 2025): norms before and after each
branch, gains stored as offsets from one, scaled embeddings, local and global layers. Gemma 3
norms queries and keys in place of capping logits, and rotates local layers faster.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mukv.core.errors import BadInput
from mukv.hub.base import Rule
from mukv.hub.family import Family, WindowKeys, Windows
from mukv.hub.llama import BRANCHES, ENDS, LAYER
from mukv.hub.settings import Given, read_rope
from mukv.model.block import SandwichNorm
from mukv.position import RoPE

UNUSED = 4096
LOCAL, GLOBAL = "sliding_attention", "full_attention"
RULES = (
    *ENDS,
    *BRANCHES,
    Rule(f"{LAYER}.input_layernorm.weight", "attention_norm.offset", "embed"),
    Rule(f"{LAYER}.post_attention_layernorm.weight", "attention_post_norm.offset", "embed"),
    Rule(f"{LAYER}.pre_feedforward_layernorm.weight", "mlp_norm.offset", "embed"),
    Rule(f"{LAYER}.post_feedforward_layernorm.weight", "mlp_post_norm.offset", "embed"),
    Rule(f"{LAYER}.self_attn.q_norm.weight", "read.query_norm.offset", "head_dim"),
    Rule(f"{LAYER}.self_attn.k_norm.weight", "write.key_norm.offset", "head_dim"),
    Rule("model.norm.weight", "final_norm.offset", "embed"),
)


@dataclass(frozen=True)
class ByType(WindowKeys):
    """`layer_types` names the layers that have a window; all windows are equally wide."""

    def default(self, given: Given, layers: int) -> list[bool]:
        """Which layers have one where there are no types."""
        raise NotImplementedError

    def read(self, given: Given, layers: int) -> Windows:
        types = given.get("layer_types", list, None)
        if types is None:
            local = self.default(given, layers)
        elif len(types) != layers or not set(types) <= {LOCAL, GLOBAL}:
            allowed = f"{layers} words, each {LOCAL} or {GLOBAL}"
            raise BadInput(f"{given.where}: layer_types", types, allowed)
        else:
            local = [word == LOCAL for word in types]
        window = given.get("sliding_window", int) if any(local) else None
        return [window if here else None for here in local]

    def write(self, windows: Windows) -> dict[str, Any]:
        sizes = {window for window in windows if window}
        if len(sizes) > 1:
            raise BadInput("plan: window", sorted(sizes), "one size")
        return {
            "sliding_window": min(sizes, default=None),
            "layer_types": [LOCAL if window else GLOBAL for window in windows],
        }


@dataclass(frozen=True)
class EveryNthGlobal(ByType):
    """Without types, the last of each `period` layers sees all."""

    period: int

    def default(self, given: Given, layers: int) -> list[bool]:
        period = given.get("sliding_window_pattern", int, self.period)
        return [(layer + 1) % period != 0 for layer in range(layers)]

    def write(self, windows: Windows) -> dict[str, Any]:
        said = super().write(windows)
        # transformers wants a size even where no layer has a window.
        return said if any(windows) else said | {"sliding_window": UNUSED}


def global_rope(given: Given) -> RoPE:
    return read_rope(Given({"rope_theta": 1_000_000.0, **given.mapping}, given.where), GLOBAL)


def local_rope(given: Given) -> RoPE:
    if given.mapping.get("rope_parameters"):
        only = {"rope_parameters": given.mapping["rope_parameters"]}
        return read_rope(Given(only, given.where), LOCAL)
    return RoPE(base=given.get("rope_local_base_freq", float, 10_000.0))


def write_local(position: RoPE) -> dict[str, Any]:
    return {"rope_local_base_freq": position.base}


GEMMA2 = Family(
    "Gemma2ForCausalLM",
    "gemma2",
    RULES,
    norm="offset",
    residual=SandwichNorm(),
    embedding_scale="root_width",
    activation="hidden_activation",
    query_scale="query_pre_attn_scalar",
    attention_softcap="attn_logit_softcapping",
    logit_softcap="final_logit_softcapping",
    windows=EveryNthGlobal(2),
)
GEMMA3 = Family(
    "Gemma3ForCausalLM",
    "gemma3_text",
    RULES,
    norm="offset",
    residual=SandwichNorm(),
    embedding_scale="root_width",
    activation="hidden_activation",
    query_norm=True,
    query_scale="query_pre_attn_scalar",
    logit_softcap="final_logit_softcapping",
    windows=EveryNthGlobal(6),
    position=global_rope,
    local=local_rope,
    write_local=write_local,
)
