"""Compare cache policies on one model: quality of text, retrieval, bytes, reads and time.

Run: python benchmarks/leaderboard.py --model DIR --text FILE [FILE ...] --out FOLDER
    [--policies snapkv,kvzip,...] [--budgets 0.5,0.25] [--length 1024] [--follow 128]
    [--rows 12] [--samples 24] [--tasks needle,needle_multi_key]

The protocol is that of kvpress' leaderboard: a context is read whole and compressed once, and what
follows it is read at its true positions with nothing dropped any more. A context is prefilled once
for all policies, and read again once for all budgets and stores of `kvzip`.

- added loss: of the `--follow` tokens behind a context of `--length` tokens of text, in nats a
  token, less that of the full cache; the interval is over rows.
- unseen, seen: fraction of RULER's questions (numbers of seven digits in filler, in the model's
  chat template) of whose answers every token is the likeliest, as greedy decoding would write it.
  The question follows the compressed context, or is its end.
- bytes, reads, tokens/s, compression: of one row, as in `mukv compress`; bytes are those of the
  compressed context and one tail.

`--out` gets finished.jsonl, with every measurement at once: the same command goes on where it
stopped, and further policies are added. leaderboard.json, .md and .png follow after each batch.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from itertools import zip_longest
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import mukv
from mukv.bench.asking import Asker
from mukv.cache import FULL, RECORD, Policy
from mukv.cache.reads import bytes_read
from mukv.cache.replay import KVzip
from mukv.cache.words import split
from mukv.compress.finished import Finished, key_of
from mukv.compress.reader import PolicyReader, for_steps, kept_shares, one_row
from mukv.core.compute import settled
from mukv.core.statistics import of_mean, wilson
from mukv.infer.prompts import PROMPT_MULTIPLE, round_up
from mukv.infer.replay import kept_by_scores, replayed, require_replay
from mukv.model import Decoder
from mukv.model.policy_check import check_policy
from mukv.show.figures import labels, legend, powers, saved_figure, series_styles
from mukv.storage.files import write_atomic
from mukv.tasks.prompts import PROMPTED, PromptForm

VERSION = 1
"""Part of the key of every measurement: a change of what is measured changes it."""
TOKENS = 4096
"""Most tokens of contexts that are read at once."""
RATIOS = "cache_bytes", "bytes_read_per_step", "decoding", "prefill_seconds"
"""Columns of the table that are fractions of the full cache's."""
WIDTH = 32
"""What is read behind contexts is padded to a multiple of this many tokens."""
POLICIES = (
    "random,streaming,knorm,keydiff,tova,snapkv(window=64),snapkv(window=64)+adaptive,"
    "snapkv(window=64)+critical,snapkv(window=64)+merge,expected,"
    "expected(epsilon=0.01,recent=0)+adaptive,lagkv,cur,compactor,pages,int8,int4,fp8,rotated,kvzip"
)


@dataclass(frozen=True)
class Batch:
    """Contexts that are compressed, and what is read behind them.

    kind: "text", or whether the question is "unseen" or "seen" when a context is compressed
    contexts: ids, padded, int32 [row token]. count: number of ids of each row
    behind: ids, padded, int32 [row token]. graded: which of them are graded, bool [row token]
    rows: number of rows that are not repeated only to fill the batch
    """

    kind: str
    contexts: np.ndarray
    count: np.ndarray
    behind: np.ndarray
    graded: np.ndarray
    rows: int

    def first(self) -> Batch:
        """Return the first row."""
        arrays = (self.contexts, self.count, self.behind, self.graded)
        return Batch(self.kind, *(array[:1] for array in arrays), 1)


@dataclass(frozen=True)
class Board:
    """A model, the number of tokens of a context, and the number of contexts in a batch."""

    model: Any
    length: int
    rows: int
    replays: list[tuple[Batch, Any, Any]] = field(default_factory=list)
    """Second readings of the last two batches: a batch, how its entries are scored, the scores."""

    @cached_property
    def reader(self) -> PolicyReader:
        """Reads contexts; behind them a cache has room for one tail alone."""
        compute = settled(self.model.run.train.compute)
        given = self.model.network, self.model.decoding, compute
        return PolicyReader(*given, self.length, self.length + 1)

    def record(self, batch: Batch) -> tuple[Any, float]:
        """Read contexts with all entries and queries; also return the seconds of one row."""
        reader, rows = self.reader, len(batch.contexts)
        given = reader.cache(rows, RECORD, {}), *map(jnp.asarray, (batch.contexts, batch.count))
        start = time.perf_counter()
        found = reader.model.prefill(reader.weights, *given, fresh=True, compute=reader.compute)
        record = jax.block_until_ready(found[1])
        return record, (time.perf_counter() - start) / rows

    def compressed(self, record: Any, batch: Batch, policy: Policy) -> tuple[Any, float]:
        """Return the cache of contexts under a policy, and the seconds of one row; of a policy that
        reads contexts twice, those of the second reading."""
        reader = self.reader
        chosen, centres = self.model.calibrated(policy)
        if not chosen.keep.replays:
            return reader.compressed(record, chosen, centres, batch.contexts)
        whole, seconds = reader.compressed(record, FULL, {}, batch.contexts)
        scores, replaying = self.replay(whole, batch, chosen)
        room = len(batch.contexts), reader.read, reader.tail
        given = reader.model, reader.weights, whole, scores, chosen, room, 0, reader.compute
        start = time.perf_counter()
        cache = jax.block_until_ready(kept_by_scores(*given))
        spent = time.perf_counter() - start + replaying
        return cache, seconds + spent / len(batch.contexts)

    def replay(self, whole: Any, batch: Batch, policy: Policy) -> tuple[Any, float]:
        """Read contexts again; return the score of each entry, and the seconds without compiling.
        Policies that score alike share one reading of a batch. whole: the full cache"""
        assert isinstance(policy.keep, KVzip)
        for known, scoring, found in self.replays:
            if known is batch and scoring == policy.keep.scoring:
                return found
        require_replay(self.reader.model, policy, max(batch.count))
        pairs = zip(batch.contexts, batch.count, strict=True)
        prompts = [row[:count].tolist() for row, count in pairs]
        given = self.reader.model, self.reader.weights, whole, prompts, policy.keep
        start = time.perf_counter()
        scores, compiling = jax.block_until_ready(replayed(*given, self.reader.compute))
        found = scores, time.perf_counter() - start - compiling
        self.replays[:] = [*self.replays[-1:], (batch, policy.keep.scoring, found)]
        return found

    def graded(self, cache: Any, batch: Batch) -> dict[str, Any]:
        """Read what is behind compressed contexts. Returns for each row the mean loss of the graded
        tokens in nats, and whether each of them is the likeliest."""
        reader = self.reader
        behind = jnp.asarray(batch.behind)
        read = reader.model.read_block
        logits, _ = read(reader.weights, cache, behind[:, :-1], reader.compute, joins=False)
        loss, best = map(np.asarray, _graded(logits, behind[:, 1:]))
        graded = batch.graded[:, 1:]
        losses = (loss * graded).sum(axis=1) / graded.sum(axis=1)
        right = (best | ~graded).all(axis=1)
        return {"loss": np.round(losses.astype(float), 6).tolist(), "right": right.tolist()}

    def cost(self, record: Any, prefill: float, batch: Batch, policy: Policy) -> dict[str, Any]:
        """Measure bytes, reads and times of one row. prefill: seconds of reading it"""
        reader = self.reader
        self.compressed(record, batch, policy)  # the first time compiles
        cache, seconds = self.compressed(record, batch, policy)
        kept = kept_shares(cache) if policy.keep.evicts else np.ones(1)
        full = for_steps(self.compressed(record, batch, FULL)[0])
        own = for_steps(cache) if policy != FULL else full
        speed = reader.speeds(own, policy, full, batch.behind)

        def step(cache: Any, weights: Any) -> Any:
            token = jnp.zeros(1, jnp.int32)
            logits, cache = reader.model.step(weights, cache, token, compute=reader.compute)
            return logits, cache.split()[1]

        return {
            "kept": float(kept.mean()),
            "cache_bytes": cache.nbytes(),
            "bytes_read_per_step": bytes_read(step, jax.eval_shape(lambda: cache), reader.weights),
            "step_seconds": speed.seconds,
            "decoding_of_full": speed.full,
            "prefill_seconds": prefill + seconds,
        }


@jax.jit
def _graded(logits: Any, target: Any) -> tuple[Any, Any]:
    """Return -log p of each target in nats, and whether it is the likeliest; [row token]."""
    own = jnp.take_along_axis(logits, target[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - own, jnp.argmax(logits, axis=-1) == target


def text_batches(board: Board, options: argparse.Namespace) -> list[Batch]:
    """Cut texts into rows and take some in random order; more rows have the same ones first."""
    length, size = board.length, board.length + options.follow + 1
    rows = [
        ids[at : at + size]
        for ids in (board.model.encode(path.read_text("utf-8")) for path in options.text)
        for at in range(0, len(ids) - size + 1, size)
    ]
    if len(rows) < options.rows:
        sys.exit(f"--text: {len(rows)} rows of {size} tokens; more text, or fewer --rows")
    order = np.random.default_rng(options.seed).permutation(len(rows))[: options.rows]
    return batches(board, "text", [(rows[at][:length], rows[at][length:], 1) for at in order])


def question_batches(board: Board, options: argparse.Namespace) -> list[list[Batch]]:
    """Make questions, twice: their contexts end before the question, or after it."""
    asker, items = Asker(board.model), {"unseen": [], "seen": []}
    share = -(-options.samples // len(options.tasks))
    for name in options.tasks:
        form = PromptForm(PROMPTED[name])
        for prompt in asker.fitting(form, board.length, options.seed, np.arange(share)):
            if len(prompt.answers) != 1:
                sys.exit(f"--tasks {name}: tasks with one answer each, such as needle")
            whole = asker.encoded(f"{asker.whole(prompt)} {prompt.answers[0]}")
            for kind, own in items.items():
                context, behind = asker.parts(prompt, after=kind == "seen")
                own.append((context, whole[len(context) :], len(behind)))
    return [batches(board, kind, own) for kind, own in items.items()]


def batches(board: Board, kind: str, items: Sequence[tuple[Any, Any, int]]) -> list[Batch]:
    """Pad contexts and what follows them to batches of one shape.

    items: ids of a context, ids behind it, and the place of the first one that is graded
    """
    size, found = board.rows, []
    width = round_up(max(len(behind) for _, behind, _ in items), WIDTH) + 1
    for first in range(0, len(items), size):
        chosen = [items[min(at, len(items) - 1)] for at in range(first, first + size)]
        contexts = np.zeros((size, board.length), np.int32)
        behind = np.zeros((size, width), np.int32)
        graded = np.zeros((size, width), bool)
        for row, (context, further, start) in enumerate(chosen):
            contexts[row, : len(context)] = context
            behind[row, : len(further)] = further
            graded[row, start : len(further)] = True
        count = np.array([len(context) for context, _, _ in chosen], np.int32)
        rows = min(size, len(items) - first)
        found.append(Batch(kind, contexts, count, behind, graded, rows))
    return found


def candidates(board: Board, options: argparse.Namespace) -> dict[Policy, float]:
    """Return `full`, then each policy with each budget, once where the budget has no effect."""
    found = {FULL: 1.0}
    for name in split(options.policies, ","):
        for budget in options.budgets if Policy.takes_budget(name) else (1.0,):
            policy = Policy.parse(name, budget, "--policies")
            check_policy(board.model.network.stack, policy)
            found.setdefault(policy, budget)
    return found


def measure(
    board: Board, batch: Batch, number: int, left: Sequence[Policy]
) -> Iterator[tuple[Policy, dict[str, Any]]]:
    """Measure policies on one batch; on the first one also what they cost."""
    record, _ = board.record(batch)
    alone, one, prefill = batch.first(), one_row(record), 0.0
    for _ in range(2 * (number == 0)):  # the first time compiles
        prefill = board.record(alone)[1]
    for policy in left:
        cache, _ = board.compressed(record, batch, policy)
        found = board.graded(cache, batch)
        if number == 0:
            found |= board.cost(one, prefill, alone, policy)
        yield policy, found


def summary(
    batches: Sequence[Batch], known: Sequence[dict[Policy, Any]], compared: dict[Policy, float]
) -> list[dict[str, Any]]:
    """Return a row for each policy, from the batches on which all of them were measured."""
    done = [n for n, found in enumerate(known) if all(policy in found for policy in compared)]

    def values(policy: Policy, kind: str, name: str) -> np.ndarray:
        parts = [known[n][policy][name][: batches[n].rows] for n in done if batches[n].kind == kind]
        return np.concatenate([*parts, []])

    rows = []
    for policy, budget in compared.items():
        cost, full = known[0][policy], known[0][FULL]
        loss = values(policy, "text", "loss")
        added = loss - values(FULL, "text", "loss")
        row = {"policy": policy.name, "budget": budget, "texts": len(loss)}
        row |= {"perplexity": math.exp(loss.mean()), "added_loss": float(added.mean())}
        row["added_loss_interval"] = None if policy == FULL else of_mean(added)
        for kind in ("unseen", "seen"):
            right = values(policy, kind, "right")
            row[kind] = float(right.mean()) if len(right) else None
            row[f"{kind}_interval"] = wilson(right.sum(), len(right))
        row["questions"] = len(values(policy, "unseen", "right"))
        for name in ("cache_bytes", "bytes_read_per_step", "prefill_seconds"):
            row |= {name: cost[name], f"{name}_of_full": cost[name] / full[name]}
        row["tokens_per_second"] = 1 / cost["step_seconds"]
        row["decoding_of_full"] = 1.0 if policy == FULL else cost["decoding_of_full"]
        rows.append(row | {"kept": cost["kept"]})
    return rows


def drawn(rows: Sequence[dict[str, Any]], path: Path, title: str) -> None:
    """Draw loss and both scores against bytes, a line for each policy."""
    names = list(dict.fromkeys(row["policy"] for row in rows if row["policy"] != "full"))
    up = {"added_loss": "added loss, nats a token", "unseen": "right answers, question unseen"}
    up["seen"] = "right answers, question seen"
    with saved_figure(path, (13, 4.5), title, title) as figure:
        axes = figure.subplots(1, len(up))
        for axis, (key, label) in zip(axes, up.items(), strict=True):
            styles = zip(names, labels(names), series_styles(len(names)), strict=True)
            for name, shown, style in styles:
                own = [row for row in rows if row["policy"] == name]
                points = sorted(
                    (
                        row["cache_bytes_of_full"],
                        row[key],
                        *(row[f"{key}_interval"] or [row[key]] * 2),
                    )
                    for row in own
                )
                x, y, low, high = np.array(points).T
                look = {"linewidth": 1, "elinewidth": 0.4, "markersize": 4, **style}
                axis.errorbar(x, y, [y - low, high - y], label=shown, **look)
            axis.axhline(rows[0][key], color="0.8", linewidth=1, zorder=0)
            powers(axis.xaxis, [row["cache_bytes_of_full"] for row in rows])
            axis.set(xlabel="bytes, of full", ylabel=label)
            axis.grid(alpha=0.3)
        legend(figure, axes[0])


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return the rows as a table in Markdown, the best answers to unseen questions first."""
    lines = [
        "| policy | budget | added loss | unseen | seen | bytes | reads | decoding | prefill |"
    ]
    lines.append("|" + "---|" * 9)

    def interval(ends: Any, digits: int) -> str:
        return "" if ends is None else f" ({ends[0]:.{digits}f} to {ends[1]:.{digits}f})"

    for row in sorted(rows, key=lambda row: (-(row["unseen"] or 0), row["added_loss"])):
        ratios = (row[f"{name}_of_full"] for name in RATIOS)
        scores = (
            "" if row[k] is None else f"{row[k]:.2f}{interval(row[f'{k}_interval'], 2)}"
            for k in ("unseen", "seen")
        )
        loss = f"{row['added_loss']:.3f}{interval(row['added_loss_interval'], 3)}"
        cells = [f"`{row['policy']}`", f"{row['budget']:g}", loss, *scores]
        lines.append("| " + " | ".join([*cells, *(f"{ratio:.2f}" for ratio in ratios)]) + " |")
    return "\n".join(lines) + "\n"


def main(given: Sequence[str] | None = None) -> None:
    """Measure, and write table and figure after each batch. given: arguments, instead of those of
    the command line"""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--text", type=Path, nargs="+", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--policies", default=POLICIES)
    parser.add_argument("--budgets", default="0.5,0.25")
    parser.add_argument("--tasks", default="needle,needle_multi_key")
    sizes = {"length": 1024, "follow": 128, "rows": 12, "samples": 24, "seed": 0}
    for name, number in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=number)
    options = parser.parse_args(given)
    options.budgets = tuple(map(float, options.budgets.split(",")))
    options.tasks = options.tasks.split(",")
    if unknown := set(options.tasks) - set(PROMPTED):
        sys.exit(f"--tasks {', '.join(unknown)}: allowed: {', '.join(PROMPTED)}")
    if options.length % PROMPT_MULTIPLE:
        sys.exit(f"--length {options.length}: a multiple of {PROMPT_MULTIPLE}")
    most = min(TOKENS // options.length, max(options.rows, options.samples))
    board = Board(mukv.load(options.model), options.length, max(1, most))
    if not isinstance(board.model.network, Decoder):
        sys.exit(f"--model {options.model}: a decoder")
    compared = candidates(board, options)
    kinds = [text_batches(board, options), *question_batches(board, options)]
    every = [batch for turn in zip_longest(*kinds) for batch in turn if batch is not None]

    finished, leaves = Finished(options.out), jax.tree.flatten(board.model.weights)
    shared = VERSION, str(leaves[1]), key_of(*leaves[0]), board.model.network, board.length
    known: list[dict[Policy, Any]] = [{} for _ in every]
    start = time.monotonic()
    for number, batch in enumerate(every):
        facts = [getattr(batch, each.name) for each in fields(batch)]
        own = {policy: key_of(*shared, number == 0, *facts, policy) for policy in compared}
        left = [policy for policy in compared if finished.get(own[policy]) is None]
        for policy, found in measure(board, batch, number, left) if left else ():
            finished.add(own[policy], found)
            loss, right = np.mean(found["loss"]), sum(found["right"][: batch.rows])
            said = f"loss {loss:.3f}" if batch.kind == "text" else f"{right} of {batch.rows} right"
            spent = f"{time.monotonic() - start:6.0f} s, batch {number + 1} of {len(every)}"
            print(f"{spent}, {batch.kind}, {policy}: {said}", flush=True)
        known[number] = {policy: finished.known[key] for policy, key in own.items()}
        if left or number + 1 == len(every):
            rows = summary(every, known, compared)
            write_atomic(options.out / "leaderboard.json", json.dumps(rows, indent=1) + "\n")
            write_atomic(options.out / "leaderboard.md", table(rows))
            title = f"Cache policies of {options.model.name}, contexts of {board.length} tokens, "
            title += f"{rows[0]['texts']} texts, {rows[0]['questions']} questions"
            if rows[0]["seen"] is not None:
                drawn(rows, options.out / "leaderboard.png", title)
    print((options.out / "leaderboard.md").read_text())


if __name__ == "__main__":
    main()
