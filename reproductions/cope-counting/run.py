"""Compare CoPE and RoPE on counting (Golovneva et al. 2024, section 5.2, at small size).

    python reproductions/cope-counting/run.py [--draw]

A program sets variables to zero, increments them, and has `pass` steps; at its end it prints one
variable. Models differ only in their position encoding. Each is tested at its own best learning
rate, by the percentage of wrong answers, at the training length and on longer programs whose
additional steps are all `pass`. Writes results.json and figure.png beside this file; --draw makes
the figure from the existing file.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

VARIABLES, LARGEST = 3, 9
PASS, SET, INCREMENT, PRINT, NUMBER = 0, 1, 1 + VARIABLES, 1 + 2 * VARIABLES, 1 + 3 * VARIABLES
VOCAB = NUMBER + LARGEST + 1
LENGTH, BATCH, STEPS = 64, 64, 1500
LONGER = (1, 2, 4)
POSITIONS = ("rope", "alibi", "nope", "cope")
NAMES = {"rope": "RoPE", "alibi": "ALiBi", "nope": "NoPE", "cope": "CoPE"}
GUESS = 100 * LARGEST / (LARGEST + 1)
"""Percentage of wrong answers of a random guess among the numbers."""
RATES = (1e-3, 3e-3)
SEEDS = (0, 1)


def programs(seed: int, rows: int, times: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Make token ids [row token] of programs, without the answer, and the answers [row].

    times: factor of the length, by added `pass` steps
    """
    random = np.random.default_rng(seed)
    steps = LENGTH - 1 - VARIABLES
    body = np.zeros((rows, steps), np.int64)
    count = np.zeros((rows, VARIABLES), np.int64)
    here = np.arange(rows)
    for step in range(steps):
        variable, kind = random.integers(VARIABLES, size=rows), random.random(rows)
        resets = (kind < 0.08) | ((kind < 0.5) & (count[here, variable] == LARGEST))
        adds = (kind < 0.5) & ~resets
        body[:, step] = np.where(resets, SET + variable, np.where(adds, INCREMENT + variable, PASS))
        count[here, variable] = np.where(resets, 0, count[here, variable] + adds)
    asked = random.integers(VARIABLES, size=rows)
    longer = np.zeros((rows, steps + (times - 1) * LENGTH), np.int64)
    # The order of the steps is kept; their places among the added ones are drawn.
    places = np.sort(
        random.permuted(np.tile(np.arange(longer.shape[1]), (rows, 1)), axis=1)[:, :steps]
    )
    np.put_along_axis(longer, places, body, axis=1)
    start = np.tile(SET + np.arange(VARIABLES), (rows, 1))
    tokens = np.concatenate([start, longer, (PRINT + asked)[:, None]], axis=1)
    return tokens.astype(np.int32), count[here, asked]


def train(point: tuple[str, float, int]) -> dict[str, Any]:
    """Train one model; return its wrong answers by length."""
    import jax

    from mukv.attention import Grouped
    from mukv.core.mesh import MeshShape
    from mukv.data.batches import Batch
    from mukv.model import Decoder, Stage
    from mukv.model.block import Gated
    from mukv.position import POSITIONS as TABLE
    from mukv.scaling.schedules import Cosine
    from mukv.train.step import Trainer, Training

    position, rate, seed = point
    attention = Grouped(TABLE[position](), heads=4, kv_heads=4, head_dim=16)
    model = Decoder(
        vocab_size=VOCAB,
        d_model=64,
        attention=attention,
        mlp=Gated(hidden=128),
        plan=(Stage(repeats=2),),
    )
    training = Training(
        steps=STEPS,
        seed=seed,
        batch=BATCH,
        length=LENGTH,
        learning_rate=rate,
        schedule=Cosine(warmup=STEPS // 20),
    )
    trainer = Trainer(model, training, MeshShape().build())
    state = trainer.initial_state()
    place = np.tile(np.arange(LENGTH, dtype=np.int32), (BATCH, 1))
    last = (place == LENGTH - 1).astype(np.float32)
    with jax.set_mesh(trainer.mesh):
        for step in range(STEPS):
            tokens, answers = programs(seed * 10**6 + step, BATCH)
            targets = np.tile((NUMBER + answers)[:, None], LENGTH).astype(np.int32)
            batch = Batch(tokens, targets, place, np.ones_like(place), last)
            state, _ = trainer.step(state, step, trainer.put(batch))

    @jax.jit
    def answer(weights: Any, tokens: jax.Array) -> jax.Array:
        logits = model.logits(weights, model.hidden(weights, tokens))
        return logits[:, -1].argmax(axis=-1) - NUMBER

    wrong = {}
    for times in LONGER:
        tokens, answers = programs(10**9 + seed, 1000, times)
        batches = np.split(tokens, 10)
        told = np.concatenate([np.asarray(answer(state.weights, part)) for part in batches])
        wrong[str(times * LENGTH)] = float((told != answers).mean())
    return {"position": position, "learning_rate": rate, "seed": seed, "wrong": wrong}


def settle(cores: Any) -> None:
    """Restrict this process to one core: small models do not use more."""
    os.sched_setaffinity(0, {cores.get()})


def judge(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Select for each position encoding the learning rate with the fewest wrong answers at the
    training length.
    """
    best = {}
    for position in POSITIONS:
        by_rate = {
            rate: [r for r in rows if r["position"] == position and r["learning_rate"] == rate]
            for rate in RATES
        }
        rate = min(
            RATES, key=lambda r: statistics.mean(x["wrong"][str(LENGTH)] for x in by_rate[r])
        )
        best[position] = {
            "learning_rate": rate,
            "wrong": {
                length: [row["wrong"][length] for row in by_rate[rate]]
                for length in by_rate[rate][0]["wrong"]
            },
        }
    return best


def draw(best: dict[str, Any], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for position, row in best.items():
        lengths = [int(length) for length in row["wrong"]]
        means = [100 * statistics.mean(wrong) for wrong in row["wrong"].values()]
        (line,) = axes.plot(lengths, means, marker="o", label=NAMES[position])
        for length, wrong in zip(lengths, row["wrong"].values(), strict=True):
            ends = 100 * min(wrong), 100 * max(wrong)
            axes.vlines(length, *ends, color=line.get_color(), alpha=0.5, lw=4)
    axes.axhline(GUESS, color="0.4", ls=":", label="a guess")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.set(
        xlabel="length of the program (training: 64)",
        ylabel="wrong answers, %",
        title="Counting one of three variables; thick lines: two seeds",
        ylim=(-3, 103),
    )
    axes.set_xticks(lengths)
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=5)
    figure.savefig(path, dpi=150)


def main() -> None:
    from rich.console import Console
    from rich.progress import track
    from rich.table import Table

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument(
        "--draw", action="store_true", help="only draw the figure, from the existing file"
    )
    given = parser.parse_args()
    here = Path(__file__).parent
    if given.draw:
        draw(json.loads((here / "results.json").read_text())["best"], here / "figure.png")
        return
    points = list(product(POSITIONS, RATES, SEEDS))
    spawn = multiprocessing.get_context("spawn")
    cores = spawn.Queue()
    for core in sorted(os.sched_getaffinity(0)):
        cores.put(core)
    with ProcessPoolExecutor(given.processes, spawn, settle, (cores,)) as pool:
        rows = list(track(pool.map(train, points), "training", total=len(points)))
    best = judge(rows)
    (here / "results.json").write_text(json.dumps({"best": best, "rows": rows}, indent=2) + "\n")
    draw(best, here / "figure.png")
    table = Table("wrong answers", "rate", *(f"{LENGTH * times} tokens" for times in LONGER))
    for position, row in best.items():
        shares = (f"{statistics.mean(wrong):.1%}" for wrong in row["wrong"].values())
        table.add_row(position, f"{row['learning_rate']:g}", *shares)
    Console().print(table)


if __name__ == "__main__":
    main()
