"""Calibrated centres: labels and scores equal their definitions; a file is refused for other
weights."""

from __future__ import annotations

import json

import jax.numpy as jnp
import numpy as np
import pytest

from mukv.attention import Grouped
from mukv.cache.calibration import fingerprint
from mukv.cache.centres import (
    Centres,
    LayerCentres,
    load_centres,
    unrotated,
)
from mukv.core.errors import BadInput
from mukv.position import NoPE, RoPE

RANDOM = np.random.default_rng(0)
HEADS, CLUSTERS, WIDTH = 2, 5, 4


def drawn(*shape: int):
    return jnp.asarray(RANDOM.standard_normal(shape), jnp.float32)


LAYER = LayerCentres(
    drawn(HEADS, CLUSTERS, WIDTH), drawn(HEADS, 3, WIDTH), drawn(HEADS, 3, CLUSTERS)
)
WEIGHTS = {"embedding": np.ones((3, 2), np.float32)}


@pytest.mark.product
@pytest.mark.parametrize("kind", ["keys", "means", "queries", "aligned"])
def test_labels_and_scores_by_their_definition(kind):
    keys, queries = drawn(1, HEADS, 7, WIDTH), drawn(1, HEADS, 6, WIDTH)
    labels, scores = LAYER.labels(keys, kind), LAYER.scores(queries, kind)
    for head in range(HEADS):
        for entry in range(7):
            key = np.asarray(keys[0, head, entry])
            far = ((np.asarray(LAYER.key[head]) - key) ** 2).sum(-1)
            answers = np.asarray(LAYER.key[head]) @ key
            best = answers.argmax() if kind == "queries" else far.argmin()
            assert labels[0, head, entry] == best
        for number in range(6):
            query = np.asarray(queries[0, head, number])
            if kind == "aligned":
                own = ((np.asarray(LAYER.query[head]) - query) ** 2).sum(-1).argmin()
                wanted = np.asarray(LAYER.table[head, own])
            elif kind == "queries":
                wanted = -((np.asarray(LAYER.key[head]) - query) ** 2).sum(-1)
            else:
                wanted = np.asarray(LAYER.key[head]) @ query
            order = np.asarray(scores[0, head, number]).argsort()
            np.testing.assert_array_equal(order, wanted.argsort())


def test_rotation_of_keys_is_undone():
    """Undoing the rotation of keys gives the original keys; without rotation nothing changes."""
    x, position = drawn(1, HEADS, 9, WIDTH), jnp.arange(9)[None, None]
    for encoding in (RoPE(), RoPE(p=0.5), NoPE()):
        attention = Grouped(heads=2, kv_heads=2, head_dim=WIDTH, position=encoding)
        back = unrotated(attention, encoding.rotate(x, position), position)
        np.testing.assert_allclose(back, x, atol=1e-6)


def test_saved_and_loaded(tmp_path):
    layers = {0: LAYER, 2: LayerCentres(LAYER.key)}
    saved = Centres("aligned", False, fingerprint(WEIGHTS), layers, {"tokens": 10})
    saved.save(tmp_path)
    found = load_centres(tmp_path, WEIGHTS)
    assert (found.kind, found.rotated, found.facts) == ("aligned", False, {"tokens": 10})
    assert (found.clusters, list(found.layers)) == (CLUSTERS, [0, 2])
    np.testing.assert_array_equal(found.layers[0].table, LAYER.table)
    assert found.layers[2].query is None


def test_refused(tmp_path):
    with pytest.raises(BadInput, match="--calibrate keys"):
        load_centres(tmp_path, WEIGHTS)
    path = Centres("keys", True, fingerprint(WEIGHTS), {0: LAYER}, {}).save(tmp_path)
    with pytest.raises(BadInput, match="centres of the weights"):
        load_centres(tmp_path, {"embedding": np.zeros((3, 2), np.float32)})
    facts = json.loads((path / "calibration.json").read_text())
    for change, message in (({"kind": "key"}, "did you mean 'keys'"), ({"version": 9}, "version")):
        (path / "calibration.json").write_text(json.dumps(facts | change))
        with pytest.raises(BadInput, match=message):
            load_centres(tmp_path, WEIGHTS)
    (path / "calibration.json").write_text("{")
    with pytest.raises(BadInput, match="not JSON"):
        load_centres(tmp_path, WEIGHTS)
