"""Cluster centres calibrated once per model, to choose the entries that a query reads.

Every entry is labelled when it is written, every query has a score for each label, and a policy
reads the entries of the labels with the highest scores. The kind says what was clustered. `keys`
and `means` (attention-weighted mean keys of queries) label an entry by the nearest centre and score
a label by the centre's product with the query. `queries` label an entry by the query centre with
the largest product. `aligned` has centres of both, and a table of attention between them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp

from mukv.attention import Attention
from mukv.cache.calibration import FACTS, CalibrationForm
from mukv.cache.kmeans import distances, nearest
from mukv.core.errors import BadInput, nearest_name
from mukv.core.typing import Array, Float, Int

Kind = Literal["keys", "queries", "means", "aligned"]
KINDS: tuple[Kind, ...] = ("keys", "queries", "means", "aligned")
FORM = CalibrationForm("calibration", "mukv-centres", "centres", "keys")

HeadPoints = Float[Array, "*batch kv_heads point width"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LayerCentres:
    """Centres of one layer that writes entries.

    key: centres that label entries; for kind `queries`, the centres of queries
    query: centres of queries; only for kind `aligned`, else None
    table: logarithm of the mean attention weight that queries of a query cluster give to an entry
        of each label; only for kind `aligned`, else None
    """

    key: Float[Array, "kv_heads cluster width"]
    query: Float[Array, "kv_heads query_cluster width"] | None = None
    table: Float[Array, "kv_heads query_cluster cluster"] | None = None

    def labels(self, key: HeadPoints, kind: Kind) -> Int[Array, "*batch kv_heads point"]:
        """Return the cluster of each entry.

        key: keys as they are multiplied with queries, with their pieces concatenated
        """
        if kind == "queries":
            return jnp.argmax(_products(key, self.key), axis=-1).astype(jnp.int32)
        return nearest(key, self.key)

    def scores(
        self, query: HeadPoints, kind: Kind
    ) -> Float[Array, "*batch kv_heads point cluster"]:
        """Return each query's score of each cluster; only the order of scores is meaningful.

        query: queries as they are multiplied with keys: scaled, with their pieces concatenated, and
            one point per query head of a group
        """
        if kind == "queries":
            return -distances(query, self.key)
        if kind == "aligned":
            assert self.query is not None
            assert self.table is not None
            heads = jnp.arange(len(self.table))[:, None]
            return self.table[heads, nearest(query, self.query)]
        return _products(query, self.key)


@dataclass(frozen=True)
class Centres:
    """Calibration that `mukv analyze MODEL --calibrate KIND` saves beside a model.

    kind: what was clustered
    rotated: whether keys and queries were clustered with their rotation, or without it
        (`unrotated`)
    fingerprint: SHA-256 of the model's weights
    layers: centres by index of the writing layer
    facts: record of how the centres were made; no code reads it
    """

    kind: Kind
    rotated: bool
    fingerprint: str
    layers: Mapping[int, LayerCentres]
    facts: Mapping[str, Any]

    @property
    def clusters(self) -> int:
        """Number of labels of each head."""
        return next(iter(self.layers.values())).key.shape[1]

    def arrays(self) -> dict[int, dict[str, Array]]:
        """Return the arrays of each layer, by name."""
        names = ("key", "query", "table")
        return {
            index: {name: value for name in names if (value := getattr(layer, name)) is not None}
            for index, layer in self.layers.items()
        }

    def save(self, folder: Path) -> Path:
        """Save the centres in a model's folder, as `calibration/`; return its path."""
        about = {"kind": self.kind, "rotated": self.rotated, "facts": dict(self.facts)}
        return FORM.save(folder, self.arrays(), self.fingerprint, about)


def load_centres(folder: Path, weights: Mapping[str, Any]) -> Centres:
    """Load the centres that are saved in a model's folder.

    weights: the model's weights, as stored

    Raises BadInput if there are no centres, or they are damaged or were made for other weights.
    """
    layers, about, own = FORM.load(folder, weights)
    if about.get("kind") not in KINDS:
        kind, where = str(about.get("kind")), folder / FORM.folder / FACTS
        allowed = f"one of {', '.join(KINDS)}"
        raise BadInput(f"{where}: kind", kind, allowed, nearest_name(kind, KINDS))
    found = {index: LayerCentres(**arrays) for index, arrays in layers.items()}
    return Centres(about["kind"], bool(about["rotated"]), own, found, about.get("facts", {}))


def unrotated(
    attention: Attention,
    x: Float[Array, "batch heads token width"],
    position: Int[Array, "batch #heads token"],
) -> Float[Array, "batch heads token width"]:
    """Rotate keys or queries (pieces concatenated, the rotated one last) back to position 0."""
    start = x.shape[-1] - attention.rotated_dim
    turned = attention.rotate(x[..., start:], -position)
    return jnp.concatenate([x[..., :start], turned], axis=-1)


def _products(
    points: HeadPoints, centres: Float[Array, "kv_heads cluster width"]
) -> Float[Array, "*batch kv_heads point cluster"]:
    return jnp.einsum("...hpd,hcd->...hpc", points, centres, preferred_element_type=jnp.float32)
