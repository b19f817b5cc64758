"""Figures without a screen, written whole or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mukv.core.files import replacing


@contextmanager
def saved_figure(path: Path, size: tuple[float, float], title: str | None = None) -> Iterator[Any]:
    """A figure that lies in `path` (PNG) once the block is left. size: inches."""
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with mpl.rc_context({"font.size": 10}):
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(figure)
        yield figure
        if title:
            figure.suptitle(title)
        with replacing(path) as made:
            figure.savefig(made, dpi=150, format="png")
