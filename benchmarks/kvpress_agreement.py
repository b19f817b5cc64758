"""Compare which positions mukv and kvpress keep after a prefill, with the same Llama weights.

Run: python benchmarks/kvpress_agreement.py --peers PYTHON [--model DIR --text FILE]
    [--length 256] [--ratios 0.5,0.75] [--policies snapkv+critical,...]

PYTHON belongs to an environment with `torch`, `transformers<5.3` and `kvpress`. It makes a small
Llama of random weights, saves it, and compresses a prompt of random tokens; with --model it reads a
Hugging Face folder, and the beginning of a text. mukv imports the same folder and prefills the same
prompt under the policies of the same names, with kvpress' defaults. SnapKV has 16 queries in both,
leverage scores have one random projection. KVzip needs a tokenizer, hence --model; its instruction
has no chat template in either. Compactor in kvpress fills the last partial block of 256 tokens with
keys that get attention, so that only lengths of 12 more than a multiple of 256 can agree; ChunkKV
keeps whole chunks, so that lengths with a whole number of kept chunks of 20 can.
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
folder, length, ratios, text, names, sketch = sys.argv[1], *map(json.loads, sys.argv[2:])
window = 16
torch.manual_seed(0)
drawn, sketch = torch.randn, torch.tensor(sketch)
torch.randn = lambda *size, **of: (
    sketch.expand(size) if size[-2:] == sketch.shape else drawn(*size, **of))
class Untemplated:
    def from_pretrained(self, name):
        tokenizer = AutoTokenizer.from_pretrained(name)
        tokenizer.chat_template = None
        return tokenizer
kvpress.presses.kvzip_press.AutoTokenizer = Untemplated()
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
zip = kvpress.KVzipPress
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
    "leverage": kvpress.LeverageScorePress, "compactor": kvpress.CompactorPress,
    "keydiff+chunk": lambda r: kvpress.ChunkKVPress(kvpress.KeyDiffPress(r)),
    "cur+chunk": lambda r: kvpress.ChunkKVPress(kvpress.CURPress(r)),
    "keydiff+threshold(least=-0.5,window=64)":
        lambda r: kvpress.DMSPress(kvpress.KeyDiffPress(), -0.5, 64),
    "keydiff+merge": lambda r: kvpress.MergingPress(kvpress.KeyDiffPress(r)),
    "kvzip": zip, "kvzip(plus=true)": lambda r: zip(r, kvzip_plus_normalization=True),
    "kvzip+adaptive(floor=0)": lambda r: zip(r, layerwise=True),
}
found = {}
for name, make in presses.items():
    if names and name.replace("(window=16)", "") not in names or text is None and "kvzip" in name:
        continue
    for ratio in ratios:
        press = make(ratio)
        masks = isinstance(press, (zip, kvpress.DMSPress))
        kept, whole = [], None if masks else press.compress
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
        if whole is not None:
            press.compress = compress
        with torch.no_grad(), press(model):
            model(ids, past_key_values=DynamicCache())
        for layer in model.model.layers if masks else ():
            left = torch.ones(1, model.config.num_key_value_heads, length, dtype=torch.bool)
            if layer.self_attn.masked_key_indices is not None:
                left[tuple(layer.self_attn.masked_key_indices)] = False
            kept.append([row.nonzero()[:, 0].tolist() for row in left[0]])
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
    # What a threshold keeps does not depend on a ratio.
    share = 1.0 if "threshold" in name else round(1 - ratio, 6)
    decoder, policy, type_ = model.network, Policy.parse(given, share), jnp.dtype("float32")
    if policy.keep.replays:
        cache = replayed(model, policy, ids)
    else:
        cache = decoder.empty_cache(1, len(ids), 8, type_, policy)
        prompt, count = jnp.asarray([ids]), jnp.asarray([len(ids)])
        _, cache = jax.jit(decoder.prefill)(model.decoding, cache, prompt, count)
    shelves = [slot.body.shelf for slot in cache.slots]
    return [
        [np.sort(position[there & (position >= 0)]).tolist() for position, there in heads]
        for heads in map(_by_head, shelves)
    ]


def replayed(model: Any, policy: Any, ids: list[int]) -> Any:
    """Return the cache of a prompt that is read twice."""
    import jax

    from mukv.core.compute import settled
    from mukv.infer.functions import decode_functions
    from mukv.infer.prompts import PROMPT_MULTIPLE, readings, round_up
    from mukv.infer.replay import read_twice
    from mukv.infer.sampling import Sampling

    compute, (policy, _) = settled(model.run.train.compute), model.calibrated(policy)
    functions = decode_functions(model.network, Sampling(), compute)
    reads = readings(functions.prefill, functions.extend, [ids], None, None)
    given = policy, (1, round_up(len(ids), PROMPT_MULTIPLE), 8), 0, compute, jax.random.key(0)
    return read_twice(model.network, model.decoding, [ids], reads, *given)[1]


def sketch(folder: Path | None) -> list[list[float]]:
    """Return the random projection of keys that leverage scores use here, [head_dim, sketch]."""
    import jax

    from mukv.cache.by_value import Leverage

    width = 8
    if folder is not None:
        config = json.loads((folder / "config.json").read_text("utf-8"))
        width = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    own = Leverage()
    return jax.random.normal(jax.random.key(own.seed), (width, own.sketch)).tolist()


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
        drawn = sketch(chosen.model)
        request = [folder, *map(json.dumps, (chosen.length, ratios, text, names, drawn))]
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
