"""Compare decoding speed and cache bytes of concept models and byte-level decoders of equal FLOPs.

    python reproductions/concept-model/decode.py [--draw]

Models have the sizes of equal-flops.yaml and equal-cache.yaml (run prose.py first) and random
weights, which do not change the time. Caches are filled as after that many bytes; then real text is
read byte by byte, so that chunks end as in text. All models of a context are measured in
alternation. Writes decode.json and decode.png; --draw makes the figure from the existing file.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import yaml
from matplotlib.ticker import EngFormatter

from mukv.core.compute import settled
from mukv.core.params import initialise
from mukv.infer.decode import decoding_weights
from mukv.model import Concept, LanguageModel
from mukv.runs import config
from mukv.runs.resolve import open_corpus
from mukv.show.figures import MARKERS, saved_figure
from mukv.storage.files import write_atomic

HERE = Path(__file__).parent
CONTEXTS = (4096, 8192, 16384, 32768)
STEPS, ROUNDS, TAIL = 64, 24, 64
MODELS = {
    "bytes": ("equal-flops", "bytes"),
    "bytes, MQA": ("equal-cache", "MQA"),
    "bytes, MQA, reuse": ("equal-cache", "MQA, reuse"),
    "windows, last global": ("equal-cache", "windows, last global"),
    "windows, last 400": ("equal-cache", "windows, last 400"),
    "windows, last 128": ("equal-cache", "windows, last 128"),
    "windows": ("equal-cache", "windows"),
    "words": ("equal-flops", "words"),
    "words, reuse": ("equal-cache", "words, reuse"),
    "words, cross": ("equal-flops", "words, cross"),
}
"""Models by name: the comparison that has the model, and its name there."""


def full(model: LanguageModel, context: int) -> Any:
    """Make a cache filled as after `context` tokens."""
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
        cross=replace(cache.cross, length=concepts),
        decoder=replace(cache.decoder, length=length + slots),
    )


def reader(model: LanguageModel, context: int, text: np.ndarray) -> tuple[Callable[[], None], int]:
    """Compile a function that reads the text once after `context` tokens; also return the allocated
    bytes of the cache.
    """
    resolved = jax.tree.map(lambda r: r.deviation, model.resolved(), is_leaf=is_resolved)
    weights = initialise(model.params(), resolved, jax.random.key(0))
    weights = decoding_weights(model, weights)
    compute = settled(None)

    @jax.jit
    def read(weights: Any, frozen: Any, live: Any, tokens: Any) -> Any:
        def step(live: Any, token: Any) -> tuple[Any, Any]:
            cache = model.cache_class.join(frozen, live)
            logits, cache = model.step(weights, cache, token, compute)
            return cache.split()[1], jnp.argmax(logits, axis=-1)

        return jax.lax.scan(step, live, tokens)

    cache = full(model, context)
    frozen, live = cache.split()
    tokens = jnp.asarray(text[:, None], jnp.int32)

    def once() -> None:
        jax.block_until_ready(read(weights, frozen, live, tokens))

    once()
    return once, cache.nbytes()


def is_resolved(leaf: Any) -> bool:
    return hasattr(leaf, "deviation")


def models() -> Iterator[tuple[str, LanguageModel, np.ndarray]]:
    """Return name, model and text of each."""
    for name, (comparison, variant) in MODELS.items():
        asked = yaml.safe_load((HERE / f"{comparison}.yaml").read_text())
        base = asked["bases"].get(variant, asked["base"])
        run = config.load(base, asked["overrides"] + asked["variants"][variant])
        text = np.asarray(open_corpus(run).split("validation").tokens[:STEPS])
        yield name, run.model, text


def measure(context: int) -> dict[str, dict[str, float]]:
    """Measure tokens per second (best and median of all rounds) and cache bytes of each model."""
    readers = {name: reader(model, context, text) for name, model, text in models()}
    seconds: dict[str, list[float]] = {name: [] for name in readers}
    for _ in range(ROUNDS):
        for name, (once, _) in readers.items():
            start = time.perf_counter()
            once()
            seconds[name].append(time.perf_counter() - start)
    return {
        name: {
            "tokens_per_second": STEPS / min(seconds[name]),
            "median_tokens_per_second": STEPS / float(np.median(seconds[name])),
            "cache_bytes": cache_bytes,
        }
        for name, (_, cache_bytes) in readers.items()
    }


def draw(found: dict[str, dict[str, Any]], path: Path) -> None:
    with saved_figure(path, (9, 5), "Decoding one row on a CPU") as figure:
        panels = figure.subplots(1, 2)
        shown = (("tokens_per_second", "tokens per second"), ("cache_bytes", "bytes of the cache"))
        for axes, (key, label) in zip(panels, shown, strict=True):
            for number, (name, rows) in enumerate(found.items()):
                look = {"marker": MARKERS[number], "color": f"C{number}"}
                across = [int(context) for context in rows]
                axes.plot(across, [row[key] for row in rows.values()], label=name, **look)
            axes.set(xscale="log", xlabel="bytes read", ylabel=label)
            axes.set_yscale("log", base=2)
            axes.yaxis.set_major_formatter(EngFormatter(places=0, sep=""))
            axes.set_xticks(CONTEXTS, [f"{context // 1024}k" for context in CONTEXTS])
            axes.minorticks_off()
            axes.grid(alpha=0.3)
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--draw", action="store_true", help="only draw the figure, from the existing file"
    )
    given = parser.parse_args()
    path = HERE / "decode.json"
    found: dict[str, dict[str, Any]] = {name: {} for name in MODELS}
    if given.draw:
        found = json.loads(path.read_text())
    else:
        for context in CONTEXTS:
            for name, row in measure(context).items():
                found[name][str(context)] = row
                print(name, context, f"{row['tokens_per_second']:,.0f} tokens/s", flush=True)
            jax.clear_caches()
        write_atomic(path, json.dumps(found, indent=1) + "\n")
    draw(found, HERE / "decode.png")


if __name__ == "__main__":
    main()
