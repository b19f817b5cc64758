"""Weights go through a safetensors file and come back the same."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from mukv.core.errors import BadInput, Failed
from mukv.core.weights import FILE, load_weights, save_weights

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
def test_a_broken_file_is_told_in_one_line(tmp_path, content):
    path = save_weights(tmp_path, TREE, {})
    path.write_bytes(path.read_bytes()[:-1] if content is None else content)
    with pytest.raises(BadInput, match="cut short") as caught:
        load_weights(tmp_path)
    assert "\n" not in str(caught.value)


def test_what_can_not_be_read_or_written_is_told(tmp_path):
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
