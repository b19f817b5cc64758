"""Convert models from and to Hugging Face's format. To add a family, write a file with its data and
add a line to FAMILIES.
"""

from mukv.hub.family import Family
from mukv.hub.gemma import GEMMA2, GEMMA3
from mukv.hub.gpt2 import GPT2
from mukv.hub.gpt_oss import GPT_OSS
from mukv.hub.llama import LLAMA
from mukv.hub.mistral import MISTRAL
from mukv.hub.olmo import OLMO2, OLMO3
from mukv.hub.qwen import QWEN2, QWEN3

FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": LLAMA,
    "MistralForCausalLM": MISTRAL,
    "Qwen2ForCausalLM": QWEN2,
    "Qwen3ForCausalLM": QWEN3,
    "Gemma2ForCausalLM": GEMMA2,
    "Gemma3ForCausalLM": GEMMA3,
    "Olmo2ForCausalLM": OLMO2,
    "Olmo3ForCausalLM": OLMO3,
    "GPT2LMHeadModel": GPT2,
    "GptOssForCausalLM": GPT_OSS,
}
"""Families by `architectures[0]` of a config.json. A model that several families can express is
exported as the first of them.
"""

__all__ = ["FAMILIES", "Family"]
