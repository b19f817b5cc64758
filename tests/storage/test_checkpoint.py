"""A checkpoint is complete or absent, and is restored as it was saved."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from mukv.core.errors import BadInput, Failed
from mukv.storage.checkpoint import Checkpoints
from mukv.storage.manifest import checksum
from tests.hostile.harness import check_all


class Moments(NamedTuple):
    mean: Any
    count: Any


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
    weights: Any
    optimizer: Any
    step: Any


def state(step: int = 0, width: int = 32) -> State:
    weights = {
        "w": jax.random.normal(jax.random.key(step), (width, 64)),
        "gain": {"half": jnp.linspace(0, 1, 24).astype(jnp.bfloat16)},
    }
    moments = Moments(jax.tree.map(lambda leaf: leaf * 2, weights), jnp.int32(step))
    return State(weights, (moments, ()), jnp.int32(step))


def like(tree: Any) -> Any:
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), tree)


def assert_equal(left: Any, right: Any) -> None:
    assert jax.tree.structure(left) == jax.tree.structure(right)
    jax.tree.map(np.testing.assert_array_equal, left, right)


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_state_comes_back_the_same(tmp_path, asynchronous):
    with Checkpoints(tmp_path / "new", asynchronous=asynchronous) as checkpoints:
        assert (checkpoints.latest(), checkpoints.best()) == (None, None)
        checkpoints.save(3, state(3))
        assert_equal(checkpoints.restore(3, like(state())), state(3))
    with Checkpoints(tmp_path / "new", read_only=True) as checkpoints:
        assert checkpoints.latest() == 3
        assert_equal(checkpoints.restore(None, like(state())), state(3))


def test_the_last_and_the_best_are_kept(tmp_path):
    with Checkpoints(tmp_path, keep_last=2, keep_best=1) as checkpoints:
        for step, metric in enumerate([3.0, 1.0, float("nan"), 2.0, None, 5.0]):
            checkpoints.save(step, state(step), metric)
        checkpoints.wait()
        assert (checkpoints.steps(), checkpoints.best(), checkpoints.latest()) == ([1, 4, 5], 1, 5)
    with Checkpoints(tmp_path, keep_last=1, keep_best=0) as checkpoints:
        checkpoints.save(6, state(6), 0.5)
        checkpoints.wait()
        assert (checkpoints.steps(), checkpoints.best()) == ([6], 6)


def test_saving_a_step_again_does_nothing(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(2, state(2))
        checkpoints.save(2, state(9))
        assert_equal(checkpoints.restore(2, like(state())), state(2))
        checkpoints.save(2, state(9))
        checkpoints.save(1, state(1))  # older than the latest, which Orbax would silently skip
        assert_equal(checkpoints.restore(1, like(state())), state(1))
        assert_equal(checkpoints.restore(None, like(state())), state(2))


def test_the_state_may_be_donated_while_it_is_saved(tmp_path):
    big = {"w": jnp.arange(1 << 20, dtype=jnp.float32)}
    step = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf * 0 - 1, tree), donate_argnums=0)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(0, big)
        shapes = like(big)
        big = step(big)
        restored = checkpoints.restore(0, shapes)
    np.testing.assert_array_equal(restored["w"], np.arange(1 << 20, dtype=np.float32))


@pytest.mark.skipif(len(jax.devices()) < 4, reason="needs 4 devices, real or simulated")
def test_a_checkpoint_moves_to_another_mesh(tmp_path):
    def placed(devices: int) -> Any:
        mesh = jax.make_mesh(
            (devices,), ("data",), (AxisType.Auto,), devices=jax.devices()[:devices]
        )
        sharding = NamedSharding(mesh, PartitionSpec("data"))
        return {"w": jax.device_put(jnp.arange(64.0).reshape(8, 8), sharding)}

    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(0, placed(4))
        moved = checkpoints.restore(None, like(placed(2)))
        assert moved["w"].sharding == placed(2)["w"].sharding
        assert_equal(moved, placed(2))
        anywhere = {"w": jax.ShapeDtypeStruct((8, 8), jnp.float32)}
        assert_equal(checkpoints.restore(None, anywhere), placed(1))


def test_any_flipped_bit_changes_the_checksum():
    rng = np.random.default_rng(0)
    for dtype in (np.float32, jnp.bfloat16, np.int32, np.int8, np.bool_):
        array = rng.integers(0, 2, (5, 7)).astype(dtype)
        before = int(checksum(array))
        for place in range(array.nbytes):
            flipped = bytearray(array.tobytes())
            flipped[place] ^= 1 if dtype is np.bool_ else 1 << int(rng.integers(8))
            assert int(checksum(np.frombuffer(flipped, dtype).reshape(5, 7))) != before
    assert int(checksum(jnp.array([1.0, 2.0]))) != int(checksum(jnp.array([2.0, 1.0])))


# Damaged checkpoints


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    with Checkpoints(folder) as checkpoints:
        for step in (4, 5):
            checkpoints.save(step, state(step))
    return folder


def damage(path: Path, how: str) -> None:
    data = path.read_bytes()
    if how == "delete":
        path.unlink()
    elif how == "truncate":
        path.write_bytes(data[: len(data) // 2])
    elif how == "garbage":
        path.write_bytes(random.Random(0).randbytes(len(data)))
    else:
        flipped = bytearray(data)
        flipped[len(data) // 2] ^= 16
        path.write_bytes(bytes(flipped))


@pytest.mark.parametrize("how", ["delete", "truncate", "garbage", "flip"])
@pytest.mark.parametrize("which", ["largest", "manifest"])
def test_damage_is_reported_with_the_last_good_step(saved, tmp_path, how, which):
    folder = tmp_path / "run"
    shutil.copytree(saved, folder)
    files = [path for path in (folder / "5").rglob("*") if path.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)
    path = largest if which == "largest" else folder / "5" / "manifest" / "metadata"
    damage(path, how)
    with Checkpoints(folder) as checkpoints:
        with pytest.raises((Failed, BadInput)) as caught:
            checkpoints.restore(None, like(state()))
        assert str(folder / "5") in str(caught.value)
        assert "\n" not in str(caught.value)
        assert "last good one is 4" in str(caught.value)
        assert_equal(checkpoints.restore(4, like(state())), state(4))


def test_any_damage_is_detected(saved, tmp_path):
    """After damage to any file, restoring gives the right state or an error."""
    folder = tmp_path / "run"
    for path in (path.relative_to(saved) for path in (saved / "5").rglob("*") if path.is_file()):
        for how in ("truncate", "flip"):
            shutil.copytree(saved, folder)
            damage(folder / path, how)
            with Checkpoints(folder) as checkpoints, suppress(Failed, BadInput):
                assert_equal(checkpoints.restore(5, like(state())), state(5))
            shutil.rmtree(folder)


def test_a_damaged_only_checkpoint_is_reported(saved, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(saved, folder)
    shutil.rmtree(folder / "4")
    shutil.rmtree(folder / "5" / "state")
    with Checkpoints(folder) as checkpoints, pytest.raises(Failed, match="no earlier one"):
        checkpoints.restore(None, like(state()))


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (state(width=16), r"weights\.w: got 'float32\[32, 64\]'.*has float32\[16, 64\]"),
        (State(state().weights, (), jnp.int32(0)), r"optimizer\.0\.mean.*nothing of this name"),
        (State({"v": jnp.ones(1)}, (), jnp.int32(0)), r"weights\.v: got 'nothing'"),
        (jax.tree.map(lambda a: a.astype(jnp.float32), state()), r"half: got 'bfloat16\[24\]'"),
    ],
)
def test_another_model_is_reported_by_its_first_leaf(saved, wanted, message):
    with Checkpoints(saved, read_only=True) as checkpoints, pytest.raises(BadInput, match=message):
        checkpoints.restore(None, like(wanted))


def test_folders_that_are_no_checkpoints_are_refused(saved, tmp_path):
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(BadInput, match="nothing is saved"):
        checkpoints.restore(None, like(state()))
    with Checkpoints(saved, read_only=True) as checkpoints, pytest.raises(BadInput, match="4, 5"):
        checkpoints.restore(7, like(state()))
    (tmp_path / "3").mkdir()  # what is left of a deletion
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.steps() == []
        checkpoints.save(3, state(3))
        assert_equal(checkpoints.restore(3, like(state())), state(3))
    shutil.rmtree(tmp_path / "3")
    (tmp_path / "3").mkdir()
    (tmp_path / "3" / "photograph").touch()
    with pytest.raises(BadInput, match="no checkpoint of mukv"):
        Checkpoints(tmp_path)
    missing = tmp_path / "missing"
    with Checkpoints(missing, read_only=True) as checkpoints, pytest.raises(BadInput):
        checkpoints.restore(None, like(state()))
    assert not missing.exists()
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "inside"):
        with pytest.raises(BadInput, match="in the way"):
            Checkpoints(path)


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_full_disk_is_reported_and_the_old_step_stays(tmp_path, asynchronous, full_disk):
    big = {"w": jax.random.normal(jax.random.key(0), (100_000,))}
    with Checkpoints(tmp_path, keep_last=1, asynchronous=asynchronous) as checkpoints:
        checkpoints.save(1, big)
        checkpoints.wait()

        def save_and_wait() -> None:
            checkpoints.save(2, big)
            checkpoints.wait()

        with (
            full_disk(100_000),
            pytest.raises(Failed, match=r"2 .*disk is full; step 1") as caught,
        ):
            save_and_wait()
        assert "\n" not in str(caught.value)
        assert [path.name for path in tmp_path.iterdir()] == ["1"]
        assert_equal(checkpoints.restore(None, like(big)), big)
        checkpoints.save(3, big)
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir())[-1] == "3"


def test_a_disk_that_is_too_small_is_reported_before(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 9, 0))
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(Failed, match="the disk is full"):
        checkpoints.save(1, state(1))
    assert list(tmp_path.iterdir()) == []


KILLED = """
import sys, jax, jax.numpy as jnp
from pathlib import Path
from mukv.storage.checkpoint import Checkpoints
with Checkpoints(Path(sys.argv[1]), keep_last=1) as checkpoints:
    start = (checkpoints.latest() or 0) + 1
    for step in range(start, start + 1000):
        checkpoints.save(step, {"w": jax.random.normal(jax.random.key(step), (200_000,))})
        print(step, flush=True)
"""


def test_a_killed_process_leaves_whole_checkpoints_only(tmp_path):
    rng = random.Random(0)
    wanted = {"w": jax.ShapeDtypeStruct((200_000,), jnp.float32)}
    latest = 0
    for _ in range(4):
        command = [sys.executable, "-c", KILLED, str(tmp_path)]
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=os.environ
        )
        assert process.stdout is not None
        process.stdout.readline()
        process.stdout.readline()  # so that one is complete, and the next is being written
        time.sleep(rng.uniform(0, 0.3))
        process.kill()
        process.wait()
        process.stdout.close()
        with Checkpoints(tmp_path, keep_last=1) as checkpoints:
            step = checkpoints.latest()
            assert step is not None
            assert step > latest
            latest = step
            restored = checkpoints.restore(None, wanted)
            expected = jax.random.normal(jax.random.key(step), (200_000,))
            np.testing.assert_array_equal(restored["w"], expected)
        assert not [path for path in tmp_path.iterdir() if not path.name.isdecimal()]


IN_A_PROCESS = """
import logging, resource, shutil, signal, sys, jax, jax.numpy as jnp
from pathlib import Path
from mukv.storage.checkpoint import Checkpoints
from mukv.core.errors import BadInput, Failed
for library in ("absl", "asyncio"):
    logging.getLogger(library).setLevel(logging.CRITICAL)  # as the command does
saved, work = Path(sys.argv[1]), Path(sys.argv[2])
like = {name: jax.ShapeDtypeStruct((8, 16), jnp.float32) for name in "abcdefgh"}
told = 0
for path in sorted(path.relative_to(saved) for path in (saved / "2").rglob("*") if path.is_file()):
    for how in ("half", "delete", "directory"):
        shutil.copytree(saved, work)
        file = work / path
        data = file.read_bytes()
        file.unlink()
        if how == "directory":
            file.mkdir()
        elif how == "half":
            file.write_bytes(data[: len(data) // 2])
        with Checkpoints(work) as checkpoints:
            try:
                checkpoints.restore(None, like)
            except Failed as error:
                assert "last good one is 1" in str(error) and len(str(error).splitlines()) == 1
                told += 1
        shutil.rmtree(work)
print(told)

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
arrays = {n: jax.random.normal(jax.random.key(0), (20_000,)) for n in "abcdefgh"}
with Checkpoints(saved) as checkpoints:
    for step in (3, 4, 5):
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
        try:
            checkpoints.save(step, arrays)
            checkpoints.wait()
        except Failed as error:
            assert f"step {step} was not saved: the disk is full; step 2 is safe" in str(error)
            assert sorted(path.name for path in saved.iterdir()) == ["1", "2"]
            told += 1
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
    checkpoints.save(6, arrays)
print(told)
"""


@pytest.mark.product
def test_damage_and_a_full_disk_are_reported_once_and_nothing_else_is_printed(tmp_path):
    """A process with damaged checkpoints and a full disk reports each once and prints nothing else,
    also at its end."""
    with Checkpoints(tmp_path / "saved") as checkpoints:
        for step in (1, 2):
            keys = jax.random.split(jax.random.key(step), 8)
            numbers = {
                n: jax.random.normal(k, (8, 16)) for n, k in zip("abcdefgh", keys, strict=True)
            }
            checkpoints.save(step, numbers)
    command = [sys.executable, "-c", IN_A_PROCESS, str(tmp_path / "saved"), str(tmp_path / "work")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stderr) == (0, "")
    damaged, all_told = map(int, done.stdout.split())
    assert (damaged >= 8, all_told - damaged) == (True, 3)


def test_a_pipe_in_place_of_a_file_is_refused(saved, tmp_path):
    """A pipe in place of a file is refused, since reading it would never end."""
    for name in ("manifest/metadata", "state/manifest.ocdbt"):
        folder = tmp_path / name.replace("/", "-")
        shutil.copytree(saved, folder)
        (folder / "5" / name).unlink()
        os.mkfifo(folder / "5" / name)
        with Checkpoints(folder) as checkpoints, pytest.raises(Failed, match="last good one is 4"):
            checkpoints.restore(None, like(state()))


NAMES = (
    *("a b", "new\nline", "{x}", "{", "%20", "#", "-dash", ".dot", "é日本", "n" * 255, "a:b", "~"),
    *("file:", "gs:x", "$HOME", "'\"", "a|b", "\x01", "...", " lead", "x.orbax-checkpoint-tmp"),
)
REFUSED = ("a[b]", "[", "]", "a\\b", "a*b", "?", os.fsdecode(b"\xff\xfe"))


def test_a_path_works_whole_or_is_refused_before_anything_is_written(tmp_path, record_property):
    small = {"w": jnp.arange(12.0).reshape(3, 4)}

    def there_and_back(name: str) -> None:
        folder = tmp_path / name / "checkpoints"
        with Checkpoints(folder) as checkpoints:
            checkpoints.save(1, small)
        with Checkpoints(folder) as checkpoints:
            assert_equal(checkpoints.restore(None, like(small)), small)

    calls = [(ascii(name)[:40], partial(there_and_back, name)) for name in (*NAMES, *REFUSED)]
    counts = check_all("checkpoint paths", calls, record_property)
    assert counts == {"accepted": len(NAMES), "refused": len(REFUSED)}
    assert not [name for name in REFUSED if (tmp_path / name).exists()]


def test_a_path_that_orbax_reads_as_a_pattern_is_refused(tmp_path):
    """A checkpoint under a path that Orbax would read as a pattern is refused."""
    with Checkpoints(tmp_path / "a") as checkpoints:
        checkpoints.save(1, state(1))
    (tmp_path / "a").rename(tmp_path / "a\\b")
    with Checkpoints(tmp_path / "a\\b", read_only=True) as checkpoints:
        assert checkpoints.latest() == 1
        with pytest.raises(BadInput, match="path without"):
            checkpoints.restore(None, like(state()))


def test_the_manifest_is_readable(saved):
    manifest = json.loads((saved / "5" / "manifest" / "metadata").read_text())
    assert manifest["leaves"]["weights.gain.half"] == "bfloat16[24]"
    assert manifest["leaves"].keys() == manifest["checksums"].keys()
