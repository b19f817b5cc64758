"""Find and read the weights that `train.start` names: initial weights, or the base of adapters.

The base is the model whose weights adapters change. A run with adapters saves only the adapters;
its base.json has the checksums of the base's weights, so that another base is refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from mukv.attention.eviction import EVICTION
from mukv.core import params
from mukv.core.errors import BadInput, shown
from mukv.core.mesh import weight_shardings
from mukv.data.tokenizer import AnyTokenizer, find_tokenizer
from mukv.hub import checkpoint
from mukv.hub.checkpoint import Checkpoint
from mukv.model import AnyModel
from mukv.runs.config import Run
from mukv.runs.folder import RunDirectory
from mukv.schema import schema
from mukv.schema.numbers import leaves
from mukv.storage.copies import fetched
from mukv.storage.files import write_atomic
from mukv.storage.json_text import to_json
from mukv.storage.manifest import checksum
from mukv.storage.objects import address
from mukv.storage.weights import load_weights, require_finite, require_weights, weight_types

FIELD = "train.start"
FORMAT, VERSION = "mukv-base", 1
MOST_KEYS = 3
"""Maximum number of keys that an error about weights of another model names."""


@dataclass(frozen=True)
class Start:
    """Weights on disk.

    folder: folder of the weights
    run: configuration of a run directory; None otherwise
    found: checkpoint of a Hugging Face folder or GGUF file; None for a run directory
    """

    folder: RunDirectory
    run: Run | None
    found: Checkpoint | None

    @property
    def adapted(self) -> bool:
        """Whether the weights are the adapters of a run."""
        return self.run is not None and self.run.train.adapter is not None

    @property
    def of_task(self) -> bool:
        """Whether the weights were trained on a synthetic task."""
        return self.run is not None and self.run.data.task is not None

    @property
    def tokenizer(self) -> AnyTokenizer:
        """The tokenizer in the folder; `NoTokenizer` if there is none. Raises BadInput for a
        damaged file."""
        if self.found is not None:
            return self.found.tokenizer
        return find_tokenizer(self.folder.tokenizer)

    def types(self, declared: Any) -> Any:
        """Read the shapes and dtypes of the weights. Raises BadInput if names or shapes differ from
        those of `declared`."""
        if self.found is not None:
            specs = self.found.specs()
            types = {n: jax.ShapeDtypeStruct(s.shape, s.dtype) for n, s in specs.items()}
        elif self.adapted:
            assert self.run is not None
            types = params.named(params.abstract(self.run.model.params()))
        else:
            types = weight_types(self.folder.weights)
        types = {**_closed_gates(declared, types), **types}
        require_weights(declared, types, self.folder.path)
        structure = jax.tree.structure(
            declared, is_leaf=lambda leaf: isinstance(leaf, params.Param)
        )
        return structure.unflatten(types[name] for name in params.named(declared))

    def weights(self, declared: Any, mesh: Mesh) -> Any:
        """Read the weights; adapters are merged with their base.

        Raises BadInput for damaged weights, for other names or shapes than those of `declared`, and
        for weights that are not finite.
        """
        if self.found is not None:
            weights = self.found.place(mesh)
        else:
            weights, _ = load_weights(self.folder.weights)
            if self.adapted:
                assert self.run is not None
                weights = merged_weights(self.run, self.folder, weights, mesh)
        found = params.named(weights)
        if missing := _closed_gates(declared, found):
            weights = params.nested({**missing, **found})
        require_weights(declared, weights, self.folder.path)
        require_finite(weights, self.folder.path)
        return weights

    def check(self, run: Run) -> None:
        """Raise BadInput if the weights do not fit the model of a run, and say in which keys the
        models differ. Only names, shapes and dtypes are read."""
        try:
            self.types(run.model.params())
        except BadInput as error:
            keys = self._differences(run.model)
            if not keys:
                raise
            more = [f"{len(keys) - MOST_KEYS} more keys"] if len(keys) > MOST_KEYS else []
            keys = ", ".join([*keys[:MOST_KEYS], *more])
            allowed = f"{error.allowed}; that model and this one differ in {keys}"
            raise BadInput(error.where, error.given, allowed) from None

    def _differences(self, model: AnyModel) -> list[str]:
        """Return the keys of the configuration in which a model differs from that of the weights,
        with both values."""
        own = self.run.model if self.run is not None else self.found and self.found.model
        if own is None:
            return []
        there, here = (leaves(schema.to_mapping(each)) for each in (own, model))

        def value(found: Mapping[str, Any], name: str) -> str:
            return shown(found[name]) if name in found else "unset"

        return [
            f"model.{name} ({value(there, name)} there, {value(here, name)} here)"
            for name in dict.fromkeys([*there, *here])
            if there.get(name) != here.get(name)
        ]


def _closed_gates(declared: Any, found: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Return zeros for gates of learned eviction that weights lack; these gates evict nothing.

    declared: tree of `Param`. found: weights by name
    """
    return {
        name: np.zeros(param.shape, np.float32)
        for name, param in params.named(declared).items()
        if param.tag == EVICTION and name not in found
    }


def find_start(start: str, where: str = FIELD) -> Start:
    """Find the weights that `train.start` names.

    where: name of the key, for messages

    Raises BadInput if there are none.
    """
    folder = RunDirectory(fetched(start))
    if folder.exists:
        if not folder.weights.exists():
            raise BadInput(where, start, "a run with weights: this one has none yet")
        return Start(folder, folder.load_config(), None)
    found = checkpoint.find(start if address(start) is None else folder.path)
    if found is None and not folder.weights.exists():
        raise BadInput(where, start, "a run with weights, or a folder of theirs")
    return Start(folder, None, found)


def with_base(run: Run) -> Run:
    """Return a run with an absolute path in `train.start` if it has adapters. Raises BadInput for a
    run with adapters but without `train.start`."""
    start = run.train.start
    if run.train.adapter is None:
        return run
    if start is None:
        allowed = "the model whose weights `train.adapter` changes: a run directory or a folder"
        raise BadInput(FIELD, None, allowed)
    path = Path(start)
    if path.exists():
        start = str(path.resolve())
    return replace(run, train=replace(run.train, start=start))


def find_base(start: str, where: str = FIELD) -> Start:
    """Find the weights that adapters change. Raises BadInput if there are none, or if they are
    adapters themselves."""
    found = find_start(start, where)
    if found.adapted:
        assert found.run is not None
        allowed = (
            f"a model without adapters of its own, such as the base of this one, "
            f"{found.run.train.start}; `mukv export RUN --out DIR` merges low-rank adapters with "
            "their base, so that a run can start from the folder"
        )
        raise BadInput(where, start, allowed)
    return found


def check_start(run: Run, begun: bool = False) -> None:
    """Raise BadInput if `train.start` names no weights, or weights that do not fit the model. Only
    names, shapes and dtypes are read, so that this can come before data are read.

    begun: whether the run has saved weights, so that only the base of adapters is still needed
    """
    start = with_base(run).train.start
    if start is not None and (run.train.adapter is not None or not begun):
        find = find_start if run.train.adapter is None else find_base
        find(start).check(run)


def trained_params(run: Run) -> Any:
    """Return the declared weights that a run trains and saves."""
    declared = run.model.params()
    adapter = run.train.adapter
    return declared if adapter is None else adapter.params(declared)


def resolved_params(run: Run) -> Any:
    """Return what the parameterisation gives each trained weight: initial deviation, multiplier and
    learning rate."""
    family, adapter = run.train.optimizer.family, run.train.adapter
    return run.model.resolved(family) if adapter is None else adapter.resolved(run.model, family)


def merged_weights(run: Run, folder: RunDirectory, own: Any, mesh: Mesh) -> Any:
    """Return all weights of a run with adapters in float32, sharded over a mesh.

    own: the adapters of the run

    Raises BadInput for a base that is missing or has changed, and for adapters that do not fit its
    weights.
    """
    adapter, start = run.train.adapter, run.train.start
    assert adapter is not None
    require_weights(trained_params(run), own, folder.weights)
    where = f"{folder.config}: {FIELD}"
    if start is None:
        raise BadInput(where, None, "the model whose weights the adapters of this run change")
    if not Path(start).exists() and not checkpoint.is_hub_id(start):
        allowed = (
            "the model whose weights the adapters of this run change: put it back, or write here "
            "where it is"
        )
        raise BadInput(where, start, allowed)
    declared = run.model.params()
    base = find_base(start, where).weights(declared, mesh)
    require_base(folder, base, start)
    shardings = weight_shardings(declared, mesh)
    merge = jax.jit(lambda base, own: adapter.merged(run.model, base, own), out_shardings=shardings)
    with jax.set_mesh(mesh):
        return merge(jax.device_put(base, shardings), own)


# Checksums of a base


def checksums(weights: Any) -> dict[str, int]:
    """Compute a 32-bit checksum of each weight, by name. It does not depend on the sharding."""
    found = params.named(weights)
    return {name: int(np.asarray(checksum(leaf))) for name, leaf in found.items()}


def write_base(folder: RunDirectory, start: str, sums: dict[str, int]) -> None:
    """Write base.json: name and checksums of the base of a run."""
    about = {"format": FORMAT, "version": VERSION, "start": start, "checksums": sums}
    write_atomic(folder.base, to_json(about, indent=2) + "\n")


def require_base(folder: RunDirectory, weights: Any, start: str) -> None:
    """Raise BadInput if the weights differ from those that a run's adapters were trained on."""
    saved = _saved_base(folder)
    for name, found in checksums(weights).items():
        if saved.get(name) != found:
            allowed = (
                f"the weights that the adapters in {folder.path} were trained on: {name} is "
                f"another than {folder.base.name} says"
            )
            raise BadInput(FIELD, start, allowed)


def _saved_base(folder: RunDirectory) -> dict[str, Any]:
    path = folder.base
    try:
        about = json.loads(path.read_text("utf-8"))
        if about["format"] == FORMAT and about["version"] == VERSION:
            return dict(about["checksums"])
        problem = "another format"
    except OSError:
        problem = "missing" if not path.exists() else "a file that can't be read"
    except (ValueError, KeyError, TypeError, RecursionError):
        problem = "damaged"
    allowed = f"the file of format {FORMAT!r}, version {VERSION}, that `mukv train` wrote there"
    raise BadInput(str(path), problem, allowed)
