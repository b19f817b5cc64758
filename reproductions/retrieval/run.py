"""A small model that retrieves, and what it still finds under each cache policy.

    python reproductions/retrieval/run.py [--steps 600] [--seed 0]

Trains on the Python library's own source with facts to be recalled between its lines (resumes where
it was), then asks for facts of held-out texts: the whole answer must be right, decoded through the
cache that the policy leaves. Writes results.json and figure.png, beside this file if not elsewhere.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from corpus import ANSWER, CUE, puzzle, write_documents
from rich.console import Console
from rich.table import Table

import mukv
from mukv import config, launch, runs
from mukv.cache import FULL, Policy
from mukv.core.files import write_atomic
from mukv.data.build import build_tokens, default_corpus
from mukv.figures import saved_figure
from mukv.launch import cache_folder
from mukv.loaded import Model
from mukv.progress import Bar

HERE = Path(__file__).parent
LENGTH = 256
DOCUMENTS = 48_000
PUZZLES, FACTS, READ = 64, 6, 232
TAIL = CUE + ANSWER - 1
"""Tokens that are fed after the text: none of them is judged by a policy."""
MODEL = (
    "model.d_model=64",
    "model.attention={heads: 4, kv_heads: 2, head_dim: 32}",
    "model.mlp.hidden=192",
    "model.plan=[{repeats: 3}]",
    "train.batch=32",
    f"train.length={LENGTH}",
    "train.optimizer={kind: muon}",
    "train.learning_rate=0.02",
    "train.schedule={kind: wsd, warmup: 30}",
    "train.checkpoint_every=100",
    "train.evaluate_every=100",
    "train.validation_batches=8",
)
KEEPERS = ("random", "streaming", "knorm", "keydiff", "expected", "tova", "h2o", "snapkv")
SELECTORS = ("topk", "topp", "sparq", "pages", "clusters")
STORES = ("int8", "int4")
SHARES = (0.625, 0.5, 0.375, 0.25)
COMPOSED = (
    *(f"{name}:{share}+int4" for name in ("keydiff", "snapkv") for share in SHARES),
    *(f"{name}:0.25+adaptive+int4" for name in ("keydiff", "snapkv")),
    *(f"keydiff:{part}+int4" for part in ("96", "64", "64+adaptive")),
    *(f"{name}:0.375+int4" for name in ("expected", "tova", "h2o")),
    *("keydiff:0.375+pyramid+int4", "keydiff:0.5+int8", "int4+pages:0.25"),
    "keydiff:0.375+int4+pages:0.5",
)
STYLES, MARKS = {"int8": ":", "int4": "--"}, {"adaptive": "D", "pyramid": "v", "full": "*"}
BUDGETS = (0.5, 0.25, 0.125)


def text(split: str) -> bytes:
    tokens = default_corpus(cache_folder()).split(split).tokens
    return bytes(tokens[tokens < 256].astype("uint8"))


def corpus(root: Path) -> Path:
    """The token file to train on, made once."""
    out = root / "tokens"
    if not out.exists():
        write_documents(text("train"), root / "documents.jsonl", DOCUMENTS, LENGTH - 12)
        build_tokens([str(root / "documents.jsonl")], out)
    return out


@dataclass(frozen=True)
class Asked:
    """Rows of held-out texts, each followed by the cue of one of its facts and the answer."""

    context: np.ndarray
    count: np.ndarray
    cue: np.ndarray
    answer: np.ndarray


def asked(model: Model) -> Asked:
    """Every fact of every puzzle once."""
    random, source = np.random.default_rng(1), text("validation")
    rows, cues, answers = [], [], []
    for _ in range(PUZZLES):
        found = puzzle(source, random, READ, FACTS)
        for line in found.facts:
            rows.append(model.encode(found.text))
            cues.append(list(line[:CUE].encode()))
            answers.append(list(line[CUE : CUE + ANSWER].encode()))
    count = np.array(list(map(len, rows)), np.int32)
    context = np.zeros((len(rows), LENGTH), np.int32)
    for row, ids in zip(context, rows, strict=True):
        row[: len(ids)] = ids
    return Asked(context, count, np.array(cues, np.int32), np.array(answers, np.int32))


@dataclass(frozen=True)
class Trial:
    """A policy on a model. entries: type of what is not quantised; 16 bits, as caches usually have,
    float32 as on a CPU."""

    model: Model
    policy: Policy
    entries: str = "bfloat16"

    def cache(self, rows: int) -> Any:
        dtype = jnp.dtype(self.entries)
        return self.model.decoder.empty_cache(rows, LENGTH, TAIL, dtype, self.policy)

    @cached_property
    def program(self) -> Any:
        """What a model says after a context, and after each of some tokens: [row step]."""
        model, compute = self.model.decoder, self.model.run.train.compute.resolve(264)

        def run(weights: Any, context: jax.Array, count: jax.Array, tokens: jax.Array) -> jax.Array:
            cache = self.cache(len(context))
            logits, cache = model.prefill(weights, cache, context, count, compute=compute)

            def step(cache: Any, token: jax.Array) -> tuple[Any, jax.Array]:
                logits, cache = model.step(weights, cache, token, compute=compute)
                return cache, jnp.argmax(logits, axis=-1)

            _, said = jax.lax.scan(step, cache, tokens.T)
            return jnp.concatenate([jnp.argmax(logits, axis=-1)[None], said]).T

        return jax.jit(run)

    def accuracy(self, given: Asked, aware: bool) -> float:
        """aware: the cue is part of what is compressed; its answer's first letter then comes from
        the prefill, as in the papers that compress with the question at hand."""
        context, count = given.context, given.count
        tokens, start = np.concatenate([given.cue, given.answer[:, :-1]], axis=1), CUE
        if aware:
            rows = np.arange(len(context))[:, None]
            context = context.copy()
            context[rows, count[:, None] + np.arange(CUE)] = given.cue
            # What follows the answer is not looked at: one program for both.
            count, tokens, start = count + CUE, np.roll(tokens, -CUE, axis=1), 0
        said = np.asarray(self.program(self.model.decoding, context, count, tokens))
        return float((said[:, start : start + ANSWER] == given.answer).all(axis=1).mean())

    def bytes(self) -> int:
        """Of one row's cache, as allocated."""
        return jax.eval_shape(lambda: self.cache(1)).nbytes()


def grid() -> list[tuple[str, float]]:
    """A budget of 1: each part has its own, or none."""
    whole = [(name, 1.0) for name in ("full", *STORES, *COMPOSED)]
    return whole + [(name, budget) for name in (*KEEPERS, *SELECTORS) for budget in BUDGETS]


def judge(model: Model, entries: str, grid: Sequence[tuple[str, float]]) -> list[dict[str, Any]]:
    """Every policy and budget, on the same questions."""
    given, everything = asked(model), Trial(model, FULL, entries).bytes()
    rows = []
    with Bar("policies", len(grid)) as bar:
        for name, budget in grid:
            trial = Trial(model, Policy.parse(name, budget), entries)
            rows.append(
                {
                    "policy": name,
                    "budget": budget,
                    "entries": entries,
                    "bytes": trial.bytes(),
                    "share_of_bytes": trial.bytes() / everything,
                    "accuracy": trial.accuracy(given, aware=False),
                    "accuracy_question_known": trial.accuracy(given, aware=True),
                    "asked": len(given.context),
                }
            )
            bar.show(len(rows), {"policy": name, "recalled": f"{rows[-1]['accuracy']:.3f}"})
    return rows


def show(rows: Sequence[dict[str, Any]]) -> None:
    table = Table("policy", "budget", "bytes", "of full", "accuracy", "question known")
    for row in rows:
        table.add_row(
            row["policy"] + (" (float32)" if row["entries"] == "float32" else ""),
            f"{row['budget']:g}",
            f"{row['bytes']:,}",
            f"{row['share_of_bytes']:.1%}",
            f"{row['accuracy']:.3f}",
            f"{row['accuracy_question_known']:.3f}",
        )
    Console().print(table)


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Facts recalled against allocated bytes, the question unknown and known when entries go: a
    line for each policy, budgets apart. Selectors keep all bytes and are in the table alone."""
    sides = (("accuracy", "question unknown"), ("accuracy_question_known", "question known"))
    smaller = [row for row in rows if not any(name in row["policy"] for name in SELECTORS)]
    series: dict[str, list[dict[str, Any]]] = {}
    for row in sorted(smaller, key=lambda row: row["bytes"]):
        series.setdefault(re.sub(r":[\d.]+", "", row["policy"]), []).append(row)
    with saved_figure(path, (12, 5)) as figure:
        panels = figure.subplots(1, len(sides), sharey=True)
        for axes, (key, title) in zip(panels, sides, strict=True):
            for name, points in series.items():
                across = [row["share_of_bytes"] for row in points]
                axes.plot(across, [row[key] for row in points], label=name, **_shown(name))
            axes.axhline(0.95 * rows[0][key], color="grey", ls=":", lw=1)
            axes.axvline(0.25, color="grey", ls=":", lw=1)
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter(lambda x, _: f"{x:.3g}")
            axes.set(title=title, xlabel="share of the bytes of a full 16-bit cache")
            axes.set(ylim=(-0.03, 1.03))
            axes.grid(alpha=0.3)
        panels[0].set_ylabel("facts recalled (dotted: 95 % of the full cache)")
        handles = sorted(
            zip(*panels[0].get_legend_handles_labels(), strict=True), key=lambda h: h[1]
        )
        figure.legend(*zip(*handles, strict=True), loc="outside right upper", fontsize=8)


def _shown(name: str) -> dict[str, Any]:
    """Colour by what stays, line by how it is stored, mark by how the budget is spread."""
    parts = name.split("+")
    keeper = next((part for part in KEEPERS if part in parts), None)
    return {
        "color": "black" if keeper is None else f"C{KEEPERS.index(keeper)}",
        "ls": next((style for part, style in STYLES.items() if part in parts), "-"),
        "marker": next((mark for part, mark in MARKS.items() if part in parts), "o"),
        "mfc": "white" if set(STORES) & set(parts) else None,
        "ms": 5,
        "lw": 1,
        "alpha": 0.8,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--root", type=Path, default=Path("runs/retrieval"), help="of the model")
    parser.add_argument("--out", type=Path, default=HERE, help="of the results and the figure")
    given = parser.parse_args()
    launch.prepare()
    numbers = f"train.steps={given.steps}", f"train.seed={given.seed}"
    overrides = [*MODEL, *numbers, f"data.path={corpus(given.root)}"]
    folder = runs.RunDirectory(given.root / "model")
    outcome = runs.train(config.load("tiny", overrides), folder, title="retrieval")
    outcome.require_finished(folder.path)
    model = mukv.load(folder.path)
    rows = judge(model, "bfloat16", grid())
    single = judge(model, "float32", [(name, 1.0) for name in ("full", *STORES)])
    write_atomic(given.out / "results.json", json.dumps(rows + single, indent=1) + "\n")
    draw(rows, given.out / "figure.png")
    show(rows + single)


if __name__ == "__main__":
    main()
