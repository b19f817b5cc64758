"""Train a small model on retrieval, and measure what it retrieves under each cache policy.

    python reproductions/retrieval/run.py [--seed 1] [--steps 800] [--composed] [--draw]

Trains on the Python library's own source with facts between its lines (resumes if interrupted),
then asks for facts of held-out texts: the whole answer must be correct, decoded with the compressed
cache. A second set of texts serves to choose the best composition of policies. Writes results.json
and figure.png beside this file, or seed-N.json and seed-N.png for another seed; --draw makes the
figure from the existing file.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
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
from mukv.cache import FULL, Policy
from mukv.cli import launch
from mukv.core.compute import settled
from mukv.core.errors import BadInput
from mukv.data.build import build_tokens, default_corpus
from mukv.runs import config
from mukv.runs.folder import RunDirectory
from mukv.runs.loaded import Model
from mukv.runs.train import train_run
from mukv.show.figures import saved_figure
from mukv.show.progress import Bar
from mukv.storage.files import cache_folder, write_atomic

HERE = Path(__file__).parent
LENGTH = 256
DOCUMENTS = 48_000
PUZZLES, FACTS, READ = 64, 6, 232
JUDGED, CHOOSING = 1, 2
"""Seeds of the set of texts for the results and of that for choosing a composition."""
TAIL = CUE + ANSWER - 1
"""Tokens that are decoded after the text; no policy evicts them."""
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
SHARES = (0.625, 0.5, 0.375, 0.3, 0.25)
COMPOSED = (
    *(f"{name}:{share}+int4" for name in ("keydiff", "snapkv") for share in SHARES),
    *(f"{name}:0.25+adaptive+int4" for name in ("keydiff", "snapkv")),
    *(f"keydiff:{part}+int4" for part in ("96", "64", "64+adaptive")),
    *(f"{name}:0.375+int4" for name in ("expected", "tova", "h2o")),
    *("keydiff:0.375+pyramid+int4", "keydiff:0.5+int8", "int4+pages:0.25"),
    "keydiff:0.375+int4+pages:0.5",
)
STYLES, MARKS = {"int8": ":", "int4": "--"}, {"adaptive": "D", "pyramid": "v", "full": "*"}
NUMBER = ", by number"
"""Suffix of policies whose budget is a number of entries instead of a fraction."""
BUDGETS = (0.5, 0.25, 0.125)


def text(split: str) -> bytes:
    tokens = default_corpus(cache_folder()).split(split).tokens
    return bytes(tokens[tokens < 256].astype("uint8"))


def corpus(root: Path) -> Path:
    """Return the token file to train on; build it on first use."""
    out = root / "tokens"
    if not out.exists():
        write_documents(text("train"), root / "documents.jsonl", DOCUMENTS, LENGTH - 12)
        build_tokens([str(root / "documents.jsonl")], out)
    return out


@dataclass(frozen=True)
class Asked:
    """Rows of held-out texts, each followed by the cue of one of its facts and the answer; the
    FACTS rows of a text are consecutive.
    """

    context: np.ndarray
    count: np.ndarray
    cue: np.ndarray
    answer: np.ndarray

    @property
    def lengths(self) -> list[int]:
        """Tokens of each text."""
        return self.count[::FACTS].tolist()


def asked(model: Model, seed: int) -> Asked:
    """Return a row for every fact of every puzzle. seed: of the set of texts."""
    random, source = np.random.default_rng(seed), text("validation")
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
    """A policy on a model.

    entries: dtype of entries that are not quantised; 16 bits, as caches usually have, or float32 as
        on a CPU
    """

    model: Model
    policy: Policy
    entries: str = "bfloat16"

    def cache(self, rows: int, length: int = LENGTH) -> Any:
        dtype = jnp.dtype(self.entries)
        return self.model.network.empty_cache(rows, length, TAIL, dtype, self.policy)

    @cached_property
    def program(self) -> Any:
        """Compile the predictions of a model after a context, and after each of some tokens: [row
        step].
        """
        model, compute = self.model.network, settled(self.model.run.train.compute)

        def run(weights: Any, context: jax.Array, count: jax.Array, tokens: jax.Array) -> jax.Array:
            cache = self.cache(len(context))
            logits, cache = model.prefill(weights, cache, context, count, compute=compute)

            def step(cache: Any, token: jax.Array) -> tuple[Any, jax.Array]:
                logits, cache = model.step(weights, cache, token, compute=compute)
                return cache, jnp.argmax(logits, axis=-1)

            _, said = jax.lax.scan(step, cache, tokens.T)
            return jnp.concatenate([jnp.argmax(logits, axis=-1)[None], said]).T

        return jax.jit(run)

    def right(self, given: Asked, aware: bool) -> str:
        """Return the number of recalled facts of each text, as one digit per text.

        aware: whether the cue is part of the compressed text; the prefill then predicts the first
            letter of the answer, as in papers that compress with the question included
        """
        context, count = given.context, given.count
        tokens, start = np.concatenate([given.cue, given.answer[:, :-1]], axis=1), CUE
        if aware:
            rows = np.arange(len(context))[:, None]
            context = context.copy()
            context[rows, count[:, None] + np.arange(CUE)] = given.cue
            # Tokens after the answer are ignored, so that one program serves both cases.
            count, tokens, start = count + CUE, np.roll(tokens, -CUE, axis=1), 0
        said = np.asarray(self.program(self.model.decoding, context, count, tokens))
        right = (said[:, start : start + ANSWER] == given.answer).all(axis=1)
        return "".join(str(number) for number in right.reshape(-1, FACTS).sum(axis=1))

    def bytes(self, length: int) -> int:
        """Return the allocated bytes of one row's cache for `length` tokens, or a few more where
        the policy needs more entries than its fraction of them.
        """
        try:
            return jax.eval_shape(lambda: self.cache(1, length)).nbytes()
        except BadInput:
            return self.bytes(length + 1)


def grid(composed: bool) -> list[tuple[str, float]]:
    """Return policies with budgets: compositions at 1 (each part has its own budget or none), and
    single policies at each budget, unless `composed`.
    """
    whole = [(name, 1.0) for name in ("full", *STORES, *COMPOSED)]
    alone = () if composed else (*KEEPERS, *SELECTORS)
    return whole + [(name, budget) for name in alone for budget in BUDGETS]


def accuracy(right: str) -> float:
    """Compute the accuracy from the facts recalled of each text."""
    return sum(map(int, right)) / (FACTS * len(right))


def judge(model: Model, entries: str, grid: Sequence[tuple[str, float]]) -> list[dict[str, Any]]:
    """Test every policy and budget on the same questions, compositions also on the texts for
    choosing.

    share_of_bytes: relative to a full cache with as many slots as the text has tokens, mean over
        texts
    """
    given, other = asked(model, JUDGED), asked(model, CHOOSING)
    everything = {n: Trial(model, FULL, entries).bytes(n) for n in set(given.lengths)}
    rows = []
    with Bar("policies", len(grid)) as bar:
        for name, budget in grid:
            trial = Trial(model, Policy.parse(name, budget), entries)
            of = {n: trial.bytes(n) / whole for n, whole in everything.items()}
            shares = [of[n] for n in given.lengths]
            right, known = trial.right(given, aware=False), trial.right(given, aware=True)
            row = {
                "policy": name,
                "budget": budget,
                "entries": entries,
                "share_of_bytes": statistics.mean(shares),
                "least_share": min(shares),
                "largest_share": max(shares),
                "accuracy": accuracy(right),
                "accuracy_question_known": accuracy(known),
                "right_by_text": right,
                "right_by_text_question_known": known,
            }
            if name in COMPOSED:
                row["right_to_choose_by"] = trial.right(other, aware=False)
                row["right_to_choose_by_question_known"] = trial.right(other, aware=True)
            rows.append(row)
            bar.show(len(rows), {"policy": name, "recalled": f"{row['accuracy']:.3f}"})
    return rows


def show(rows: Sequence[dict[str, Any]]) -> None:
    table = Table("policy", "budget", "bytes of full", "accuracy", "question known")
    for row in rows:
        table.add_row(
            row["policy"] + (" (float32)" if row["entries"] == "float32" else ""),
            f"{row['budget']:g}",
            f"{row['share_of_bytes']:.1%}",
            f"{row['accuracy']:.3f}",
            f"{row['accuracy_question_known']:.3f}",
        )
    Console().print(table)


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw facts recalled against allocated bytes, with the question unknown and known at
    compression.

    One line per policy, its budgets as points. Read policies keep all bytes and are only in the
    table.
    """
    sides = (("accuracy", "question unknown"), ("accuracy_question_known", "question known"))
    smaller = [row for row in rows if not any(name in row["policy"] for name in SELECTORS)]
    series: dict[str, list[dict[str, Any]]] = {}
    for row in sorted(smaller, key=lambda row: row["share_of_bytes"]):
        name = re.sub(r":\d\d+", NUMBER, re.sub(r":0\.\d+", "", row["policy"]))
        series.setdefault(name, []).append(row)
    with saved_figure(path, (12, 5)) as figure:
        panels = figure.subplots(1, len(sides), sharey=True)
        for axes, (key, title) in zip(panels, sides, strict=True):
            for name, points in series.items():
                across = [row["share_of_bytes"] for row in points]
                axes.plot(across, [row[key] for row in points], label=name, **_shown(name))
            axes.axhline(0.95 * rows[0][key], color="grey", ls=":", lw=1)
            for limit in (0.25, 0.125):
                axes.axvline(limit, color="grey", ls=":", lw=1)
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter(lambda x, _: f"{x:.3g}")
            axes.set(title=title, xlabel="share of the bytes of a full 16-bit cache of the text")
            axes.set(ylim=(-0.03, 1.03))
            axes.grid(alpha=0.3)
        panels[0].set_ylabel("facts recalled (dotted: 95 % of the full cache)")
        handles = sorted(
            zip(*panels[0].get_legend_handles_labels(), strict=True), key=lambda h: h[1]
        )
        figure.legend(*zip(*handles, strict=True), loc="outside right upper", fontsize=8)


def _shown(name: str) -> dict[str, Any]:
    """Return colour (by eviction), line (by encoding) and marker (by spread of the budget)."""
    parts = name.replace(NUMBER, "").split("+")
    plain = "s" if NUMBER in name else "o"
    keeper = next((part for part in KEEPERS if part in parts), None)
    return {
        "color": "black" if keeper is None else f"C{KEEPERS.index(keeper)}",
        "ls": next((style for part, style in STYLES.items() if part in parts), "-"),
        "marker": next((mark for part, mark in MARKS.items() if part in parts), plain),
        "mfc": "white" if set(STORES) & set(parts) else None,
        "ms": 5,
        "lw": 1,
        "alpha": 0.8,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--composed", action="store_true", help="only compositions of policies")
    parser.add_argument(
        "--root", type=Path, default=Path("runs/retrieval"), help="folder of the models"
    )
    parser.add_argument(
        "--draw", action="store_true", help="only draw the figure, from the existing file"
    )
    given = parser.parse_args()
    path = HERE / (f"seed-{given.seed}.json" if given.seed else "results.json")
    picture = HERE / (f"seed-{given.seed}.png" if given.seed else "figure.png")
    if given.draw:
        draw([row for row in read(path) if row["entries"] == "bfloat16"], picture)
        return
    launch.prepare()
    numbers = f"train.steps={given.steps}", f"train.seed={given.seed}"
    overrides = [*MODEL, *numbers, f"data.path={corpus(given.root)}"]
    name = f"model-{given.seed}" if given.seed else "model"
    folder = RunDirectory(given.root / name)
    outcome = train_run(config.load("tiny", overrides), folder, title="retrieval")
    outcome.require_finished(folder.path)
    model = mukv.load(folder.path)
    rows = judge(model, "bfloat16", grid(given.composed))
    single = judge(model, "float32", [(name, 1.0) for name in ("full", *STORES)])
    lengths = {
        "judged": asked(model, JUDGED).lengths,
        "to_choose_by": asked(model, CHOOSING).lengths,
    }
    about = {"seed": given.seed, "steps": given.steps, "texts": lengths}
    write_atomic(path, text_of(about, rows + single))
    draw(rows, picture)
    show(rows + single)


def text_of(about: dict[str, Any], rows: Sequence[dict[str, Any]]) -> str:
    """Format JSON with one line per row."""
    lines = ",\n".join("  " + json.dumps(row) for row in rows)
    return f'{{"about": {json.dumps(about)},\n "rows": [\n{lines}\n ]}}\n'


def read(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text())["rows"]


if __name__ == "__main__":
    main()
