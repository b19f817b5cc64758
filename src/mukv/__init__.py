"""mukv: a JAX laboratory for transformers with a small memory.

`mukv.load(path)` turns a run directory into a model: `model.logits(tokens)`,
`model.generate(prompt)`. Loaded on first use, so that importing mukv costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mukv.core.version import VERSION

if TYPE_CHECKING:
    from mukv.runs.loaded import Model as Model
    from mukv.runs.loaded import load as load

__version__ = VERSION
__all__ = ["Model", "__version__", "load"]


def __getattr__(name: str) -> Any:
    if name not in ("load", "Model"):
        raise AttributeError(f"module 'mukv' has no attribute {name!r}")
    from mukv.runs import loaded

    return getattr(loaded, name)
