"""Compare which positions mukv and kvpress keep after a prefill, with the same Llama weights.

Run: python benchmarks/kvpress_agreement.py --peers PYTHON [--length 256] [--ratios 0.5,0.75]

PYTHON belongs to an environment with `torch`, `transformers<5.3` and `kvpress`. It makes a small
Llama of random weights, saves it, and compresses a prompt of random tokens. mukv imports the same
folder and prefills the same prompt. Prints the positions that both keep, and the heads that keep
the same ones, or the same except for the last token, which mukv always keeps.
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
from transformers import LlamaConfig, LlamaForCausalLM, DynamicCache
import kvpress
folder, length, ratios, window = sys.argv[1], *map(json.loads, sys.argv[2:])
torch.manual_seed(0)
config = LlamaConfig(vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=3,
    num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=4096,
    initializer_range=0.25, tie_word_embeddings=False)
model = LlamaForCausalLM(config).eval()
model.save_pretrained(folder)
ids = torch.randint(0, 128, (1, length))
presses = {
    "streaming": kvpress.StreamingLLMPress, "knorm": kvpress.KnormPress,
    "snapkv": lambda r: kvpress.SnapKVPress(r, window_size=window), "tova": kvpress.TOVAPress,
    "expected": kvpress.ExpectedAttentionPress, "keydiff": kvpress.KeyDiffPress,
}
found = {}
for name, press in presses.items():
    for ratio in ratios:
        made = press(ratio)
        kept, inner = [], made.score
        def score(module, *rest, **named):
            scores = inner(module, *rest, **named)
            number = int(scores.shape[-1] * (1 - ratio))
            kept.append(scores[0].topk(number, dim=-1).indices.sort(-1).values.tolist())
            return scores
        made.score = score
        with torch.no_grad(), made(model):
            model(ids, past_key_values=DynamicCache())
        found[f"{name} {ratio}"] = kept
json.dump({"ids": ids[0].tolist(), "kept": found}, sys.stdout)
"""
WINDOW = 16
"""Queries that SnapKV uses, in both."""


def ours(folder: Path, ids: list[int], name: str, ratio: float) -> list[list[list[int]]]:
    """Return the kept positions by layer and KV head."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    import mukv
    from mukv.cache import Policy

    model = mukv.load(folder)
    given = f"kvpress:{name}(window={WINDOW})" if name == "snapkv" else f"kvpress:{name}"
    decoder, policy = model.network, Policy.parse(given, round(1 - ratio, 6))
    cache = decoder.empty_cache(1, len(ids), 8, jnp.dtype("float32"), policy)
    prompt, count = jnp.asarray([ids]), jnp.asarray([len(ids)])
    _, cache = jax.jit(decoder.prefill)(model.decoding, cache, prompt, count)
    held = [np.asarray(slot.body.shelf.position)[0].tolist() for slot in cache.slots]
    return [[[place for place in head if place >= 0] for head in layer] for layer in held]


def main() -> int:
    options = argparse.ArgumentParser(description="Agreement with kvpress")
    options.add_argument("--peers", required=True, help="Python of an environment with kvpress")
    options.add_argument("--length", type=int, default=256)
    options.add_argument("--ratios", default="0.5,0.75")
    options.add_argument("--out", type=Path)
    chosen = options.parse_args()
    ratios = [float(part) for part in chosen.ratios.split(",")]
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        request = [folder, str(chosen.length), json.dumps(ratios), str(WINDOW)]
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
            last = chosen.length - 1
            rows.append(
                {
                    "policy": name,
                    "ratio": float(ratio),
                    "kept": sum(len(b) for _, b in pairs),
                    "shared": sum(len(a & b) for a, b in pairs),
                    "heads": len(pairs),
                    "heads_equal": sum(a == b for a, b in pairs),
                    # The only difference is that the last token replaced the one with the lowest
                    # score.
                    "heads_equal_but_last": sum(
                        len(a) == len(b) and len(b - a) <= (last not in b) for a, b in pairs
                    ),
                }
            )
            print(json.dumps(rows[-1]))
    if chosen.out:
        chosen.out.write_text(json.dumps(rows, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
