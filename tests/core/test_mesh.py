"""The sharding of named dimensions follows the table of rules."""

from __future__ import annotations

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

from mukv.core import mesh
from mukv.core.arrange import across, fitting, hybrid
from mukv.core.errors import BadInput
from mukv.core.mesh import MeshShape, simulate, specification, weight_shardings
from mukv.core.params import Param
from mukv.core.partition import constrain, gather


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


@pytest.mark.parametrize(
    ("dims", "expected"),
    [
        ({"batch": 8, "token": 6, "embed": 8}, (("replica", "data"), "context", None)),
        ({"batch": 6, "token": 5, "embed": 8}, ("replica", None, ("data", "context"))),
        ({"embed": 8, "hidden": 12}, (("data", "context"), "tensor")),
        ({"embed": 6, "hidden": 12}, (None, "tensor")),
        ({"embed": 12, "hidden": 3}, ("data", None)),
        ({"batch": 8, "state_heads": 4}, (("replica", "data"), ("tensor", "context"))),
    ],
)
def test_several_axes_split_one_dimension(dims, expected):
    """Those whose product divides the size do; weights are never split over replicas."""
    found = specification(dims, MeshShape(4, 2, replica=2, context=2).abstract)
    assert found == PartitionSpec(*expected)


def test_exclude():
    shape = AbstractMesh((2, 2), ("data", "tensor"))
    found = specification({"embed": 8, "hidden": 8}, shape, exclude=("data",))
    assert found == PartitionSpec(None, "tensor")


@pytest.mark.parametrize(("data", "tensor"), [(1, 1), (4, 1), (2, 4)])
def test_build_takes_the_first_devices(data, tensor):
    built = MeshShape(data, tensor).build()
    assert dict(built.shape) == {"replica": 1, "data": data, "context": 1, "tensor": tensor}
    assert [*built.devices.flat] == jax.devices()[: data * tensor]


def test_a_mesh_that_does_not_fit():
    with pytest.raises(BadInput, match=r"mesh.*3 x tensor 3 = 9 devices.*there are 8 cpu"):
        MeshShape(3, 3).build()
    with pytest.raises(BadInput, match=r"2 x data 4 x tensor 1 x context 2 = 16.*mesh.replica=1"):
        MeshShape(4, replica=2, context=2).build()
    for axis in ("data", "tensor", "replica", "context"):
        with pytest.raises(BadInput, match=rf"{axis}: got 0"):
            MeshShape(**{axis: 0})


@pytest.mark.parametrize(
    ("sizes", "devices", "exact", "expected"),
    [
        ({"data": 3, "tensor": 3}, 8, False, "mesh.data=2 or mesh.tensor=2"),
        ({"data": 4, "tensor": 4}, 8, True, "mesh.data=2 or mesh.tensor=2"),
        ({"data": 3, "tensor": 4}, 8, True, "mesh.data=2"),
        ({"data": 3, "tensor": 3}, 8, True, "mesh.data=8 mesh.tensor=1"),
        ({"replica": 2, "data": 16, "tensor": 1}, 8, True, "mesh.data=4"),
    ],
)
def test_meshes_that_would_fit_are_named(sizes, devices, exact, expected):
    assert fitting(sizes, devices, exact) == expected


def slices(*sizes: int) -> list[SimpleNamespace]:
    """Return devices that are in slices of these sizes."""
    return [
        SimpleNamespace(
            id=10 * number + place,
            slice_index=number,
            platform="gpu",
            device_kind="",
            process_index=0,
        )
        for number, size in enumerate(sizes)
        for place in range(size)
    ]


@pytest.mark.parametrize(
    ("sizes", "number", "expected"),
    [
        ((2, 4, 1, 1), 2, (2, 1, 1, 1)),
        ((1, 8, 1, 1), 2, (1, 2, 1, 1)),
        ((2, 4, 1, 2), 4, (2, 2, 1, 1)),
        ((6, 2, 1, 1), 4, (2, 2, 1, 1)),
        ((1, 1, 4, 2), 8, (1, 1, 4, 2)),
    ],
)
def test_the_first_axes_cross_slices(sizes, number, expected):
    axes = ("replica", "data", "context", "tensor")
    found = across(dict(zip(axes, sizes, strict=True)), number)
    assert [*found.values()] == [*expected]


def test_replicas_are_in_slices_of_their_own():
    placed = hybrid(slices(4, 4), MeshShape(2, 2, replica=2).sizes)
    assert placed.shape == (2, 2, 1, 2)
    assert [{device.slice_index for device in half.flat} for half in placed] == [{0}, {1}]


def test_a_mesh_that_does_not_fit_its_slices():
    match = r"replica 3 x data 2.*4, 2 devices of 2 slices.*mesh.replica=4 would fit"
    with pytest.raises(BadInput, match=match):
        hybrid(slices(4, 2), MeshShape(2, replica=3).sizes)


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


def test_an_activation_is_split_by_tokens():
    with jax.set_mesh(MeshShape(2, context=3).build()):
        placed = jax.jit(lambda x: constrain(x, "batch", "token", None))(jnp.ones((4, 3, 6)))
    assert {piece.data.shape for piece in placed.addressable_shards} == {(2, 1, 6)}


def test_without_a_mesh_nothing_happens():
    array = jnp.ones((2, 2))
    assert constrain(array, "batch", None) is array
    assert gather(array, Param({"embed": 2, "hidden": 2})) is array
