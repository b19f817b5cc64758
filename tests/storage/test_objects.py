"""Object stores: their guarantees, refusals, leases, and copies that survive a kill."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from mukv.core.errors import BadInput, Failed
from mukv.runs.folder import RunDirectory
from mukv.storage import lease
from mukv.storage.copies import Copy, complete, fetched, shown
from mukv.storage.lease import Holder, Lease, Lost
from mukv.storage.locks import Held
from mukv.storage.objects import Objects, address
from tests.conftest import MINUSCULE
from tests.storage.store import SECRET, bucket, s3_server

__all__ = ["bucket", "s3_server"]


def quiet(_: str) -> None:
    """Ignore a message."""


def machine(monkeypatch, path: Path) -> None:
    """Use another cache folder, as another machine would."""
    monkeypatch.setenv("MUKV_CACHE", str(path))


def test_addresses():
    assert address("s3://b-1/a/run/") == "s3://b-1/a/run"
    assert address(Path("gs://bucket/run")) == "gs://bucket/run"
    assert address("runs/s3:/x") is None
    for wrong in ("s3://", "s3://bucket", "s3://Bucket/run", "s3://bucket//run", "gs://b/r?x=1"):
        with pytest.raises(BadInput, match="BUCKET/FOLDER"):
            address(wrong)
    with pytest.raises(BadInput) as refused:
        address(f"s3://key:{SECRET}@bucket/run")
    assert "credentials" in str(refused.value)
    assert SECRET not in str(refused.value)


def test_an_object_is_created_once(bucket):
    store = Objects(f"{bucket}/folder")
    assert store.list() == {}
    assert store.read("a") is None
    assert store.create("a", b"1")
    assert not store.create("a", b"2")
    store.write("deep/b", b"3")
    before = store.list()
    assert sorted(before) == ["a", "deep/b"]
    store.write("a", b"4")
    assert store.read("a") == b"4"
    assert {name for name, stamp in store.list().items() if before[name] != stamp} == {"a"}
    store.delete(["a", "missing", "deep/b"])
    assert store.list() == {}


def test_refusals(bucket, monkeypatch):
    with pytest.raises(BadInput, match="no such bucket"):
        Objects("s3://no-such-bucket-here/run").list()
    with pytest.raises(BadInput, match="got 'nothing'"):
        fetched(f"{bucket}/nothing")

    store = Objects(f"{bucket}/run")

    def refuse(error: Exception):
        def find(*_: object, **__: object) -> None:
            raise error

        monkeypatch.setattr(store.files, "find", find)
        with pytest.raises((BadInput, Failed)) as refused:
            store.list()
        assert SECRET not in str(refused.value)
        assert refused.value.__suppress_context__
        return str(refused.value)

    assert "may list, read, write and delete" in refuse(PermissionError(f"signed with {SECRET}"))
    assert "can't be used: OSError" in refuse(OSError(f"token {SECRET}"))
    missing = type("NoCredentialsError", (Exception,), {})
    assert "no credentials" in refuse(missing(SECRET))


def test_a_missing_plugin(monkeypatch):
    import fsspec

    def missing(*_: object, **__: object) -> None:
        raise ImportError("Install gcsfs to access Google Storage")

    monkeypatch.setattr(fsspec, "filesystem", missing)
    with pytest.raises(BadInput, match=r"needs gcsfs: pip install 'mukv\[gs\]'"):
        Objects("gs://bucket/run")


def test_one_writer_at_a_time(bucket, monkeypatch):
    store = Objects(f"{bucket}/run")
    first, before = Lease.taken(store, quiet)
    assert before == ""
    first.renew("copy one")
    # The lease is of another host, whose processes can't be looked up.
    other = replace(first.holder, host="elsewhere", process=1)
    store.write("lease", b"")
    store.write(".mukv/lease-00000001", lease._content(other))

    def renewed(_: float) -> None:
        later = replace(other, time=other.time + 1)
        store.write(".mukv/lease-00000001", lease._content(later))

    monkeypatch.setattr(lease.time, "sleep", renewed)
    said: list[str] = []
    with pytest.raises(Held, match="process 1 on elsewhere is writing"):
        Lease.taken(store, said.append)
    assert "waiting up to 60 s" in said[0]
    # The lease expires: the next writer takes it, and the first one's renewal fails.
    store.write(".mukv/lease-00000001", lease._content(replace(other, time=other.time - 100)))
    second, before = Lease.taken(store, quiet)
    assert (second.number, before) == (2, "copy one")
    with pytest.raises(Lost, match="another process has taken over"):
        first.renew("copy one")
    second.give_up()
    assert lease.latest(store)[1].ended
    assert Holder("elsewhere", 1, "", 0.0).ended


def checkpoint(folder: Path, step: int, content: bytes) -> None:
    """Write a checkpoint and rename it into place, as Orbax does."""
    made = folder / f"checkpoints/{step}.orbax-checkpoint-tmp"
    for name in ("state/d/0", "manifest/metadata"):
        (made / name).parent.mkdir(parents=True)
        (made / name).write_bytes(content)
    made.rename(folder / f"checkpoints/{step}")


def steps(folder: Path) -> list[str]:
    there = folder / "checkpoints"
    return sorted(path.name for path in there.iterdir()) if there.exists() else []


def test_a_copy_is_sent_and_fetched(bucket, tmp_path, monkeypatch):
    url = f"{bucket}/runs/one"
    with Copy(url).written() as folder:
        assert shown(folder / "config.yaml") == f"{url}/config.yaml"
        (folder / "config.yaml").write_text("a: 1\n")
        (folder / ".lock").write_text("")
        checkpoint(folder, 1, b"one")
        checkpoint(folder, 2, b"two")
    names = [name for name in Objects(url).list() if not name.startswith(".")]
    assert len(names) == 5
    with Copy(url).written() as folder:  # without waiting: the lease was released
        shutil.rmtree(folder / "checkpoints/1")
        (folder / "config.yaml").write_text("a: 2\n")
    machine(monkeypatch, tmp_path / "other")
    folder = fetched(url)
    assert (folder / "config.yaml").read_text() == "a: 2\n"
    assert steps(folder) == ["2"]
    assert fetched("runs/local") == Path("runs/local")


@pytest.mark.product
def test_what_a_killed_writer_leaves(bucket, tmp_path, monkeypatch):
    url = f"{bucket}/run"
    with Copy(url).written() as folder:
        checkpoint(folder, 1, b"one")
    Objects(url).write("checkpoints/7/state/d/0", b"part")  # without its manifest
    machine(monkeypatch, tmp_path / "other")
    assert steps(fetched(url)) == ["1"]
    with Copy(url).written() as folder:
        (folder / "metrics.jsonl").write_text("{}\n")
    assert not any("/7/" in f"/{name}" for name in Objects(url).list())
    assert complete({"checkpoints/7/state/d": "", "a/.hidden": "", "b": ""}) == {"b": ""}


def test_a_killed_command_keeps_what_was_not_sent(bucket, tmp_path, monkeypatch):
    """On the same machine, files that were not sent before a kill are kept, unless another machine
    wrote to the store since."""
    monkeypatch.setattr(lease, "SECONDS", 0.5)
    url = f"{bucket}/run"
    with Copy(url).written() as folder:
        checkpoint(folder, 1, b"one")
    copy = Copy(url)
    monkeypatch.setattr(copy, "_finish", lambda: None)  # killed before the end
    with copy.written() as folder:
        checkpoint(folder, 2, b"two")
    assert steps(fetched(url)) == ["1", "2"]
    here = os.environ["MUKV_CACHE"]
    machine(monkeypatch, tmp_path / "other")
    with Copy(url).written() as folder:
        assert steps(folder) == ["1"]
        checkpoint(folder, 3, b"three")
    machine(monkeypatch, Path(here))
    assert steps(fetched(url)) == ["1", "3"]


@pytest.mark.product
def test_training_continues_on_another_machine(bucket, token_file, mukv, tmp_path, monkeypatch):
    """With tokens and run in the store, another machine continues to the weights of a run on one
    disk."""
    with Copy(f"{bucket}/tokens").written() as folder:
        shutil.copytree(token_file, folder, dirs_exist_ok=True)
    run, every = f"{bucket}/runs/small", "train.checkpoint_every=2"
    given = ["train", "tiny", *MINUSCULE, f"data.path={bucket}/tokens", every]
    done = mukv(
        *given, "train.steps=2", "train.schedule={kind: inverse_sqrt}", "--out", run, "--json"
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["run"] == run
    machine(monkeypatch, tmp_path / "other")
    done = mukv("train", run, "train.steps=4", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["step"] == 4
    told = mukv("describe", run, "--json")
    assert told.returncode == 0, told.stderr
    local = tmp_path / "local"
    given[-2] = f"data.path={token_file}"
    done = mukv(*given, "train.steps=4", "train.schedule={kind: inverse_sqrt}", "--out", local)
    assert done.returncode == 0, done.stderr
    machine(monkeypatch, tmp_path / "third")
    one, two = (RunDirectory(path).weights for path in (fetched(run), local))
    for path in two.iterdir():
        assert (one / path.name).read_bytes() == path.read_bytes()


def test_several_processes_need_a_shared_folder(mukv):
    done = mukv("train", "tiny", "--out", "s3://bucket/run", "--distributed", "auto")
    assert done.returncode == 2
    assert "a folder that all processes share" in done.stderr
