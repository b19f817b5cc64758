"""After a kill before any file operation, the same command succeeds and leaves no leftovers.

Each command is killed before every kind of operation (its name, and the path without numbers), at
its first and its last occurrence. Numbers of kills are printed at the end of the run.
"""

from __future__ import annotations

import hashlib
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from mukv.data.build import build_tokens
from mukv.data.tokens import open_tokens
from tests.conftest import MINUSCULE
from tests.kills import Server, pattern
from tests.pairs import params
from tests.processes import contents

pytestmark = pytest.mark.xdist_group("kills")

CHANGING = {
    *("provenance.json", "metrics.jsonl", "compress.csv", "finished.jsonl", "study.db"),
    "results.json",
}
"""Files with times and speeds."""

Prepare = Callable[[Path], None]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server() as started:
        yield started


def result(root: Path) -> dict[str, str]:
    """Return every file and folder, with a digest of contents that have to be equal."""
    found = {str(path.relative_to(root)): "" for path in root.rglob("*")}
    return found | {
        name: hashlib.sha256(data).hexdigest()
        for name, data in contents(root).items()
        if Path(name).name not in CHANGING
        and not name.endswith(".png")
        and "/checkpoints/" not in f"/{name}"
    }


def shape(found: dict[str, str]) -> dict[str, str]:
    """Replace the files inside of checkpoints, whose names are random, by one entry per
    checkpoint."""
    return {name: digest for name, digest in found.items() if "checkpoints/" not in name} | {
        "/".join(name.split("/")[: name.split("/").index("checkpoints") + 2]): ""
        for name in found
        if "/checkpoints/" in f"/{name}"
    }


def check(
    server: Server,
    folder: Path,
    prepare: Prepare,
    arguments: list[object],
    every: int,
    skip: str = "nothing",
    chain: int = 4,
    survives: Prepare | None = None,
) -> Counter[str]:
    """Kill a command before each kind of operation, repeat it, and return counts.

    every: only each `every`-th kind is tried, the last among them, at which the result is moved
    into
    place. skip: kinds with this in their name are left out. chain: number of kills in the same
    folder
    before the command may end. It must end with the files of an undisturbed command. A kill that
    was
    never reached is tried again in a new folder. survives: a check after every kill.
    """
    undisturbed = folder / "undisturbed" / "root"
    undisturbed.mkdir(parents=True)
    prepare(undisturbed)
    status, operations, said = server.run(undisturbed, *arguments)
    assert status == 0, said
    expected = shape(result(undisturbed))
    kinds = list(dict.fromkeys(map(pattern, operations)))
    counts = Counter(operations=len(operations), kinds=len(kinds))
    waiting = [kind for kind in kinds if skip not in kind][::-every][::-1]
    wrong: list[str] = []
    place = 0
    while waiting:
        place += 1
        root = folder / str(place) / "root"
        root.mkdir(parents=True)
        prepare(root)
        killed: list[str] = []
        status = -9
        while status == -9 and waiting and len(killed) < chain:
            status, _, said = server.run(root, *arguments, kill=(waiting[0], 1))
            if status == -9 or not killed:
                killed.append(waiting.pop(0))
                if survives is not None:
                    survives(root)
                counts["killed" if status == -9 else "not reached"] += 1
        if status == -9:
            status, _, said = server.run(root, *arguments)
        found = shape(result(root))
        if status:
            wrong.append(f"{killed}: {status} {said[-600:]}")
        elif found != expected:
            differ = sorted(
                name for name in found.keys() | expected if found.get(name) != expected.get(name)
            )
            wrong.append(f"{killed}: {differ[:6]}")
        shutil.rmtree(folder / str(place))
    assert not wrong, f"{len(wrong)} of {place}:\n" + "\n".join(wrong[:20])
    assert counts["not reached"] <= len(kinds) // 10, counts
    return counts


def nothing(_: Path) -> None:
    """Leave the new folder empty."""


@pytest.fixture
def count(record_property) -> Callable[[str, Counter[str]], None]:
    return lambda command, counts: record_property("kills", (command, dict(counts)))


@pytest.fixture(params=params([16, 1], [16]), ids=["some", "all"])
def every(request: pytest.FixtureRequest) -> int:
    """Return how many kinds of operation there are per kill; 16 in the quick round."""
    return request.param


SMALL = (*MINUSCULE, "model.plan=[{repeats: 1}]", "train.steps=2")


def test_checkpoints(server, tmp_path, count, every):
    given = ["count-up", "checkpoints", 3]
    count("checkpoints", check(server, tmp_path, nothing, given, every, chain=8))


def test_train(server, token_file, tmp_path, count, every):
    """Training survives kills; operations inside a checkpoint are left to the test above."""
    given = ["train", "tiny", *SMALL, f"data.path={token_file}", "--out", "runs/new"]
    count("train", check(server, tmp_path, nothing, given, every, skip="checkpoint-tmp/"))


def texts(root: Path) -> None:
    (root / "texts").mkdir()
    for number in range(6):
        (root / "texts" / f"{number}.txt").write_text(f"Text number {number}. " * 20)


@pytest.mark.product
def test_train_on_a_mixture(server, token_file, tmp_path, count, every):
    """A run that is killed between batches of a mixture ends with the bits of one that was not."""
    texts(tmp_path)
    other = build_tokens([str(tmp_path / "texts")], tmp_path / "other").path
    mixture = f"data.mixture=[{{path: {token_file}, weight: 3}}, {{path: {other}}}]"
    given = ["train", "tiny", *SMALL, "train.checkpoint_every=1", mixture, "--out", "runs/new"]
    count("mixture", check(server, tmp_path, nothing, given, every, skip="checkpoint-tmp/"))


@pytest.mark.product
def test_data(server, tmp_path, count, every):
    given = ["data", "texts", "--tokenizer", "bpe:300", "--out", "tokens"]
    count("data", check(server, tmp_path, texts, given, every, chain=1))


def test_data_in_place_of_others(server, tmp_path, count, every):
    """After every kill of `data --overwrite` the token file is the old or the new one."""

    def whole(root: Path) -> None:
        open_tokens(root / "tokens").verify()

    def old(root: Path) -> None:
        texts(root)
        build_tokens([str(root / "texts")], root / "tokens")

    given = ["data", "texts", "--tokenizer", "bpe:300", "--out", "tokens", "--overwrite"]
    counts = check(server, tmp_path, old, given, every, chain=1, survives=whole)
    count("data --overwrite", counts)


def test_import(server, exported, tmp_path, count, every):
    given = ["import", exported, "--out", "runs/new"]
    count("import", check(server, tmp_path, nothing, given, every))


@pytest.mark.product
def test_export(server, trained, tmp_path, count, every):
    count("export", check(server, tmp_path, nothing, ["export", trained, "--out", "new"], every))


def run_of(trained: Path) -> Prepare:
    return lambda root: shutil.copytree(trained, root / "run") and None


@pytest.mark.product
def test_compress(server, trained, tmp_path, count, every):
    given = ["compress", "run", "--tokens", trained.parent / "ids.npy", "--policy", "streaming"]
    np.save(trained.parent / "ids.npy", np.arange(400).reshape(4, 100) % 250)
    sizes = ["--samples", 1, "--length", 64, "--strings", 2]
    count("compress", check(server, tmp_path, run_of(trained), [*given, *sizes], every, chain=20))


@pytest.mark.product
def test_report(server, trained, tmp_path, count, every):
    given = ["report", "run", "--out", "run/report.html"]
    count("report", check(server, tmp_path, run_of(trained), given, 2 * every - 1))


@pytest.mark.product
def test_sweep(server, token_file, tmp_path, count, every):
    given = ["sweep", "tiny", *SMALL, f"data.path={token_file}", "train.learning_rate=1e-3,1e-2"]
    rest = ["--out", "sweep", "--patience", "0.2"]
    count("sweep", check(server, tmp_path, nothing, [*given, *rest], 2 * every - 1, chain=12))
