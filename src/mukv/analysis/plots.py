"""Plot the measures of `sparsity` and `clusters`: curves, heat maps, comparisons of texts.

Each function writes one picture to `path` and returns its caption.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mukv.analysis.clusters import READS, Prediction
from mukv.analysis.sparsity import LEAST, MASSES, NEAR, NEEDED, SHARES, SINKS, Sparsity
from mukv.show.figures import labels, legend, powers, saved_figure, series_styles

PANEL = (3.3, 3.0)
MOST_PANELS = 6
"""Maximum number of panels; of a model with more layers, this many evenly spaced ones are drawn."""
FEW_LAYERS = 10
"""Largest number of layers that each have a colour and a marker; more layers get colours of a
gradient, with a colour bar."""
COLOUR_MAP = "viridis"


def some(layers: Sequence[Sparsity]) -> list[Sparsity]:
    chosen = np.unique(np.linspace(0, len(layers) - 1, min(MOST_PANELS, len(layers))).astype(int))
    return [layers[index] for index in chosen]


def curves(layers: Sequence[Sparsity], path: Path) -> str:
    """Plot attention mass against the number of largest weights, at the longest context."""
    shown = some(layers)
    caption = (
        "Cumulative sorted attention mass of each head: mean over queries at the longest context; "
        "the shaded band spans the lowest and the highest query of any head."
    )
    with saved_figure(path, (PANEL[0] * len(shown), PANEL[1]), caption=caption) as figure:
        panels = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
        for axes, layer in zip(panels, shown, strict=True):
            last = layer.longest
            means = layer.curve["mean"][:, last]
            for head, (mean, style) in enumerate(
                zip(means, series_styles(len(means)), strict=True)
            ):
                style = {"color": style["color"], "linestyle": style["linestyle"]}
                axes.plot(layer.ranks, mean, lw=1, alpha=0.8, label=f"head {head}", **style)
            low = np.nanmin(layer.curve["low"][:, last], axis=0)
            high = np.nanmax(layer.curve["high"][:, last], axis=0)
            axes.fill_between(layer.ranks, low, high, color="grey", alpha=0.18, lw=0)
            axes.set(xscale="log", title=f"layer {layer.layer}", xlabel="largest weights read")
            axes.grid(alpha=0.3)
        panels[0].set(ylabel="attention mass", ylim=(0, 1.02))
        legend(figure, max(zip(panels, shown, strict=True), key=_heads)[0])
    return caption


def needed(layers: Sequence[Sparsity], path: Path) -> str:
    """Plot the number of entries that hold a share of the mass, against the context length."""
    shown = (0.8, 0.95, 0.99)
    caption = (
        "Smallest number of entries that hold a share of the attention mass, by context length: "
        "mean over heads. Dotted: all entries."
    )
    with saved_figure(path, (PANEL[0] * len(shown), PANEL[1]), caption=caption) as figure:
        panels = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
        for axes, mass in zip(panels, shown, strict=True):
            place = MASSES.index(mass)
            for layer, style in zip(layers, layer_styles(len(layers)), strict=True):
                with_queries = np.flatnonzero(layer.queries)
                mean = np.nanmean(layer.needed["mean"][:, with_queries, place], axis=0)
                axes.plot(2.0**with_queries, mean, label=f"layer {layer.layer}", **style)
            context = 2.0 ** np.arange(layers[0].longest + 1)
            axes.plot(context, context, color="grey", ls=":", lw=1, label="all entries")
            axes.set(yscale="log", title=f"{mass:.0%} of the mass")
            powers(axes.xaxis, context.tolist())
            axes.set(xlabel="context (up to), tokens")
            axes.grid(alpha=0.3)
        panels[0].set(ylabel="entries needed")
        layer_key(figure, panels, layers)
    return caption


def heads(layers: Sequence[Sparsity], path: Path) -> str:
    """Plot heat maps by layer and head, at the longest context."""
    place = MASSES.index(0.95)
    maps: dict[str, Any] = {
        "entries for 95 % of the mass": lambda x: x.needed["mean"][:, x.longest, place],
        f"mass on the first {SINKS}": lambda x: x.sinks[:, x.longest],
        f"mass on the last {NEAR}": lambda x: x.near[:, x.longest],
        "distance from the mean head": lambda x: x.far_from_mean[:, x.longest],
        "mass on the most-read entry": lambda x: [each.share for each in x.most_read[:-1]],
        "its position, median": lambda x: [each.position for each in x.most_read[:-1]],
    }
    tall = 1.2 + 0.22 * len(layers)
    caption = (
        "Measures by layer and head, at the longest context. The most-read entry is that of all "
        f"queries that see at least {LEAST} entries; its position is that in its document, median "
        "over windows."
    )
    with saved_figure(path, (PANEL[0] * 3, 2 * max(2.4, tall)), caption=caption) as figure:
        panels = figure.subplots(2, 3, squeeze=False)
        for axes, (title, of) in zip(panels.flat, maps.items(), strict=True):
            values = padded([np.asarray(of(layer), float) for layer in layers])
            heat(figure, axes, values, title, logarithmic="position" in title)
            axes.set(xlabel="head")
        for axes in panels[:, 0]:
            axes.set(ylabel="layer")
    return caption


def errors(layers: Sequence[Sparsity], path: Path) -> str:
    """Plot the relative error of the output against the attention mass that is left out."""
    sides = (("error", "values dropped"), ("renormalised", "and renormalised"))
    caption = (
        "Each point is a head: attention mass left out, and relative error of its output, when "
        "only the values of the largest weights are read. Dotted: both are equal."
    )
    with saved_figure(path, (2 * 1.3 * PANEL[0], 1.15 * PANEL[1]), caption=caption) as figure:
        panels = figure.subplots(1, 2, sharex=True, sharey=True, squeeze=False)[0]
        for axes, (name, title) in zip(panels, sides, strict=True):
            for place, (share, style) in enumerate(
                zip(SHARES, series_styles(len(SHARES)), strict=True)
            ):
                lost = [1 - x.top[:, x.longest, place] for x in layers]
                error = [getattr(x, name)[:, x.longest, place] for x in layers]
                axes.scatter(
                    np.concatenate(lost),
                    np.concatenate(error),
                    s=14,
                    alpha=0.7,
                    color=style["color"],
                    marker=style["marker"],
                    label=f"largest {share:.0%}",
                )
            axes.plot([0, 1], [0, 1], color="grey", ls=":", lw=1, label="equal")
            axes.set(title=title, xlabel="share of the mass lost")
            axes.grid(alpha=0.3)
        panels[0].set(ylabel="relative error of the output")
        legend(figure, panels[0])
    return caption


def agreement(layers: Sequence[Sparsity], path: Path) -> str:
    """Plot the overlap of the entries that two heads need (Jaccard index), for pairs of heads."""
    shown = some(layers)
    caption = (
        f"Overlap of two heads' entries with {NEEDED:.0%} of the mass: intersection over union."
    )
    with saved_figure(path, (PANEL[0] * len(shown), PANEL[1]), caption=caption) as figure:
        panels = figure.subplots(1, len(shown), squeeze=False)[0]
        for axes, layer in zip(panels, shown, strict=True):
            heat(figure, axes, layer.agreement, f"layer {layer.layer}", (0, 1))
            axes.set(xlabel="head")
        panels[0].set(ylabel="head")
    return caption


def texts(found: Mapping[str, Sequence[Sparsity]], path: Path) -> str:
    """Plot the measures of one model on several texts."""
    from matplotlib.ticker import MaxNLocator

    place = MASSES.index(0.95)
    panels_of = {
        "entries for 95 % of the mass": lambda x: x.needed["mean"][:, x.longest, place],
        f"mass on the first {SINKS}": lambda x: x.sinks[:, x.longest],
        f"mass on the last {NEAR}": lambda x: x.near[:, x.longest],
        f"output error, largest {SHARES[2]:.0%}": lambda x: x.error[:, x.longest, 2],
    }
    caption = "Comparison of texts: means over heads, at the longest context."
    with saved_figure(path, (PANEL[0] * len(panels_of), PANEL[1]), caption=caption) as figure:
        panels = figure.subplots(1, len(panels_of), squeeze=False)[0]
        for axes, (title, of) in zip(panels, panels_of.items(), strict=True):
            series = zip(labels(found), found.values(), series_styles(len(found)), strict=True)
            for name, layers, style in series:
                means = [float(np.mean(of(layer))) for layer in layers]
                axes.plot([layer.layer for layer in layers], means, ms=4, label=name, **style)
            axes.set_title(title, fontsize=9)
            axes.set(xlabel="layer")
            axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
            axes.grid(alpha=0.3)
        legend(figure, panels[0])
    return caption


def clusters(layers: Sequence[Prediction], path: Path) -> str:
    """Plot the attention mass that clusters capture, the F1 of their choice, and their sizes."""
    from matplotlib.ticker import MaxNLocator

    eighth = READS.index(1 / 8)
    caption = (
        "Entries are read cluster by cluster. Grey: as many entries with the largest weights (the "
        "upper bound), and as many latest entries."
    )
    with saved_figure(path, (PANEL[0] * 3.4, 1.1 * PANEL[1]), caption=caption) as figure:
        left, middle, right = figure.subplots(1, 3)
        for layer, style in zip(layers, layer_styles(len(layers)), strict=True):
            left.plot(READS, layer.captured.mean(axis=0), label=f"layer {layer.layer}", **style)
            each = layer.sizes.mean(axis=0)
            right.plot(np.arange(1, len(each) + 1), each, lw=1.2, color=style["color"])
        for name, style in (("largest", "--"), ("latest", ":")):
            means = np.nanmean([getattr(layer, name).mean(axis=0) for layer in layers], axis=0)
            left.plot(READS, means, color="grey", ls=style, label=f"the {name}, all layers")
        left.set(xscale="log", xlabel="share of entries read", ylabel="attention mass", ylim=(0, 1))
        left.minorticks_off()
        left.set_xticks(READS, [f"1/{round(1 / share)}" for share in READS])
        left.set_title("mass captured", fontsize=9)
        layer_key(figure, (left, middle, right), layers)
        heat(figure, middle, padded([x.f1[:, eighth] for x in layers]), "F1 at 1/8 read", (0, 1))
        middle.set(xlabel="head", ylabel="layer")
        right.set(yscale="log", xlabel="cluster, largest first", ylabel="share of the entries")
        right.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        right.set_title("sizes", fontsize=9)
        for axes in (left, right):
            axes.grid(alpha=0.3)
    return caption


def layer_styles(count: int) -> list[dict[str, Any]]:
    """Return a line style per layer: a colour and a marker, or a colour of `COLOUR_MAP` if there
    are more than FEW_LAYERS layers."""
    if count <= FEW_LAYERS:
        return [style | {"ms": 4, "lw": 1.2} for style in series_styles(count)]
    import matplotlib as mpl

    colours = mpl.colormaps[COLOUR_MAP](np.arange(count) / (count - 1))
    return [{"color": colour, "lw": 1.2} for colour in colours]


def layer_key(figure: Any, panels: Sequence[Any], layers: Sequence[Sparsity | Prediction]) -> None:
    """Add a legend of the lines of the first panel. If there are more than FEW_LAYERS layers, a
    colour bar beside the panels replaces their entries in the legend."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.ticker import MaxNLocator

    if len(layers) > FEW_LAYERS:
        for line in panels[0].get_lines():
            if line.get_label().startswith("layer "):
                line.set_label("_layer")
        ends = Normalize(layers[0].layer, layers[-1].layer)
        bar = figure.colorbar(ScalarMappable(ends, COLOUR_MAP), ax=list(panels), pad=0.01)
        bar.set_label("layer")
        bar.locator = MaxNLocator(8, integer=True)
        bar.update_ticks()
    legend(figure, panels[0])


def _heads(panel: tuple[Any, Sparsity]) -> int:
    return len(panel[1].curve["mean"])


def heat(
    figure: Any,
    axes: Any,
    values: np.ndarray,
    title: str,
    limits: tuple[float, float] | None = None,
    logarithmic: bool = False,
) -> None:
    """Draw a matrix as colours, with its numbers if it has at most 64.

    logarithmic: whether colours follow the logarithm of the values, which are at least 0
    """
    from matplotlib.colors import SymLogNorm

    low, high = limits or (None, None)
    scale: dict[str, Any] = {"vmin": low, "vmax": high}
    bar: dict[str, Any] = {"shrink": 0.85}
    if logarithmic:
        most = max(2, np.nanmax(values))
        scale = {"norm": SymLogNorm(1, vmin=0, vmax=most)}
        ticks = [0, *(4**power for power in range(12) if 4**power <= most)]
        bar |= {"ticks": ticks, "format": "%d"}
    image = axes.imshow(values, aspect="auto", cmap=COLOUR_MAP, **scale)
    axes.set_facecolor("0.8")
    figure.colorbar(image, ax=axes, **bar)
    axes.set_title(title, fontsize=9)
    axes.set_xticks(range(values.shape[1]) if values.shape[1] <= 16 else [])
    axes.set_yticks(range(values.shape[0]) if values.shape[0] <= 40 else [])
    if values.size > 64:
        return
    middle = image.norm(values)
    for (row, column), value in np.ndenumerate(values):
        if np.isfinite(value):
            colour = "white" if middle[row, column] < 0.6 else "black"
            shown = f"{value:.2f}" if abs(value) < 10 else f"{value:.0f}"
            axes.text(column, row, shown, ha="center", va="center", color=colour, fontsize=7)


def padded(rows: Sequence[np.ndarray]) -> np.ndarray:
    """Stack rows of different lengths (layers may differ in heads), padded with NaN."""
    table = np.full((len(rows), max(map(len, rows))), np.nan)
    for row, values in zip(table, rows, strict=True):
        row[: len(values)] = values
    return table
