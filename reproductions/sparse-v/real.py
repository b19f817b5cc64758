"""Measure the loss that pretrained models gain when every query reads few values.

    python reproductions/sparse-v/real.py MODEL... [--length 1024] [--samples 2]
    python reproductions/sparse-v/real.py --draw

MODEL: a folder as of `mukv import` or of Hugging Face. Reads code, prose and dialogue. Every query
reads only a share of the entries that it sees; the weights of these are divided by their sum. The
entries are chosen by:

- each head: the query head's own largest weights
- KV head: the largest summed weights of the query heads that share a KV head
- layer: the largest summed weights of all heads of the layer
- first head: the largest weights of the layer's first head, which all heads read
- latest: the first four entries and the most recent ones

The loss is that of the second half of each window. Measured numbers are kept in real.json, so that
the command continues where it was stopped; --draw makes real.png from the existing file.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

import mukv
from mukv.analysis import study
from mukv.analysis.capture import CapturedRows
from mukv.attention import cores
from mukv.attention.cores.base import Core, Demand, Out, Part, Scores
from mukv.attention.cores.plain import weighed
from mukv.attention.recalled import Query
from mukv.cli import launch
from mukv.core.compute import Compute
from mukv.model import Decoder
from mukv.model.loss import summed_loss
from mukv.show.figures import saved_figure
from mukv.show.progress import say
from mukv.storage.files import write_atomic

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
import subjects  # noqa: E402

SHARES = (1 / 4, 1 / 8, 1 / 16)
NATS = (0.01, 0.03, 0.1, 0.3, 1, 3)
"""Ticks of the figure."""
SINKS = 4
"""Number of first entries that `latest` reads in addition to the most recent ones."""
SCANNED = Compute("float32", "float32", unroll=False)
"""Layers are scanned, which compiles in seconds; every choice and share has its own program."""
Importance = Callable[[jax.Array], jax.Array]
"""A function of weights [batch kv_heads group query key] that returns scores of the entries, of a
shape that broadcasts to that of the weights."""
CHOICES: dict[str, Importance | None] = {
    "each head": lambda weights: weights,
    "KV head": lambda weights: weights.sum(axis=2, keepdims=True),
    "layer": lambda weights: weights.sum(axis=(1, 2), keepdims=True),
    "first head": lambda weights: weights[:, :1, :1],
    "latest": None,
}
"""Scores of entries by choice; None chooses by position."""


@dataclass(frozen=True)
class FewReads(Core):
    """Plain attention in which every query reads a share of the entries that it sees.

    choice: a key of CHOICES
    """

    choice: str
    share: float

    def apply(self, query: Query, parts: Sequence[Part], scores: Scores) -> Out:
        assert scores.sinks is None
        (part,) = parts
        weights, total = weighed(query, parts, scores)
        weights = weights / total
        shown = part.shown(scores.query_position)
        visible = shown.visible[:, :, None]
        count = jnp.ceil(self.share * visible.sum(axis=-1, keepdims=True)).astype(jnp.int32)
        rank = CHOICES[self.choice]
        if rank is None:
            age = scores.query_position[:, None, None, :, None] - shown.position[:, :, None, None]
            first = shown.position[:, :, None, None] < SINKS
            importance = jnp.where(first, 2.0, 1 / (1 + jnp.maximum(age, 0)))
        else:
            importance = rank(weights)
        importance = jnp.where(visible, importance, 0)
        read = visible & (importance >= largest(importance, count))
        weights = jnp.where(read, weights, 0)
        weights = weights / jnp.maximum(weights.sum(axis=-1, keepdims=True), 1e-20)
        return part.recalled.mixture(weights).astype(query[0].dtype)


def largest(numbers: jax.Array, count: jax.Array) -> jax.Array:
    """Return the `count`-th largest number along the last axis, for numbers >= 0.

    Bisects over the bits of float32, which for such numbers have the order of the numbers: 31
    counts instead of a sort.
    """
    bits = jax.lax.bitcast_convert_type(numbers.astype(jnp.float32), jnp.int32)
    shape = (*jnp.broadcast_shapes(numbers[..., :1].shape, count.shape),)

    def narrowed(bit: int, found: jax.Array) -> jax.Array:
        tried = found | jnp.left_shift(1, 30 - bit)
        enough = (bits >= tried).sum(axis=-1, keepdims=True) >= count
        return jnp.where(enough, tried, found)

    found = jax.lax.fori_loop(0, 31, narrowed, jnp.zeros(shape, jnp.int32))
    return jax.lax.bitcast_convert_type(found, jnp.float32)


def core_of(choice: str, share: float) -> type[Core]:
    """Return a core class for the table of cores; only this study uses it."""

    class Chosen(FewReads):
        @classmethod
        def made(cls, compute: Compute) -> Core:
            return FewReads(choice, share)

        @classmethod
        def supports(cls, demand: Demand, compute: Compute) -> str | None:
            return None

    return Chosen


def losses(
    model: Decoder, weights: Any, rows: CapturedRows, read: tuple[str, float] | None
) -> list[float]:
    """Return the loss of the second half of every window, in nats a token."""
    length = rows.tokens.shape[1]
    counted = np.arange(length) >= length // 2
    counted[-1] = False
    table = cores.CORES if read is None else {"few reads": core_of(*read), **cores.CORES}

    @jax.jit
    def loss(weights: Any, tokens: jax.Array, position: jax.Array) -> jax.Array:
        targets, weight = jnp.roll(tokens, -1, axis=1), jnp.asarray(counted, jnp.float32)[None]
        found = summed_loss(model, weights, tokens, targets, weight, position, compute=SCANNED)
        return found.cross_entropy / weight.sum()

    with mock.patch.object(cores, "CORES", table):
        return [
            float(loss(weights, rows.tokens[row : row + 1], rows.position[row : row + 1]))
            for row in range(len(rows.tokens))
        ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", type=Path, nargs="*", metavar="MODEL")
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--samples", type=int, default=2)
    parser.add_argument("--draw", action="store_true", help="only draw, from the existing file")
    given = parser.parse_args()
    path = HERE / "real.json"
    results: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    launch.prepare()
    for place in given.models:
        measure(place, given.length, given.samples, results, path)
    draw(results, HERE / "real.png")
    show(results)


def measure(place: Path, length: int, samples: int, results: dict[str, Any], path: Path) -> None:
    """Measure the missing numbers of one model, and write each at once."""
    loaded = mukv.load(place)
    model, weights = loaded.network, loaded.scaled
    assert isinstance(model, Decoder)
    found = results.setdefault(place.name, {"length": length, "samples": samples})
    if (found["length"], found["samples"]) != (length, samples):
        raise SystemExit(f"{path} has {found['samples']} windows of {found['length']} tokens")

    def save() -> None:
        write_atomic(path, json.dumps(results, indent=1) + "\n")

    texts = subjects.texts(length, samples, loaded.tokenizer)
    for text, rows in texts.items():
        kept = found.setdefault(text, {})
        if "sparsity" not in kept:
            facts = study.facts(study.look(model, weights, {text: rows}))[text]
            kept["sparsity"] = [summary(layer) for layer in facts]
            save()
        for choice, share in [("all", 1.0), *((c, s) for c in CHOICES for s in SHARES)]:
            name = choice if choice == "all" else f"{choice}, 1/{round(1 / share)}"
            if name not in kept:
                kept[name] = losses(
                    model, weights, rows, None if choice == "all" else (choice, share)
                )
                save()
                say(f"{place.name}, {text}: {name}: {math.exp(mean(kept[name])):.2f}")


def summary(layer: dict[str, Any]) -> dict[str, Any]:
    """Return the numbers of one layer that the page shows."""
    numbers = {"needed": layer["needed"]["0.8"], "agreement": layer["agreement"]}
    return numbers | {
        f"{kind} {share}": layer[kind][share]
        for kind in ("top", "error")
        for share in ("0.1", "0.2")
    }


def more(found: dict[str, Any], name: str) -> list[float]:
    """Return how much more every window loses than with all entries, in nats a token."""
    return [one - all for one, all in zip(found[name], found["all"], strict=True)]


def show(results: dict[str, Any]) -> None:
    for model, texts in results.items():
        for text in subjects.TEXTS:
            found = texts[text]
            say(f"{model}, {text}: perplexity {math.exp(mean(found['all'])):.2f}")
            for name in found:
                if name not in ("all", "sparsity"):
                    say(f"  {name}: {mean(more(found, name)):+.3f} nats a token")


def draw(results: dict[str, Any], path: Path) -> None:
    """Draw the loss added by few reads, for every model and text, and the mass by layer."""
    texts = subjects.TEXTS
    with saved_figure(path, (4 * (len(texts) + 1), 3.4 * len(results) + 0.4)) as figure:
        rows = figure.subplots(len(results), len(texts) + 1, squeeze=False)
        for axes_of, (model, found) in zip(rows, results.items(), strict=True):
            for axes, text in zip(axes_of, texts, strict=False):
                for choice in CHOICES:
                    lost = [mean(more(found[text], f"{choice}, 1/{round(1 / s)}")) for s in SHARES]
                    axes.plot(SHARES, lost, marker="o", label=choice)
                axes.set(xscale="log", yscale="log", ylim=(0.01, 5), title=f"{model}\n{text}")
                axes.set_yticks(NATS, map(str, NATS))
                axes.set_xticks(SHARES, [f"1/{round(1 / share)}" for share in SHARES])
                axes.minorticks_off()
                axes.set(xlabel="share of entries read", ylabel="added loss, nats a token")
                axes.grid(alpha=0.3)
            for text in texts:
                mass = [layer["top 0.1"] for layer in found[text]["sparsity"]]
                axes_of[-1].plot(mass, marker=".", label=text)
            axes_of[-1].set(xlabel="layer", ylabel="mass of the top 10 %", ylim=(0, 1.02))
            axes_of[-1].legend(fontsize=8)
            axes_of[-1].grid(alpha=0.3)
        figure.legend(*rows[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=5)


if __name__ == "__main__":
    main()
