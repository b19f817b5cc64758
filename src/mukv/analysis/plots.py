"""Pictures of what `sparsity` measures: curves, heat maps, texts side by side."""

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
"""Layers with a panel of their own; of more, so many spread evenly."""
FEW_LAYERS = 10
"""Layers that have a colour and a mark each; more have colours in their order."""
ColourMap = "viridis"


def some(layers: Sequence[Sparsity]) -> list[Sparsity]:
    chosen = np.unique(np.linspace(0, len(layers) - 1, min(MOST_PANELS, len(layers))).astype(int))
    return [layers[index] for index in chosen]


def curves(layers: Sequence[Sparsity], path: Path) -> str:
    """Mass against the number of largest weights, at the longest context."""
    shown = some(layers)
    caption = (
        "Sorted attention mass of each head: mean over queries of the longest context; the shade "
        "goes from the worst query of any head to the best."
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
    """Entries for a share of the mass against the context."""
    shown = (0.8, 0.95, 0.99)
    caption = "Entries that hold a share of the mass, by context: mean over heads. Dotted: all."
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
    """Heat maps of layers and heads at the longest context."""
    place = MASSES.index(0.95)
    maps: dict[str, Any] = {
        "entries for 95 % of the mass": lambda x: x.needed["mean"][:, x.longest, place],
        f"mass on the first {SINKS}": lambda x: x.sinks[:, x.longest],
        f"mass on the last {NEAR}": lambda x: x.near[:, x.longest],
        "distance from the mean head": lambda x: x.far_from_mean[:, x.longest],
        "mass on the most-read entry": lambda x: [each.share for each in x.most_read[:-1]],
        "position of the most-read entry": lambda x: [each.position for each in x.most_read[:-1]],
    }
    tall = 1.2 + 0.22 * len(layers)
    caption = (
        "By layer and head, at the longest context; the most-read entry: over all queries that see "
        f"at least {LEAST}, by its position in its document (0 is the first, grey: none)."
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
    """What is lost of the output against what is lost of the mass."""
    sides = (("error", "values dropped"), ("renormalised", "and renormalised"))
    caption = (
        "Each point is a head: mass lost and error of its output when only the values of the "
        "largest weights are read. Dotted: equal."
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
    """Which heads need the same entries."""
    shown = some(layers)
    caption = (
        f"Of the entries with {NEEDED:.0%} of the mass of either head, the share that both need."
    )
    with saved_figure(path, (PANEL[0] * len(shown), PANEL[1]), caption=caption) as figure:
        panels = figure.subplots(1, len(shown), squeeze=False)[0]
        for axes, layer in zip(panels, shown, strict=True):
            heat(figure, axes, layer.agreement, f"layer {layer.layer}", (0, 1))
            axes.set(xlabel="head")
        panels[0].set(ylabel="head")
    return caption


def texts(found: Mapping[str, Sequence[Sparsity]], path: Path) -> str:
    """The same model on different texts."""
    from matplotlib.ticker import MaxNLocator

    place = MASSES.index(0.95)
    panels_of = {
        "entries for 95 % of the mass": lambda x: x.needed["mean"][:, x.longest, place],
        f"mass on the first {SINKS}": lambda x: x.sinks[:, x.longest],
        f"mass on the last {NEAR}": lambda x: x.near[:, x.longest],
        f"output error, largest {SHARES[2]:.0%}": lambda x: x.error[:, x.longest, 2],
    }
    caption = "Texts side by side: means over heads, at the longest context."
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
    """What clusters capture of the mass, how well they name what is needed, how even they are."""
    from matplotlib.ticker import MaxNLocator

    eighth = READS.index(1 / 8)
    caption = (
        "Entries are read cluster by cluster. Grey: as many entries, chosen by their weights "
        "(the most that is possible) and simply the latest."
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
    """Styles of lines of a few layers, or colours in the order of many."""
    if count <= FEW_LAYERS:
        return [style | {"ms": 4, "lw": 1.2} for style in series_styles(count)]
    import matplotlib as mpl

    colours = mpl.colormaps[ColourMap](np.arange(count) / (count - 1))
    return [{"color": colour, "lw": 1.2} for colour in colours]


def layer_key(figure: Any, panels: Sequence[Any], layers: Sequence[Sparsity | Prediction]) -> None:
    """Tell which line is which layer: in a legend, or of many by a bar of their colours.

    The first panel names its lines; those that are not layers are in the legend in any case.
    """
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.ticker import MaxNLocator

    if len(layers) > FEW_LAYERS:
        for line in panels[0].get_lines():
            if line.get_label().startswith("layer "):
                line.set_label("_layer")
        ends = Normalize(layers[0].layer, layers[-1].layer)
        bar = figure.colorbar(ScalarMappable(ends, ColourMap), ax=list(panels), pad=0.01)
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
    """A matrix as colours, with its numbers where there is room.

    logarithmic: whether colours follow the logarithm of the values, which go from 0
    """
    from matplotlib.colors import SymLogNorm

    low, high = limits or (None, None)
    if logarithmic:
        scale: dict[str, Any] = {"norm": SymLogNorm(1, vmin=0, vmax=max(2, np.nanmax(values)))}
    else:
        scale = {"vmin": low, "vmax": high}
    image = axes.imshow(values, aspect="auto", cmap=ColourMap, **scale)
    axes.set_facecolor("0.8")
    figure.colorbar(image, ax=axes, shrink=0.85)
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
    """Layers may have different numbers of heads: what is not there is NaN."""
    table = np.full((len(rows), max(map(len, rows))), np.nan)
    for row, values in zip(table, rows, strict=True):
        row[: len(values)] = values
    return table
