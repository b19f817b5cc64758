"""Tensors are written piece by piece, and non-contiguous arrays in row-major order."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from mukv.core.errors import Failed
from mukv.storage.tensors import Spec, TensorFiles, contiguous, write_tensors

RANDOM = np.random.default_rng(0)


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0), (0, 2, 1)])
@pytest.mark.parametrize("shape", [(3, 4, 5), (130, 2, 257), (1, 300, 1)])
def test_contiguous(order, shape):
    array = RANDOM.standard_normal(shape).transpose(order)
    made = contiguous(array)
    assert made.flags.c_contiguous
    np.testing.assert_array_equal(made, array)


def test_files_hold_what_was_given_in_pieces(tmp_path):
    wide = RANDOM.standard_normal((4, 3, 2)).astype(np.float32)
    narrow = wide.astype(jnp.bfloat16)[:, :, :1]
    given = {"narrow": narrow, "wide": wide}
    specs = {name: Spec(a.shape, a.dtype, lambda a=a: iter(a)) for name, a in given.items()}
    write_tensors(tmp_path / "model.safetensors", specs, {"format": "pt"})
    files = TensorFiles(tmp_path)
    for name, array in load_file(tmp_path / "model.safetensors").items():
        np.testing.assert_array_equal(array, given[name])
        part = files.read(name, (slice(1, 3), slice(None), slice(0, 1)))
        np.testing.assert_array_equal(part, given[name][1:3, :, :1])
    assert list(tmp_path.iterdir()) == [tmp_path / "model.safetensors"]


def test_a_file_is_mapped_anew(tmp_path, monkeypatch):
    """A file is mapped again after some bytes, so that pages that were read don't stay in
    memory."""
    opened = []
    monkeypatch.setattr("mukv.storage.tensors.MAPPED", 100)
    monkeypatch.setattr(
        "mukv.storage.tensors.safe_open", lambda *a: opened.append(a) or safe_open(*a)
    )
    array = np.arange(60, dtype=np.float32).reshape(10, 6)
    spec = Spec(array.shape, array.dtype, lambda: iter(array))
    write_tensors(tmp_path / "model.safetensors", {"a": spec}, {})
    files = TensorFiles(tmp_path)
    for row in range(10):
        part = files.read("a", (slice(row, row + 1), slice(None)))
        np.testing.assert_array_equal(part, array[row : row + 1])
    assert len(opened) == 2  # 240 bytes: anew after 120


def test_nothing_is_left_of_a_full_disk(tmp_path, full_disk):
    array = np.ones((64, 1024), np.float32)
    spec = Spec(array.shape, array.dtype, lambda: iter(array))
    with full_disk(100_000), pytest.raises(Failed, match="disk is full"):
        write_tensors(tmp_path / "model.safetensors", {"a": spec}, {})
    assert not list(tmp_path.iterdir())
