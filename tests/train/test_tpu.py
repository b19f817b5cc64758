"""deploy/tpu.sh creates its VM again after a preemption; a fake gcloud records its calls."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "deploy/tpu.sh"
GCLOUD = """#!/bin/bash
echo "$4 ${@: -1}" >> calls
case "$4" in
  describe) [ -e state ] && cat state || exit 1 ;;
  create) echo READY > state ;;
  delete) rm state ;;
  ssh)
    [ "$(grep -c ^ssh calls)" -eq 1 ] || exit LAST
    echo PREEMPTED > state
    exit FIRST ;;
esac
"""


@pytest.mark.parametrize(("first", "last"), [(255, 0), (0, 0), (0, 2)])
def test_a_preempted_vm_is_made_again(first, last, tmp_path):
    """A preempted VM is created again.

    first, last: exit status of the training when the VM is taken away, and of the next training
    """
    fake = tmp_path / "gcloud"
    fake.write_text(GCLOUD.replace("FIRST", str(first)).replace("LAST", str(last)))
    fake.chmod(0o755)
    out = "gs://bucket/runs/name"
    done = subprocess.run(
        ["bash", SCRIPT, "vm", "zone", "v5p-8", "small", "mesh.data=4", "--out", out],
        cwd=tmp_path,
        env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "PAUSE": "0"},
        timeout=30,
        check=False,
    )
    assert done.returncode == last
    calls = (tmp_path / "calls").read_text().splitlines()
    made = [call.split()[0] for call in calls if not call.startswith("describe")]
    assert made == ["create", "ssh", "delete", "create", "ssh"]
    assert all(f"mukv train small mesh.data=4 --out {out}" in c for c in calls if c[:3] == "ssh")
