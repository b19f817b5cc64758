"""Which commands restart themselves with settings for the memory allocator."""

from __future__ import annotations

import os

import pytest

from mukv.cli import launch
from mukv.cli.app import ORDER


@pytest.fixture
def on_a_cpu(monkeypatch):
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setattr(launch.sys, "platform", "linux")
    monkeypatch.setattr(os, "confstr_names", {"CS_GNU_LIBC_VERSION": 2})


@pytest.mark.parametrize(
    ("words", "helps"),
    [
        (["train", "tiny"], True),
        (["generate", "run", "--prompt", "a"], True),
        (["describe", "tiny"], False),
        (["docs"], False),
        (["train", "--help"], False),
        (["--version"], False),
        ([], False),
    ],
)
def test_only_commands_that_train_or_decode(on_a_cpu, words, helps):
    assert launch.allocator_helps(words) is helps
    assert set(ORDER) >= launch.HEAVY


def test_no_restart_where_it_has_no_effect(on_a_cpu, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setenv("GLIBC_TUNABLES", "")
        assert not launch.allocator_helps(["train"])
    with monkeypatch.context() as patch:
        patch.setattr(os, "confstr_names", {"CS_PATH": 0})
        assert not launch.allocator_helps(["train"])
    with monkeypatch.context() as patch:
        patch.setattr(launch.sys, "platform", "darwin")
        assert not launch.allocator_helps(["train"])
    with monkeypatch.context() as patch:
        patch.setenv("JAX_PLATFORMS", "cuda")
        assert not launch.allocator_helps(["train"])


def test_accelerators_are_seen_by_their_devices(monkeypatch, tmp_path):
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    assert not launch.has_accelerator(tmp_path)
    (tmp_path / "nvidiactl").touch()
    assert not launch.has_accelerator(tmp_path)
    (tmp_path / "nvidia0").touch()
    assert launch.has_accelerator(tmp_path)


def test_the_command_starts_again_with_the_settings(on_a_cpu, monkeypatch):
    started = []
    monkeypatch.setattr(launch.sys, "argv", ["mukv", "train", "tiny"])
    monkeypatch.setattr(os, "execv", lambda program, words: started.append(words))
    monkeypatch.setenv("GLIBC_TUNABLES", "x")
    monkeypatch.delenv("GLIBC_TUNABLES")
    launch.restart_with_allocator()
    assert started == [[launch.sys.executable, "-m", "mukv", "train", "tiny"]]
    assert os.environ["GLIBC_TUNABLES"] == launch.ALLOCATOR
