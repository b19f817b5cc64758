"""Low-rank adapters (LoRA): which weights have one, their declaration, and how they are merged.

Models have no code for adapters. The forward pass takes a tree of weights in which a `LowRank`
replaces each weight that has an adapter. Only the thin matrices A and B are optimised and saved.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from itertools import combinations
from math import prod
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp

from mukv.core.counts import require_counts
from mukv.core.errors import BadInput, nearest_name
from mukv.core.low_rank import LowRank, added, columns, factors, in_order, rows
from mukv.core.params import LAYER, WIDEST, Param, named
from mukv.core.typing import Array
from mukv.model.base import LanguageModel
from mukv.scaling.parameterization import changes
from mukv.scaling.stability import UpdateFamily
from mukv.train.adapted import WHERE, Adapting, structure

FIRST, SECOND = "a", "b"
"""Names of the two thin matrices in the tree, below the name of the weight that they change."""


@dataclass(frozen=True)
class Adapter(Adapting):
    """Low-rank adapters (LoRA, Hu et al. 2021): a weight W becomes W + alpha / rank * A B.

    W is the weight of `train.start` and does not change. A is initialised randomly and B to zero.
    The learning rate of A falls with the width like that of a hidden matrix; the learning rate of B
    is the same at every width (LoRA+, Hayou et al. 2024).

    rank: number of columns of A and of rows of B
    alpha: numerator of the factor alpha / rank
    weights: weights that get an adapter, by whole names ("stage0.slot0.mlp.up"), parts of names
        ("mlp", "query"), patterns ("*.mlp.*") or tags (query, key, value, gate); None for the
        hidden matrices of all layers, in attention and MLP
    ratio: learning rate of B as a multiple of A's at the base width (lambda of LoRA+)
    """

    rank: int = 8
    alpha: float = 16.0
    weights: tuple[str, ...] | None = None
    ratio: float = 1.0
    kind: Literal["low_rank"] = "low_rank"

    kind_may_be_left_out: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require_counts(self, "rank", most=WIDEST)
        for name in ("alpha", "ratio"):
            if getattr(self, name) <= 0:
                raise BadInput(name, getattr(self, name), "greater than 0")
        if self.weights is not None and not self.weights:
            raise BadInput("weights", [], "at least one name, or null")

    def chosen(self, declared: Any) -> dict[str, Param]:
        """Return the weights that get an adapter, by dotted name.

        declared: tree of the model's `Param`

        Raises BadInput for a name that stands for no matrix, and for a rank above the smaller side
        of a matrix.
        """
        every = named(declared)
        if self.weights is None:
            found = {name: param for name, param in every.items() if _by_default(name, param)}
        else:
            meant = {name for text in self.weights for name in _meant(text, every)}
            found = {name: param for name, param in every.items() if name in meant}
        if not found:
            raise BadInput(f"{WHERE}.weights", None, "names of weights: no layer has a matrix")
        for name, param in found.items():
            sides = [prod(param.dims[axis] for axis in axes(param)) for axes in (rows, columns)]
            if self.rank > min(sides):
                shape = f"{name} ({sides[0]:,} x {sides[1]:,})"
                allowed = f"at most {min(sides)}, the smaller side of {shape}"
                raise BadInput(f"{WHERE}.rank", self.rank, allowed)
        return found

    def params(self, declared: Any) -> dict[str, Any]:
        """Declare A and B of each adapter. Raises BadInput as `chosen` does."""
        tree: dict[str, Any] = {}
        for name, param in self.chosen(declared).items():
            node = tree
            for part in name.split("."):
                node = node.setdefault(part, {})
            node[FIRST], node[SECOND] = factors(param, self.rank)
        return tree

    def resolved(self, model: LanguageModel, family: UpdateFamily = "adam") -> Any:
        declared = self.params(model.params())
        found = named(model.scaling.resolve(declared, len(model.layers), family))
        for name, resolved in found.items():
            if name.endswith(f".{SECOND}"):
                rate = resolved.learning_rate * self.ratio
                found[name] = replace(resolved, deviation=0.0, learning_rate=rate)
        return structure(declared).unflatten(found.values())

    def attached(self, model: LanguageModel, base: Any, own: Any) -> Any:
        return self._joined(model, model.scaled(base), own, dict[str, Any](), _low_rank)

    def merged(self, model: LanguageModel, base: Any, own: Any) -> Any:
        base = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), base)
        # The forward pass multiplies the merged weight by its multiplier, so A B is divided by it.
        shares = {name: weight.multiplier for name, weight in named(model.resolved()).items()}
        return self._joined(model, base, own, shares, added)

    def _joined(
        self, model: LanguageModel, base: Any, own: Any, shares: Mapping[str, Any], join: Any
    ) -> Any:
        """Replace each weight that has an adapter by `join(param, weight, a, b)`.

        b is multiplied by alpha / rank and divided by the number in `shares` (1 if missing).
        """
        declared = model.params()
        thin = model.scaling.scale(self.params(declared), own, len(model.layers))
        parts, whole = named(thin), named(base)
        for name, param in self.chosen(declared).items():
            a, b = (parts[f"{name}.{part}"] for part in (FIRST, SECOND))
            b = b * (self.alpha / self.rank)
            share = shares.get(name, 1.0)
            whole[name] = join(param, whole[name], a, b / share if changes(share) else b)
        return structure(declared).unflatten(whole[name] for name in named(declared))


def _low_rank(param: Param, base: Array, a: Array, b: Array) -> LowRank | Array:
    """Return a `LowRank`, or the sum where products with the parts are not possible: for an
    embedding, and for axes in another order."""
    if param.role == "embedding" or not in_order(param):
        return added(param, base, a, b)
    return LowRank(base, a, b)


def _by_default(name: str, param: Param) -> bool:
    """Whether a weight is a hidden matrix of a layer's attention or MLP."""
    hidden = param.role == "hidden" and LAYER in param.dims and bool(rows(param))
    return hidden and "position" not in name.split(".")


def _meant(text: str, declared: Mapping[str, Param]) -> list[str]:
    """Return the matrices that a name, a part of a name, a pattern or a tag stands for. Raises
    BadInput if there are none."""
    pattern = any(letter in text for letter in "*?[")

    def is_meant(name: str, param: Param) -> bool:
        if pattern:
            return fnmatchcase(name, text)
        return text == param.tag or f".{text}." in f".{name}."

    found = [name for name, param in declared.items() if is_meant(name, param)]
    matrices = [name for name in found if rows(declared[name])]
    if matrices:
        return matrices
    where, last = f"{WHERE}.weights", sorted({_last(n) for n, p in declared.items() if rows(p)})
    names = f"a name, a part of one, a tag or a pattern of: {', '.join(last)}"
    if found:
        raise BadInput(where, text, f"a matrix: {found[0]} is a gain or bias; {names}")
    raise BadInput(where, text, names, nearest_name(text, _names(declared)))


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _names(declared: Mapping[str, Param]) -> list[str]:
    """Return all texts that stand for a matrix: names, parts of names, and tags."""
    found: dict[str, None] = {}
    for name, param in declared.items():
        if not rows(param):
            continue
        parts = name.split(".")
        ends = combinations(range(len(parts) + 1), 2)
        found |= dict.fromkeys(".".join(parts[start:end]) for start, end in ends)
        found |= {} if param.tag is None else {param.tag: None}
    return list(found)
