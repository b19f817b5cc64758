"""Convert models from and to Hugging Face's format. To add a family, write a file with its data and
add a line to FAMILIES.
"""

from mukv.hub.deepseek import DEEPSEEK3
from mukv.hub.deepseek_v2 import DEEPSEEK2
from mukv.hub.family import Family
from mukv.hub.gemma import GEMMA2, GEMMA3
from mukv.hub.gemma4 import GEMMA4
from mukv.hub.gpt2 import GPT2
from mukv.hub.gpt_oss import GPT_OSS
from mukv.hub.llama import LLAMA
from mukv.hub.mistral import MISTRAL
from mukv.hub.olmo import OLMO2, OLMO3
from mukv.hub.qwen import QWEN2, QWEN3, QWEN3_MOE
from mukv.hub.qwen_next import QWEN3_NEXT

FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": LLAMA,
    "MistralForCausalLM": MISTRAL,
    "Qwen2ForCausalLM": QWEN2,
    "Qwen3ForCausalLM": QWEN3,
    "Qwen3MoeForCausalLM": QWEN3_MOE,
    "Qwen3NextForCausalLM": QWEN3_NEXT,
    "Gemma2ForCausalLM": GEMMA2,
    "Gemma3ForCausalLM": GEMMA3,
    "Gemma4ForCausalLM": GEMMA4,
    "Olmo2ForCausalLM": OLMO2,
    "Olmo3ForCausalLM": OLMO3,
    "GPT2LMHeadModel": GPT2,
    "GptOssForCausalLM": GPT_OSS,
    "DeepseekV3ForCausalLM": DEEPSEEK3,
    "DeepseekV2ForCausalLM": DEEPSEEK2,
}
"""Families by `architectures[0]` of a config.json. A model that several families can express is
exported as the first of them.
"""

__all__ = ["FAMILIES", "Family"]
