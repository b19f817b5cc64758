"""A small model that retrieves, and what it still finds under each cache policy.

    python reproductions/retrieval/run.py [--steps 1500]

Trains on the Python library's own source with facts to be recalled between its lines (resumes where
it was), then asks for facts of held-out texts: the whole answer must be right, decoded through the
cache that the policy leaves. Writes results.json and figure.png beside this file.
"""

from __future__ import annotations

import argparse
import json
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
from mukv.core.errors import BadInput
from mukv.core.files import write_atomic
from mukv.data.build import build_tokens, default_corpus
from mukv.figures import saved_figure
from mukv.launch import cache_folder
from mukv.loaded import Model

HERE = Path(__file__).parent
LENGTH = 256
DOCUMENTS = 48_000
PUZZLES, FACTS, READ = 32, 6, 232
TAIL = 8
MODEL = (
    "model.d_model=64",
    "model.attention={heads: 4, kv_heads: 2, head_dim: 16}",
    "model.mlp.hidden=192",
    "model.plan=[{repeats: 3}]",
    "train.batch=32",
    f"train.length={LENGTH}",
    "train.learning_rate=0.006",
    "train.schedule={kind: wsd, warmup: 50}",
    "train.checkpoint_every=100",
    "train.evaluate_every=200",
    "train.validation_batches=8",
)
KEEPERS = ("random", "streaming", "knorm", "keydiff", "expected", "tova", "h2o", "snapkv")
SELECTORS = ("topk", "topp", "sparq", "pages", "clusters")
STORES = ("int8", "int4")
COMPOSED = (
    *("expected:0.5+int8", "keydiff:0.5+int8", "keydiff:0.75+int4", "int4+pages:0.25"),
    *("h2o:0.5+int4", "snapkv:0.5+int4", "tova:0.5+int4"),
    *("snapkv:0.375+int4", "keydiff:0.375+int4"),
)
BUDGETS = (0.25,)


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
    """A policy on a model. aware: the cue is part of what is compressed; its answer's first letter
    then comes from the prefill, as in the papers that compress with the question at hand. entries:
    type of what is not quantised; 16 bits, as caches usually have, float32 as on a CPU."""

    model: Model
    policy: Policy
    aware: bool
    entries: str = "bfloat16"

    @cached_property
    def program(self) -> Any:
        model, compute = self.model.decoder, self.model.run.train.compute.resolve(264)

        def run(weights: Any, given: Any) -> jax.Array:
            context, count, cue, answer = given
            rows, length = context.shape
            dtype = jnp.dtype(self.entries)
            cache = model.empty_cache(rows, length, TAIL, dtype, self.policy)
            steps = [*cue.T, *answer.T[:-1]]
            if self.aware:
                place = count[:, None] + jnp.arange(CUE)
                context = context.at[jnp.arange(rows)[:, None], place].set(cue)
                count, steps = count + CUE, list(answer.T[:-1])
            logits, cache = model.prefill(weights, cache, context, count, compute=compute)
            said = [jnp.argmax(logits, axis=-1)]
            for token in steps:
                logits, cache = model.step(weights, cache, token, compute=compute)
                said.append(jnp.argmax(logits, axis=-1))
            return jnp.stack(said[-ANSWER:], axis=1)

        return jax.jit(run)

    def accuracy(self, given: Asked) -> float:
        parts = tuple(map(jnp.asarray, (given.context, given.count, given.cue, given.answer)))
        said = np.asarray(self.program(self.model.decoding, parts))
        return float((said == given.answer).all(axis=1).mean())

    def bytes(self) -> int:
        """Of one row's cache, as allocated."""
        model, dtype = self.model.decoder, jnp.dtype(self.entries)
        cache = jax.eval_shape(lambda: model.empty_cache(1, LENGTH, TAIL, dtype, self.policy))
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))


def grid(budgets: Sequence[float]) -> list[tuple[str, float]]:
    whole = [("full", 1.0), *((name, 1.0) for name in (*STORES, *COMPOSED))]
    return whole + [(name, b) for b in budgets for name in (*KEEPERS, *SELECTORS)]


def single_precision(model: Model) -> dict[str, dict[str, float]]:
    """What storing in fewer bits saves of a float32 cache, which a CPU has by default."""
    given, found = asked(model), {}
    everything = Trial(model, FULL, False, "float32").bytes()
    for name in STORES:
        trial = Trial(model, Policy.parse(name), False, "float32")
        share = trial.bytes() / everything
        found[name] = {"share_of_bytes": share, "accuracy": trial.accuracy(given)}
    return found


def judge(model: Model, path: Path) -> list[dict[str, Any]]:
    """Every policy and budget; what is in the file already is not done again."""
    rows = json.loads(path.read_text()) if path.exists() else []
    known = {(row["policy"], row["budget"]) for row in rows}
    given = asked(model)
    everything = Trial(model, FULL, False).bytes()
    for name, budget in grid(BUDGETS):
        if (name, budget) in known:
            continue
        policy = Policy.parse(name, budget)
        try:
            trials = {aware: Trial(model, policy, aware) for aware in (False, True)}
            size = trials[False].bytes()
        except BadInput as error:
            Console(stderr=True).print(str(error))
            continue
        row = {
            "policy": name,
            "budget": budget,
            "bytes": size,
            "share_of_bytes": size / everything,
            "accuracy": trials[False].accuracy(given),
            "accuracy_question_known": trials[True].accuracy(given),
            "asked": len(given.context),
        }
        rows.append(row)
        write_atomic(path, json.dumps(rows, indent=1) + "\n")
        Console(stderr=True).print(row)
        jax.clear_caches()
    return rows


def show(rows: Sequence[dict[str, Any]]) -> None:
    table = Table("policy", "budget", "bytes", "of full", "accuracy", "question known")
    for row in rows:
        table.add_row(
            row["policy"],
            f"{row['budget']:g}",
            f"{row['bytes']:,}",
            f"{row['share_of_bytes']:.1%}",
            f"{row['accuracy']:.3f}",
            f"{row['accuracy_question_known']:.3f}",
        )
    Console().print(table)


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Accuracy against allocated bytes, the question unknown and known when entries go."""
    sides = (("accuracy", "question unknown"), ("accuracy_question_known", "question known"))
    with saved_figure(path, (12, 5)) as figure:
        panels = figure.subplots(1, len(sides), sharey=True)
        for axes, (key, title) in zip(panels, sides, strict=True):
            for row in rows:
                point = row["share_of_bytes"], row[key]
                name = row["policy"]
                group = [name in KEEPERS, name in SELECTORS, True].index(True)
                axes.plot(*point, "os^"[group], color=f"C{group}", alpha=0.8)
                shown = {"xytext": (4, 3 - 9 * (len(name) % 2)), "textcoords": "offset points"}
                axes.annotate(name, point, fontsize=6, **shown)
            axes.axhline(0.95 * rows[0][key], color="grey", ls=":", lw=1)
            axes.axvline(0.25, color="grey", ls=":", lw=1)
            axes.set(title=title, ylim=(-0.04, 1.06), xlim=(0.1, None))
            axes.set_xlabel("share of the bytes of a full 16-bit cache")
            axes.grid(alpha=0.3)
        panels[0].set_ylabel("facts recalled (dotted: 95 % of the full cache)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--root", type=Path, default=Path("runs/retrieval"))
    given = parser.parse_args()
    launch.prepare()
    overrides = [*MODEL, f"train.steps={given.steps}", f"data.path={corpus(given.root)}"]
    folder = runs.RunDirectory(given.root / "model")
    runs.train(config.load("tiny", overrides), folder, title="retrieval")
    model = mukv.load(folder.path)
    rows = judge(model, HERE / "results.json")
    single = single_precision(model)
    write_atomic(HERE / "single-precision.json", json.dumps(single, indent=1) + "\n")
    draw(rows, HERE / "figure.png")
    show(rows)


if __name__ == "__main__":
    main()
