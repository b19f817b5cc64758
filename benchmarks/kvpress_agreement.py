"""Compare which positions mukv and kvpress keep after a prefill, with the same Llama weights.

Run: python benchmarks/kvpress_agreement.py --peers PYTHON [--model DIR --text FILE]
    [--length 256] [--ratios 0.5,0.75] [--policies snapkv+critical,...]

PYTHON belongs to an environment with `torch`, `transformers<5.3` and `kvpress`. It makes a small
Llama of random weights, saves it, and compresses a prompt of random tokens; with --model it reads a
Hugging Face folder, and the beginning of a text. mukv imports the same folder and prefills the same
prompt under the policies of the same names, with kvpress' defaults. SnapKV has 16 queries in both.
Prints the number of positions that both keep, and of the heads that keep the same ones.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

PEER = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers import LlamaConfig, LlamaForCausalLM, DynamicCache
import kvpress
folder, length, ratios, text, names = sys.argv[1], *map(json.loads, sys.argv[2:])
window = 16
torch.manual_seed(0)
if text is None:
    config = LlamaConfig(vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=3,
        num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=4096,
        initializer_range=0.25, tie_word_embeddings=False)
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(folder)
    ids = torch.randint(0, 128, (1, length))
else:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt").input_ids[:, :length]
critical, snap = kvpress.CriticalKVPress, lambda r: kvpress.SnapKVPress(r, window_size=window)
presses = {
    "streaming": kvpress.StreamingLLMPress, "knorm": kvpress.KnormPress,
    "snapkv(window=16)": snap, "tova": kvpress.TOVAPress, "keydiff": kvpress.KeyDiffPress,
    "expected": kvpress.ExpectedAttentionPress,
    "expected(epsilon=0.01)": lambda r: kvpress.ExpectedAttentionPress(r, epsilon=0.01),
    "lagkv(lag=32)": lambda r: kvpress.LagKVPress(r, lag_size=32), "cur": kvpress.CURPress,
    "snapkv(window=16)+critical": lambda r: critical(snap(r)),
    "expected(vnorm=false)+critical":
        lambda r: critical(kvpress.ExpectedAttentionPress(r, use_vnorm=False)),
    "snapkv(window=16)+pyramid": lambda r: kvpress.PyramidKVPress(r, window_size=window),
    "snapkv(window=16)+adaptive": lambda r: kvpress.AdaKVPress(snap(r)),
    "expected(epsilon=0.01)+adaptive":
        lambda r: kvpress.AdaKVPress(kvpress.ExpectedAttentionPress(r, epsilon=0.01)),
    "snapkv(window=16)+critical+adaptive": lambda r: kvpress.CriticalAdaKVPress(snap(r)),
}
found = {}
for name, make in presses.items():
    if names and name.replace("(window=16)", "") not in names:
        continue
    for ratio in ratios:
        press = make(ratio)
        kept, whole = [], press.compress
        def compress(module, hidden, keys, values, attentions, kwargs):
            # An entry is found again by its key.
            left = torch.ones(keys.shape[:3], dtype=torch.bool)
            result = whole(module, hidden, keys, values, attentions, kwargs)
            if getattr(module, "masked_key_indices", None) is not None:
                left[module.masked_key_indices] = False
            else:
                same = (keys[:, :, :, None] == result[0][:, :, None]).all(-1)
                left = same.any(-1)
            kept.append([row.nonzero()[:, 0].tolist() for row in left[0]])
            return result
        press.compress = compress
        with torch.no_grad(), press(model):
            model(ids, past_key_values=DynamicCache())
        found[f"{name} {ratio}"] = kept
        for layer in model.model.layers:
            layer.self_attn.masked_key_indices = None
json.dump({"ids": ids[0].tolist(), "kept": found}, sys.stdout)
"""


def ours(folder: Path, ids: list[int], name: str, ratio: float) -> list[list[list[int]]]:
    """Return the kept positions by layer and KV head."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    import mukv
    from mukv.cache import Policy

    model = mukv.load(folder)
    given = "+".join(f"kvpress:{word}" for word in name.split("+"))
    decoder, policy = model.network, Policy.parse(given, round(1 - ratio, 6))
    cache = decoder.empty_cache(1, len(ids), 8, jnp.dtype("float32"), policy)
    prompt, count = jnp.asarray([ids]), jnp.asarray([len(ids)])
    _, cache = jax.jit(decoder.prefill)(model.decoding, cache, prompt, count)
    shelves = [slot.body.shelf for slot in cache.slots]
    return [
        [np.sort(position[there & (position >= 0)]).tolist() for position, there in heads]
        for heads in map(_by_head, shelves)
    ]


def _by_head(shelf: Any) -> list[tuple[Any, Any]]:
    """Return the positions of the slots of each KV head, and which of them it owns."""
    import numpy as np

    there = np.asarray(shelf.there())[0]
    position = np.broadcast_to(np.asarray(shelf.position)[0], there.shape)
    return list(zip(position, there, strict=True))


def main() -> int:
    options = argparse.ArgumentParser(description="Agreement with kvpress")
    options.add_argument("--peers", required=True, help="Python of an environment with kvpress")
    options.add_argument("--length", type=int, default=256)
    options.add_argument("--ratios", default="0.5,0.75")
    options.add_argument(
        "--model", type=Path, help="Hugging Face folder; random weights if left out"
    )
    options.add_argument("--text", type=Path, help="text for --model")
    options.add_argument("--policies", help="names with commas between them; all if left out")
    options.add_argument("--out", type=Path)
    chosen = options.parse_args()
    ratios = [float(part) for part in chosen.ratios.split(",")]
    rows: list[dict[str, Any]] = []
    from mukv.cache.words import split

    with tempfile.TemporaryDirectory() as folder:
        text = chosen.text.read_text("utf-8")[: 20 * chosen.length] if chosen.model else None
        names = split(chosen.policies, ",") if chosen.policies else None
        folder = str(chosen.model or folder)
        request = [folder, *map(json.dumps, (chosen.length, ratios, text, names))]
        done = subprocess.run(
            [chosen.peers, "-c", PEER, *request], capture_output=True, text=True, check=False
        )
        if done.returncode:
            sys.stderr.write(done.stderr)
            return 1
        peer = json.loads(done.stdout)
        for key, theirs in peer["kept"].items():
            name, ratio = key.split()
            mine = ours(Path(folder), peer["ids"], name, float(ratio))
            pairs = [
                (set(a), set(b))
                for layers in zip(mine, theirs, strict=True)
                for a, b in zip(*layers, strict=True)
            ]
            rows.append(
                {
                    "policy": name,
                    "ratio": float(ratio),
                    "kept": sum(len(b) for _, b in pairs),
                    "shared": sum(len(a & b) for a, b in pairs),
                    "heads": len(pairs),
                    "heads_equal": sum(a == b for a, b in pairs),
                }
            )
            print(json.dumps(rows[-1]))
    if chosen.out:
        chosen.out.write_text(json.dumps(rows, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
