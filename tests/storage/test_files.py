"""Files and folders are written whole or not at all; leftovers of killed processes are removed."""

from __future__ import annotations

import errno
import os

import pytest

from mukv.core.errors import BadInput
from mukv.storage import files
from mukv.storage.files import (
    clear_leftovers,
    new_folder,
    replacing,
    temporary,
    write_atomic,
    writer_of,
)
from mukv.storage.locks import NoLocks


def filled(path, text="new"):
    path.mkdir(parents=True)
    (path / "file").write_text(text)


def dead(path, name="file"):
    """Make the leftovers of a process that is killed while it writes `path`."""
    folder = path.with_name(f".{path.name}.{os.getpid()}.partial")
    folder.mkdir()
    (folder / ".lock").write_text(f"{os.getpid()} here\n")
    (folder / name).mkdir()
    return folder


def test_a_file_is_replaced(tmp_path):
    write_atomic(tmp_path / "new" / "a", "1")
    write_atomic(tmp_path / "new" / "a", b"2")
    assert (tmp_path / "new" / "a").read_text() == "2"
    with pytest.raises(BadInput), replacing(tmp_path / "new" / "a") as path:
        os.stat(path)
    assert os.listdir(tmp_path / "new") == ["a"]
    assert (tmp_path / "new" / "a").read_text() == "2"


@pytest.mark.parametrize("exchanged", [True, False])
def test_a_folder_is_replaced(tmp_path, monkeypatch, exchanged):
    if not exchanged:

        def refuse(*_):
            raise OSError(errno.ENOSYS, "not here")

        monkeypatch.setattr(files, "_exchange", refuse)
    filled(tmp_path / "a", "old")
    with new_folder(tmp_path / "a", overwrite=True) as made:
        (made / "file").write_text("new")
        assert (tmp_path / "a" / "file").read_text() == "old"
    assert (tmp_path / "a" / "file").read_text() == "new"
    assert os.listdir(tmp_path) == ["a"]


def test_a_kill_between_two_renames_is_mended(tmp_path):
    """A kill between two renames is undone on file systems that can't exchange folders."""
    folder = dead(tmp_path / "a", name="a")
    filled(folder / ".old", "old")
    clear_leftovers(tmp_path)
    assert os.listdir(tmp_path) == ["a"]
    assert (tmp_path / "a" / "file").read_text() == "old"


def test_a_folder_in_the_way_stays(tmp_path):
    filled(tmp_path / "a", "old")
    with pytest.raises(BadInput, match="in the way"), new_folder(tmp_path / "a") as made:
        (made / "file").write_text("new")
    with new_folder(tmp_path / "a") as made:
        (made / "file").write_text("old")  # the same: kept
    assert (tmp_path / "a" / "file").read_text() == "old"
    with new_folder(tmp_path / "empty") as made:
        pass
    with new_folder(tmp_path / "empty") as made:
        (made / "file").write_text("new")
    assert sorted(os.listdir(tmp_path)) == ["a", "empty"]


def test_leftovers_go_unless_a_process_holds_them(tmp_path):
    dead(tmp_path / "a")
    (tmp_path / ".b.12.partial").mkdir()  # killed before it wrote anything
    with temporary(tmp_path / "c") as living:
        dead(tmp_path / "d")
        write_atomic(tmp_path / "e", "")
        assert sorted(os.listdir(tmp_path)) == [living.parent.name, "e"]
        assert writer_of(tmp_path / "c") == f"process {os.getpid()}"
    assert os.listdir(tmp_path) == ["e"]
    assert writer_of(tmp_path / "c") is None


def test_foreign_files_are_not_removed(tmp_path):
    (tmp_path / ".a.12.partial").mkdir()
    (tmp_path / ".a.12.partial" / "theirs").write_text("")
    (tmp_path / ".b.12.partial").write_text("a file")
    (tmp_path / ".c.partial").mkdir()
    os.symlink(tmp_path, tmp_path / ".d.12.partial")
    before = sorted(os.listdir(tmp_path))
    write_atomic(tmp_path / "a", "")
    assert sorted(os.listdir(tmp_path)) == [*before, "a"]


def test_without_locks_leftovers_stay(tmp_path, monkeypatch):
    def refuse(_):
        raise NoLocks(errno.ENOLCK, "no locks available")

    folder = dead(tmp_path / "a")
    monkeypatch.setattr(files, "acquire", refuse)
    write_atomic(tmp_path / "b", "1")
    assert folder.exists()
    assert (tmp_path / "b").read_text() == "1"


def test_two_writers_of_one_path(tmp_path):
    with replacing(tmp_path / "a") as one, replacing(tmp_path / "a") as two:
        one.write_text("1")
        two.write_text("2")
    assert os.listdir(tmp_path) == ["a"]
    assert (tmp_path / "a").read_text() == "1"


def test_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("[a]*?", "a\\b", "a\nb", "-a", "ä" * 100):
        with new_folder(tmp_path / name) as made:
            (made / "file").write_text("")
        dead(tmp_path / name)
        write_atomic(tmp_path / name / "file", "1")
    clear_leftovers(tmp_path)
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]
    with pytest.raises(BadInput, match="too long"):
        write_atomic(tmp_path / ("a" * 255), "")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with new_folder(files.Path(".")) as made:
        (made / "file").write_text("")
    assert os.listdir(tmp_path / "here") == ["file"]
