"""The sharding of named dimensions follows the table of rules."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

from mukv.core import mesh
from mukv.core.errors import BadInput
from mukv.core.mesh import MeshShape, constrain, gather, simulate, specification, weight_shardings
from mukv.core.params import Param


@pytest.mark.parametrize(
    ("dims", "data", "tensor", "expected"),
    [
        ({"embed": 8, "hidden": 12}, 2, 4, ("data", "tensor")),
        ({"embed": 8, "hidden": 12}, 1, 4, (None, "tensor")),
        ({"embed": 8, "hidden": 12}, 2, 1, ("data", None)),
        ({"embed": 8, "hidden": 12}, 3, 8, (None, None)),  # neither size is divisible
        ({"embed": 8, "kv_heads": 1, "head_dim": 4}, 2, 2, ("data", None, None)),
        ({"layer": 4, "vocab": 8, "embed": 8}, 2, 2, (None, "tensor", "data")),
        ({"heads": 4, "hidden": 4}, 2, 2, ("tensor", None)),  # an axis is used once
        ({"batch": 4, "embed": 4}, 2, 2, ("data", None)),
        ({}, 2, 2, ()),
    ],
)
def test_specification(dims, data, tensor, expected):
    found = specification(dims, AbstractMesh((data, tensor), ("data", "tensor")))
    assert found == PartitionSpec(*expected)


def test_exclude():
    shape = AbstractMesh((2, 2), ("data", "tensor"))
    found = specification({"embed": 8, "hidden": 8}, shape, exclude=("data",))
    assert found == PartitionSpec(None, "tensor")


@pytest.mark.parametrize(("data", "tensor"), [(1, 1), (4, 1), (2, 4)])
def test_build_takes_the_first_devices(data, tensor):
    built = MeshShape(data, tensor).build()
    assert dict(built.shape) == {"data": data, "tensor": tensor}
    assert [*built.devices.flat] == jax.devices()[: data * tensor]


def test_a_mesh_that_does_not_fit():
    with pytest.raises(BadInput, match=r"mesh.*3 x tensor 3 = 9 devices.*there are 8 cpu"):
        MeshShape(3, 3).build()
    for axis in ("data", "tensor"):
        with pytest.raises(BadInput, match=rf"{axis}: got 0"):
            MeshShape(**{axis: 0})


@pytest.mark.parametrize(
    ("devices", "flags", "expected"),
    [
        (1, "", []),
        (2, "", [("jax_num_cpu_devices", 2)]),
        (8, "", [("jax_num_cpu_devices", 8)]),
        (10**6, "", []),  # `build` says what there is
        (2, "--xla_force_host_platform_device_count=4", []),
    ],
)
def test_simulate(monkeypatch, devices, flags, expected):
    changes = []
    monkeypatch.delenv("JAX_NUM_CPU_DEVICES", raising=False)
    monkeypatch.setenv("XLA_FLAGS", flags)
    monkeypatch.setattr(mesh.jax.config, "update", lambda *change: changes.append(change))
    simulate(devices)
    assert changes == expected


def test_a_weight_is_stored_in_pieces_and_collected_for_use():
    shape = MeshShape(2, 2).build()
    declared = {"up": Param({"embed": 4, "hidden": 6})}
    sharding = weight_shardings(declared, shape)["up"]
    array = jax.device_put(jnp.arange(24.0).reshape(4, 6), sharding)
    assert {piece.data.shape for piece in array.addressable_shards} == {(2, 3)}
    with jax.set_mesh(shape):
        whole = jax.jit(lambda w: gather(w, declared))({"up": array})["up"]
    assert {piece.data.shape for piece in whole.addressable_shards} == {(4, 3)}
    assert (whole == array).all()


def test_an_activation_is_split_by_rows_and_heads():
    shape = MeshShape(2, 2).build()
    with jax.set_mesh(shape):
        placed = jax.jit(lambda x: constrain(x, "batch", None, "vocab"))(jnp.ones((4, 3, 6)))
    assert {piece.data.shape for piece in placed.addressable_shards} == {(2, 3, 3)}


def test_without_a_mesh_nothing_happens():
    array = jnp.ones((2, 2))
    assert constrain(array, "batch", None) is array
    assert gather(array, Param({"embed": 2, "hidden": 2})) is array
