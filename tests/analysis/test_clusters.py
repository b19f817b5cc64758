"""Calibrated clusters and the entries they predict, compared with their definitions in numpy."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from mukv.analysis.calibrate import calibrate
from mukv.analysis.clusters import READS, judge
from mukv.analysis.samples import even, from_training, windows
from mukv.cache.calibration import fingerprint
from mukv.cache.centres import KINDS, Centres, LayerCentres
from mukv.core.errors import BadInput
from mukv.data.tokens import open_tokens
from mukv.storage.weights import load_weights
from tests.analysis.test_sparsity import rows, taps
from tests.laws import matrix
from tests.pairs import params

CASE = ("gqa", "rope", "reuse")


WAYS = [(kind, kind != "queries") for kind in KINDS]


@pytest.mark.parametrize(("kind", "rotated"), params(WAYS, WAYS[:1], unpack=True))
def test_calibration_has_centres_for_what_is_written(kind, rotated):
    model = matrix.build(*CASE)
    weights = matrix.weights(model)
    batches = [rows()._replace(segment=np.ones_like(rows().segment))] * 2
    found = calibrate(model, weights, batches, kind, 4, rotated, compute=matrix.EXACT)
    assert list(found.layers) == [0, 2]
    assert found.fingerprint == fingerprint(weights)
    for layer in found.layers.values():
        assert layer.key.shape == (2, 4, 8)
        assert (layer.table is not None) == (kind == "aligned")
        assert all(
            np.isfinite(np.asarray(each)).all()
            for each in (layer.key, layer.table)
            if each is not None
        )
    predicted = judge(model, weights, found, [rows()], matrix.EXACT)
    for layer in predicted:
        assert (np.diff(layer.captured, axis=1) > 0).all()
        assert (layer.captured <= layer.largest + 1e-5).all()
        np.testing.assert_allclose(layer.sizes.sum(axis=1), 1, rtol=1e-5)


@pytest.mark.product
def test_read_entries_by_definition():
    """The read entries equal a loop over clusters in the order of scores, latest entry first."""
    wide, given = matrix.build("gqa", "rope", "plain"), rows()
    weights = matrix.weights(wide)
    random = np.random.default_rng(0)
    drawn = jnp.asarray(random.standard_normal((2, 5, 8)), jnp.float32)
    centres = Centres("keys", True, "", {0: LayerCentres(drawn), 1: LayerCentres(drawn)}, {})
    seen, head, place = taps(wide, weights, given), 3, READS.index(1 / 8)
    captured, f1 = [], []
    for row in range(3):
        key = np.asarray(seen["layer0.key"])[row, head // 2]
        labels = ((key[:, None] - np.asarray(drawn)[head // 2]) ** 2).sum(-1).argmin(axis=1)
        for q in np.flatnonzero(given.position[row] >= 31):
            query = np.asarray(seen["layer0.query"])[row, head // 2, head % 2, q]
            scores = np.asarray(drawn)[head // 2] @ query
            w = np.asarray(seen["layer0.weights"])[row, head // 2, head % 2, q]
            entries = range(q - given.position[row, q], q + 1)
            order = sorted(entries, key=lambda k: (-scores[labels[k]], -k))
            read = order[: int(np.ceil(len(order) / 8))]
            captured.append(w[read].sum())
            largest = np.argsort(-w)
            wanted = largest[: 1 + int((np.cumsum(w[largest]) < 0.8).sum())]
            f1.append(2 * len(set(read) & set(wanted)) / (len(read) + len(wanted)))
    found = judge(wide, weights, centres, [given], matrix.EXACT)[0]
    np.testing.assert_allclose(found.captured[head, place], np.mean(captured), rtol=1e-3)
    np.testing.assert_allclose(found.f1[head, place], np.mean(f1), rtol=1e-3)


def test_rows_to_cluster(token_file):
    corpus = open_tokens(token_file)
    found = from_training(corpus, 16, 8)
    assert found.segment.all()
    parts = list(even(windows("x", [np.arange(100)], 10, 6), 4))
    assert [len(part.tokens) for part in parts] == [3, 3]


@pytest.mark.product
def test_calibrated_beside_a_model(mukv, trained, tmp_path):
    import shutil

    folder = tmp_path / "model"
    shutil.copytree(trained, folder)
    given = ["--samples", 4, "--clusters", 4, "--calibration-tokens", 256]
    done = mukv("analyze", folder, *given, "--calibrate", "means", "--json")
    assert done.returncode == 0, done.stderr
    weights, _ = load_weights(folder / "weights")
    from mukv.cache.centres import load_centres

    assert load_centres(folder, weights).clusters == 4
    with pytest.raises(BadInput, match="this model's are"):
        load_centres(folder, {"x": np.ones(2)})
    for wrong, message in (
        (["--calibrate", "key"], "did you mean 'keys'"),
        (["--calibrate", "keys", "--clusters", 1], "at least 2"),
        (["--calibrate", "keys", "--clusters", 9999999], "number of tokens"),
    ):
        done = mukv("analyze", folder, *wrong)
        assert (done.returncode, message in done.stderr) == (2, True), done.stderr
