"""A wrongly declared weight is refused when it is made; matrix shapes follow from its fields."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from mukv.core.errors import BadInput
from mukv.core.params import Param, as_matrices, from_matrices, tagged

DIMS = {"experts": 3, "embed": 4, "heads": 2, "head_dim": 5}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"fan_in": ("embd",)}, r"Param\.fan_in: got 'embd'.*embed"),
        ({"batch": ("expert",)}, r"Param\.batch: got 'expert'.*experts"),
        ({"fan_in": ("embed", "embed")}, "each axis once"),
        ({"fan_in": ("experts",), "batch": ("experts",)}, "experts is in fan_in already"),
        ({"batch": ("embed",)}, "the first axes of experts, embed"),
        ({"role": "hiden"}, r"Param\.role: got 'hiden'.*hidden"),
        ({"init": "one"}, r"Param\.init: got 'one'"),
        ({"tag": "querry"}, r"Param\.tag: got 'querry'.*query"),
    ],
)
def test_a_wrong_declaration_is_refused(fields, message):
    with pytest.raises(BadInput, match=message):
        Param(DIMS, **fields)


@pytest.mark.parametrize("fan_in", [("embed",), ("heads", "head_dim"), ("embed", "head_dim")])
def test_matrices_have_contracted_axes_as_rows_wherever_they_lie(fan_in):
    param = Param(DIMS, fan_in=fan_in, batch=("experts",)).stacked(2)
    array = np.random.default_rng(0).normal(size=param.shape).astype(np.float32)
    found = as_matrices(param, jnp.asarray(array))
    rows = param.fan_in_size
    assert found.shape == (2, 3, rows, 40 // rows)
    product = {
        ("embed",): "leabc->leabc",
        ("heads", "head_dim"): "leabc->lebca",
        ("embed", "head_dim"): "leabc->leacb",
    }[fan_in]
    np.testing.assert_array_equal(found, np.einsum(product, array).reshape(found.shape))
    np.testing.assert_array_equal(from_matrices(param, found), array)


def test_a_tag_names_one_weight():
    query = Param(DIMS, tag="query")
    assert tagged({"a": {"b": query, "c": Param(DIMS)}}, "query") is query
    with pytest.raises(BadInput, match="exactly one weight with tag key"):
        tagged({"a": query}, "key")
