"""Centres of clusters, calibrated once per model: which entries a query should look at.

Every entry gets a label when it is written, every query a score for each label; a policy reads
the entries of the labels with the highest scores. What was clustered decides how: `keys`, or
`means` (what queries read: their attention-weighted mean keys), label an entry by the nearest
centre and score it by the product with the query; `queries` label an entry by the query centre
that it answers best; `aligned` has centres of both, and a table of the mass between them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from mukv.attention import AnyAttention
from mukv.cache.kmeans import distances, nearest
from mukv.core.errors import BadInput, nearest_name
from mukv.core.params import named
from mukv.core.typing import Array, Float, Int
from mukv.storage.files import new_folder, write_atomic
from mukv.storage.json_text import to_json
from mukv.storage.weights import FILE, load_weights, save_weights

Kind = Literal["keys", "queries", "means", "aligned"]
KINDS: tuple[Kind, ...] = ("keys", "queries", "means", "aligned")
FOLDER, FACTS = "calibration", "calibration.json"
FORMAT, VERSION = "mukv-centres", 1

Points = Float[Array, "*batch kv_heads point width"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LayerCentres:
    """Centres of one layer that writes.

    key: what entries are labelled by (of the kind `queries`: the centres of queries themselves).
    query, table: only of `aligned`: centres of queries, and for each the logarithm of the mean
    weight that its queries give to an entry of each label.
    """

    key: Float[Array, "kv_heads cluster width"]
    query: Float[Array, "kv_heads query_cluster width"] | None = None
    table: Float[Array, "kv_heads query_cluster cluster"] | None = None

    def labels(self, key: Points, kind: Kind) -> Int[Array, "*batch kv_heads point"]:
        """The cluster of each entry. key: as multiplied with queries, its pieces joined."""
        if kind == "queries":
            return jnp.argmax(_products(key, self.key), axis=-1).astype(jnp.int32)
        return nearest(key, self.key)

    def scores(self, query: Points, kind: Kind) -> Float[Array, "*batch kv_heads point cluster"]:
        """How much each query wants each cluster; only their order means something.

        query: as multiplied with keys: scaled, its pieces joined; those of a group one by one.
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
    """What `mukv analyze MODEL --calibrate KIND` saves beside a model.

    layers: by index of the writing layer. rotated: centres are of rotated keys and queries; if
    not, both are turned back first (`unrotated`). fingerprint: of the model's weights. facts:
    what the centres were made from, for people.
    """

    kind: Kind
    rotated: bool
    fingerprint: str
    layers: Mapping[int, LayerCentres]
    facts: Mapping[str, Any]

    @property
    def clusters(self) -> int:
        """Labels of each head."""
        return next(iter(self.layers.values())).key.shape[1]

    def arrays(self) -> dict[int, dict[str, Array]]:
        """Those of each layer, by name."""
        names = ("key", "query", "table")
        return {
            index: {name: value for name in names if (value := getattr(layer, name)) is not None}
            for index, layer in self.layers.items()
        }

    def save(self, folder: Path) -> Path:
        """Write them into the folder of a model, as `calibration/`."""
        path = folder / FOLDER
        tree = {f"layer{index}": arrays for index, arrays in self.arrays().items()}
        about = {
            "format": FORMAT,
            "version": VERSION,
            "kind": self.kind,
            "rotated": self.rotated,
            "fingerprint": self.fingerprint,
            "layers": list(self.layers),
            "facts": dict(self.facts),
        }
        with new_folder(path, overwrite=True) as made:
            save_weights(made, tree, {"fingerprint": self.fingerprint})
            write_atomic(made / FACTS, to_json(about, indent=2) + "\n")
        return path


def load_centres(folder: Path, weights: Mapping[str, Any]) -> Centres:
    """The centres beside a model. weights: the model's, as they are stored.

    Raises BadInput if there are none, they are damaged, or were made for other weights.
    """
    path = folder / FOLDER
    try:
        about = json.loads((path / FACTS).read_text("utf-8"))
    except OSError:
        allowed = "a calibration; `mukv analyze MODEL --calibrate keys` makes one"
        raise BadInput(str(path), "no calibration", allowed) from None
    except ValueError:
        raise BadInput(str(path / FACTS), "no JSON", "what `mukv analyze` wrote") from None
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        raise BadInput(str(path / FACTS), "another format", f"format must be {FORMAT!r}")
    if about.get("version") != VERSION:
        raise BadInput(str(path / FACTS), about.get("version"), f"version must be {VERSION}")
    if about.get("kind") not in KINDS:
        kind = str(about.get("kind"))
        allowed = f"one of {', '.join(KINDS)}"
        raise BadInput(f"{path / FACTS}: kind", kind, allowed, nearest_name(kind, KINDS))
    tree, metadata = load_weights(path)
    own = fingerprint(weights)
    for found in (about.get("fingerprint"), metadata.get("fingerprint")):
        if found != own:
            raise BadInput(
                str(path / FILE),
                f"centres of the weights {str(found)[:12]}",
                f"this model's are {own[:12]}: calibrate it with `mukv analyze MODEL --calibrate`",
            )
    layers = {
        int(name.removeprefix("layer")): LayerCentres(**jax.tree.map(jnp.asarray, arrays))
        for name, arrays in tree.items()
    }
    layers = dict(sorted(layers.items()))
    return Centres(about["kind"], bool(about["rotated"]), own, layers, about.get("facts", {}))


def fingerprint(weights: Mapping[str, Any]) -> str:
    """SHA-256 of all weights, names and shapes included."""
    total = hashlib.sha256()
    for name, leaf in sorted(named(weights).items()):
        array = np.ascontiguousarray(leaf)
        total.update(f"{name} {array.dtype} {array.shape}".encode())
        total.update(array.tobytes())
    return total.hexdigest()


def unrotated(
    attention: AnyAttention,
    x: Float[Array, "batch heads token width"],
    position: Int[Array, "batch #heads token"],
) -> Float[Array, "batch heads token width"]:
    """Keys or queries (pieces joined, the rotated one last) turned back to position 0."""
    start = x.shape[-1] - attention.rotated_dim
    turned = attention.position.rotate(x[..., start:], -position)
    return jnp.concatenate([x[..., :start], turned], axis=-1)


def _products(
    points: Points, centres: Float[Array, "kv_heads cluster width"]
) -> Float[Array, "*batch kv_heads point cluster"]:
    return jnp.einsum("...hpd,hcd->...hpc", points, centres, preferred_element_type=jnp.float32)
