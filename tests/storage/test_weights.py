"""Weights that are saved to a safetensors file are loaded unchanged."""

from __future__ import annotations

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from mukv.core.errors import BadInput, Failed
from mukv.storage.checksum import KEY
from mukv.storage.tensors import TensorFiles, is_finite
from mukv.storage.weights import (
    FILE,
    load_weights,
    require_finite,
    require_weights,
    save_weights,
)

TREE = {
    "embedding": jnp.arange(12, dtype=jnp.float32).reshape(3, 4),
    "stage0": {"slot0": {"query": jnp.linspace(0, 1, 6).astype(jnp.bfloat16), "n": jnp.int8(3)}},
    "empty": jnp.zeros((0, 2)),
    "turned": np.arange(6.0, dtype=np.float32).reshape(2, 3).T,
}


def test_weights_come_back_with_names_types_and_metadata(tmp_path):
    path = save_weights(tmp_path / "new" / "folder", TREE, {"step": "3"})
    tree, metadata = load_weights(path.parent)
    assert metadata == {"step": "3"}
    assert set(tree) == set(TREE)
    for name in ("embedding", "empty", "turned"):
        np.testing.assert_array_equal(tree[name], TREE[name])
    query, number = tree["stage0"]["slot0"]["query"], tree["stage0"]["slot0"]["n"]
    assert (query.dtype, number.dtype, number.shape) == (jnp.bfloat16, np.int8, ())
    np.testing.assert_array_equal(query, TREE["stage0"]["slot0"]["query"])


def test_a_file_is_replaced_whole(tmp_path):
    save_weights(tmp_path, TREE, {})
    save_weights(tmp_path, {"a": jnp.ones(2)}, {})
    assert list(load_weights(tmp_path)[0]) == ["a"]
    assert [path.name for path in tmp_path.iterdir()] == [FILE]


@pytest.mark.parametrize("content", [b"", b"garbage" * 9, None])
def test_a_broken_file_is_reported_in_one_line(tmp_path, content):
    path = save_weights(tmp_path, TREE, {})
    path.write_bytes(path.read_bytes()[:-1] if content is None else content)
    with pytest.raises(BadInput, match="cut short") as caught:
        load_weights(tmp_path)
    assert "\n" not in str(caught.value)


def test_any_flipped_bit_is_detected(tmp_path, record_property):
    """A flipped bit in the header, metadata, checksum, padding or numbers gives an error."""
    path = save_weights(tmp_path, {"a": jnp.arange(6.0), "b": {"c": jnp.ones(3)}}, {"step": "3"})
    data = path.read_bytes()
    for bit in range(8 * len(data)):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        with pytest.raises(BadInput) as caught:
            load_weights(tmp_path)
        assert "\n" not in str(caught.value)
    record_property("hostile", ("flipped bits of weights", {"refused": 8 * len(data)}))


def test_any_cut_or_longer_file_is_reported(tmp_path):
    path = save_weights(tmp_path, {"a": jnp.arange(6.0)}, {})
    data = path.read_bytes()
    for changed in (*(data[:end] for end in range(len(data))), data + b"\0", data + data):
        path.write_bytes(changed)
        with pytest.raises(BadInput):
            load_weights(tmp_path)


def test_a_folder_of_tensors_is_held_to_its_checksum(tmp_path):
    path = save_weights(tmp_path, {"a": jnp.arange(6.0)}, {})
    data = bytearray(path.read_bytes())
    data[-1] ^= 64
    path.write_bytes(data)
    with pytest.raises(BadInput, match="a damaged file"):
        TensorFiles(tmp_path)


def test_a_file_without_a_checksum_is_read(tmp_path):
    """Files without a checksum, by older versions and other programs, are read."""
    save_file({"a.b": np.ones(2, np.float32)}, tmp_path / FILE, {"step": "3"})
    tree, metadata = load_weights(tmp_path)
    assert (tree["a"]["b"].tolist(), metadata) == ([1, 1], {"step": "3"})


def test_others_can_read_the_file(tmp_path):
    path = save_weights(tmp_path, TREE, {"step": "3"})
    with safe_open(path, "numpy") as file:
        assert file.metadata().keys() == {KEY, "step"}
        np.testing.assert_array_equal(file.get_tensor("turned"), TREE["turned"])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_not_finite_are_reported(dtype, value):
    array = np.full((3, 300_000), 3e4).astype(jnp.dtype(dtype))
    assert is_finite(array)
    array[2, 299_999] = value
    assert not is_finite(array)
    with pytest.raises(BadInput, match=r"run: a\.b: .*infinite or not a number"):
        require_finite({"a": {"b": jnp.asarray(array)}}, "run")


def test_what_float32_can_not_hold_is_not_finite():
    assert not is_finite(np.array([1.0, 1e300]))


@pytest.mark.parametrize("dtype", ["int32", "int8", "uint8", "bool"])
def test_weights_are_real_numbers(dtype):
    found = {"a": np.ones(3, dtype)}
    with pytest.raises(BadInput, match=f"run: a: got '{dtype}'; weights are floating point"):
        require_weights({"a": jnp.ones(3)}, found, Path("run"))


def test_unreadable_and_unwritable_files_are_reported(tmp_path):
    with pytest.raises(BadInput, match="no such file"):
        load_weights(tmp_path)
    (tmp_path / FILE).mkdir()
    with pytest.raises(BadInput):
        load_weights(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(BadInput, match="in the way"):
        save_weights(tmp_path / "file", TREE, {})
    with pytest.raises(BadInput, match="no dot"):
        save_weights(tmp_path, {"a": {"b.c": jnp.ones(1)}}, {})


def test_a_full_disk_leaves_nothing(tmp_path, full_disk):
    with full_disk(1000), pytest.raises(Failed):
        save_weights(tmp_path, {"a": jnp.ones(10_000)}, {})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("names", [("a", "a.b"), ("a", "a.b.c"), ("a.b", "a.b.c.d")])
def test_names_that_nest_are_reported(tmp_path, names):
    save_file({name: np.ones(2, np.float32) for name in names}, tmp_path / FILE)
    with pytest.raises(BadInput, match="begins with the name of another"):
        load_weights(tmp_path)
