"""Decode speed and cache bytes of a concept model beside the byte-level decoder of equal FLOPs.

    python reproductions/concept-model/decode.py

The sizes of equal-flops.yaml (prose.py first) with random weights, which change no time. Caches are
as full as after that many bytes; then real text is read byte by byte, so that chunks end where they
do in text.
Writes decode.json and decode.png.
"""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import yaml
from matplotlib.ticker import EngFormatter

from mukv import config, runs
from mukv.core.compute import Compute
from mukv.core.files import write_atomic
from mukv.core.params import initialise
from mukv.decode import decoding_weights
from mukv.figures import legend, saved_figure
from mukv.model import Concept, LanguageModel

HERE = Path(__file__).parent
CONTEXTS = (4096, 8192, 16384, 32768)
STEPS, ROUNDS, TAIL = 64, 12, 64


def full(model: LanguageModel, context: int) -> Any:
    """A cache as after `context` tokens."""
    cache = model.empty_cache(1, context, TAIL)
    length = jnp.full(1, context, jnp.int32)
    if not isinstance(model, Concept):
        return replace(cache, length=length)
    concepts = length // model.chunker.pace
    slots = model.injection.slots_per_concept * concepts
    return replace(
        cache,
        encoder=replace(cache.encoder, length=length),
        concepts=replace(cache.concepts, length=concepts),
        heard=replace(cache.heard, length=concepts),
        decoder=replace(cache.decoder, length=length + slots),
    )


def speed(model: LanguageModel, context: int, text: np.ndarray) -> dict[str, float]:
    """Tokens per second, the best of many rounds over one text, and bytes as allocated."""
    resolved = jax.tree.map(lambda r: r.deviation, model.resolved(), is_leaf=is_resolved)
    weights = initialise(model.params(), resolved, jax.random.key(0))
    weights = decoding_weights(model, weights)
    compute = Compute().resolve(model.vocab_size)

    @jax.jit
    def read(weights: Any, frozen: Any, live: Any, tokens: Any) -> Any:
        def step(live: Any, token: Any) -> tuple[Any, Any]:
            cache = model.cache_class.join(frozen, live)
            logits, cache = model.step(weights, cache, token, compute)
            return cache.split()[1], jnp.argmax(logits, axis=-1)

        return jax.lax.scan(step, live, tokens)

    cache = full(model, context)
    frozen, live = cache.split()
    seconds, tokens = [], jnp.asarray(text[:, None], jnp.int32)
    for _ in range(ROUNDS + 1):
        start = time.perf_counter()
        jax.block_until_ready(read(weights, frozen, live, tokens))
        seconds.append(time.perf_counter() - start)
    return {"tokens_per_second": STEPS / min(seconds[1:]), "cache_bytes": cache.nbytes()}


def is_resolved(leaf: Any) -> bool:
    return hasattr(leaf, "deviation")


def main() -> None:
    asked = yaml.safe_load((HERE / "equal-flops.yaml").read_text())
    found: dict[str, dict[int, Any]] = {}
    for name, overrides in asked["variants"].items():
        base = asked["bases"].get(name, asked["base"])
        run = config.load(base, asked["overrides"] + overrides)
        text = np.asarray(runs.open_corpus(run).split("validation").tokens[:STEPS])
        for context in CONTEXTS:
            row = speed(run.model, context, text)
            found.setdefault(name, {})[context] = row
            print(name, context, f"{row['tokens_per_second']:,.0f} tokens/s", row["cache_bytes"])
    write_atomic(HERE / "decode.json", json.dumps(found, indent=2) + "\n")
    with saved_figure(HERE / "decode.png", (8, 3.6), "Decoding one row on a CPU") as figure:
        for axes, key in zip(
            figure.subplots(1, 2), ("tokens_per_second", "cache_bytes"), strict=True
        ):
            for name, rows in found.items():
                axes.plot(list(rows), [row[key] for row in rows.values()], marker="o", label=name)
            axes.set(xscale="log", xlabel="bytes read", ylabel=key.replace("_", " "))
            axes.set_yscale("log", base=2)
            axes.yaxis.set_major_formatter(EngFormatter(places=0, sep=""))
            axes.set_xticks(CONTEXTS, [f"{context // 1024}k" for context in CONTEXTS])
            axes.minorticks_off()
            axes.grid(alpha=0.3)
        legend(figure, figure.axes[0])


if __name__ == "__main__":
    main()
