"""A run directory of version 0.1.0, made before its modules moved, still loads and resumes.

`run_of_0.1.0.tar.xz` contains the directory as that version left it (Decoder of three layers,
d_model 16, two of them with a plan of full attention and a window) with the checkpoint of step 2
and the weights of step 4, and its token file.
"""

from __future__ import annotations

import json
import shutil
import tarfile
from pathlib import Path

import jax
import numpy as np
import pytest

import mukv as package
from mukv.storage.weights import load_weights
from mukv.train.metrics import read_metrics


@pytest.fixture
def made_before(tmp_path: Path) -> Path:
    with tarfile.open(Path(__file__).parent / "run_of_0.1.0.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path / "run"


@pytest.mark.product
def test_it_loads_with_the_loss_that_it_had(mukv, made_before):
    lines = list(read_metrics(made_before / "metrics.jsonl"))
    expected = next(line["validation_loss"] for line in lines[::-1] if "validation_loss" in line)
    ids = made_before.parent / "validation.npy"
    np.save(ids, np.fromfile(made_before.parent / "tokens" / "validation.bin", np.uint16))
    done = mukv("eval", made_before, "--tokens", ids, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["loss"] == pytest.approx(expected, rel=1e-5)
    assert package.load(made_before).generate("The", max_tokens=4)


@pytest.mark.product
def test_its_checkpoint_resumes_to_the_weights_that_it_had(mukv, made_before):
    expected = load_weights(made_before / "weights")[0]
    shutil.rmtree(made_before / "weights")
    given = ("train", made_before, f"data.path={made_before.parent / 'tokens'}")
    done = mukv(*given, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["step"] == 4
    found = load_weights(made_before / "weights")[0]
    for one, other in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
