"""Any network failure on a remote source gives the same token file, or one error."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mukv.core.errors import BadInput, Failed
from mukv.data import remote, spool
from mukv.data.build import build_tokens
from mukv.data.selection import Selection, parse_size
from mukv.data.text import pieces
from mukv.data.tokens import TokenFile
from tests.data.web import Fault, Web, serving

TEXTS = [f"dócument {number}: " + "words and more " * (number * 7 % 23) for number in range(400)]


@pytest.fixture(scope="module")
def server():
    with serving() as web:
        yield web


@pytest.fixture
def web(server: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Web:
    """Return a server with the texts as JSONL and as Parquet; its client does not wait between
    tries."""
    rows = [json.dumps({"text": text}) for text in TEXTS]
    server.files["a.jsonl"] = ("\n".join([*rows[:9], "", *rows[9:]]) + "\n").encode()
    pq.write_table(pa.table({"text": TEXTS, "n": range(400)}), tmp_path / "p", row_group_size=60)
    server.files["a.parquet"] = (tmp_path / "p").read_bytes()
    server.fault, server.ranges, server.sent = lambda number: None, [], 0
    monkeypatch.setattr(remote, "PAUSES", (0.0, 0.0))
    monkeypatch.setattr(remote, "CHUNK_BYTES", 1000)
    monkeypatch.setattr(spool, "PART_BYTES", 5000)
    return server


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> TokenFile:
    """Return the token file of the same texts from a local file."""
    folder = tmp_path_factory.mktemp("plain")
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return build_tokens([str(folder / "a.jsonl")], folder / "t")


def fails_often(number: int) -> Fault:
    return {7: "cut", 8: 503}.get(number % 9) if number else "cut"


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
@pytest.mark.parametrize("fault", [lambda number: None, fails_often])
def test_a_failing_network_gives_the_same_tokens(web, plain, tmp_path, name, fault):
    web.fault = fault
    file = build_tokens([f"{web.url}/{name}?token=1"], tmp_path / "t")
    assert file.fingerprint == plain.fingerprint
    assert sorted(path.name for path in tmp_path.iterdir()) == ["p", "t"]


def test_a_server_that_ignores_ranges(web, plain, tmp_path):
    web.fault = lambda number: "cut" if number == 0 else "whole"
    assert build_tokens([f"{web.url}/a.jsonl"], tmp_path / "t").fingerprint == plain.fingerprint


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_a_further_call_fetches_only_the_rest(web, plain, tmp_path, name):
    """After a failure for good, a repeated call fetches only what was not fetched before."""
    alive = 1 if name == "a.jsonl" else 9
    web.fault = lambda number: ("cut" if number + 1 == alive else None) if number < alive else 503
    with pytest.raises(Failed, match=r"503.* after 3 tries; the same command goes on"):
        build_tokens([f"{web.url}/{name}"], tmp_path / "t")
    (kept,) = (tmp_path / "t.spool").iterdir()
    before, parts = web.sent, len(list(kept.iterdir()))
    assert parts > 1
    web.fault, web.ranges = (lambda number: None), []
    file = build_tokens([f"{web.url}/{name}"], tmp_path / "t")
    assert file.fingerprint == plain.fingerprint
    if name == "a.jsonl":
        assert int(web.ranges[0].partition("-")[0]) > before / 4
        assert web.sent < 1.3 * len(web.files[name])
    assert not (tmp_path / "t.spool").exists()


def test_a_kill_in_the_middle(web, plain, tmp_path):
    """After SIGKILL, the same command makes the same token file."""
    script = (
        "import sys, time\nfrom pathlib import Path\nfrom mukv.data import remote, spool\n"
        "from mukv.data.build import build_tokens\nremote.CHUNK_BYTES = spool.PART_BYTES = 3000\n"
        "read = remote.json_field\n"
        "remote.json_field = lambda *given: time.sleep(0.02) or read(*given)\n"
        "build_tokens([sys.argv[1]], Path(sys.argv[2]))"
    )
    url, out = f"{web.url}/a.jsonl", tmp_path / "t"
    process = subprocess.Popen([sys.executable, "-c", script, url, str(out)])
    until = time.monotonic() + 60
    while not list(tmp_path.glob("t.spool/*/000001.part")):
        assert time.monotonic() < until
        assert process.poll() is None
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not out.exists()
    web.ranges = []
    assert build_tokens([url], out).fingerprint == plain.fingerprint
    assert web.ranges[0] != "0-"


def test_a_bpe_is_trained_on_what_was_fetched_once(web, tmp_path):
    file = build_tokens([f"{web.url}/a.jsonl"], tmp_path / "t", "bpe:300")
    assert file.vocab_size == 300
    assert web.sent == len(web.files["a.jsonl"])


def test_bad_addresses(web, tmp_path):
    web.files |= {"b.jsonl": b'{"text": "a"}\n{"texd": "b"}\n', "b.parquet": b"PAR1" * 20}
    web.files["c.jsonl"] = b'{"text": 1}\n'
    for path, says in {
        "none.jsonl": "HTTP status 404",
        "a.zip": r"\.jsonl or \.parquet",
        "b.jsonl": "b.jsonl:2: field",
        "c.jsonl": "c.jsonl:1: text: got 1",
        "b.parquet": "Parquet can't read",
    }.items():
        for _ in range(2):  # the second call, which has a spool, says the same
            with pytest.raises(BadInput, match=says):
                build_tokens([f"{web.url}/{path}"], tmp_path / "t")


def test_a_file_that_changes_is_not_continued(web, tmp_path):
    web.fault = lambda number: "cut" if number == 0 else 503
    with pytest.raises(Failed):
        build_tokens([f"{web.url}/a.jsonl"], tmp_path / "t")
    web.fault = lambda number: None
    web.files["a.jsonl"] += b'{"text": "more"}\n'
    with pytest.raises(BadInput, match="a changed file"):
        build_tokens([f"{web.url}/a.jsonl"], tmp_path / "t")


def test_a_damaged_spool_is_reported(web, tmp_path):
    web.fault = lambda number: "cut" if number == 0 else 503
    with pytest.raises(Failed):
        build_tokens([f"{web.url}/a.jsonl"], tmp_path / "t")
    (part,) = (tmp_path / "t.spool").glob("*/000000.part")
    part.write_bytes(part.read_bytes()[:-1])
    with pytest.raises(BadInput, match="delete its folder"):
        build_tokens([f"{web.url}/a.jsonl"], tmp_path / "t")


class FakeRows:
    """Stand in for a stream of `datasets`: raise once in each 150 rows, and return its state."""

    calls = itertools.count(1)

    def __init__(self):
        self.place = 0

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.place = state["place"]

    def state_dict(self) -> dict[str, int]:
        return {"place": self.place}

    def __iter__(self):
        while self.place < len(TEXTS):
            if next(self.calls) % 150 == 0:
                raise ConnectionError("reset")
            self.place += 1
            yield {"text": TEXTS[self.place - 1]}


def test_the_hub_is_streamed_and_resumed_by_state(web, plain, tmp_path, monkeypatch):
    errors = types.SimpleNamespace(DatasetsError=type("DatasetsError", (Exception,), {}))
    module = types.SimpleNamespace(load_dataset=lambda *_, **__: FakeRows(), exceptions=errors)
    monkeypatch.setitem(sys.modules, "datasets", module)
    assert build_tokens(["hf:some/name"], tmp_path / "t").fingerprint == plain.fingerprint
    limited = Selection(limit=20_000)
    build_tokens(["hf:some/name"], tmp_path / "u", selection=limited)
    assert not limited.ended


def test_the_hub_with_the_real_library(plain, tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    rows = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS)
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.jsonl").write_text(rows)
    source = remote.Hub(str(tmp_path / "set"), "text")
    first = list(itertools.islice(source.after(None), 150))
    place = json.loads(json.dumps(source.cursor()))
    rest = list(remote.Hub(str(tmp_path / "set"), "text").after(place))
    assert [row.value for row in first + rest] == TEXTS
    file = build_tokens([f"hf:{tmp_path / 'set'}"], tmp_path / "t")
    assert file.fingerprint == plain.fingerprint


def test_limits_and_lengths(web, tmp_path):
    url, sizes = f"{web.url}/a.jsonl", [len(text.encode()) for text in TEXTS]
    chosen = Selection(limit=9000, min_length=100, max_length=300)
    found = [piece.data.decode() for piece in chosen.of(pieces([url]))]
    fitting = [text for text, size in zip(TEXTS, sizes, strict=True) if 100 <= size <= 300]
    assert found == fitting[: len(found)]
    assert sum(map(len, map(str.encode, found))) == chosen.bytes <= 9000
    assert chosen.bytes + len(fitting[len(found)].encode()) > 9000
    assert (chosen.documents, chosen.ended) == (len(found), False)
    whole = Selection(limit=10**9, min_length=100)
    build_tokens([url], tmp_path / "t", "bpe:280", selection=whole)
    assert whole.ended
    assert whole.documents == sum(size >= 100 for size in sizes) == 400 - whole.left_out
    meta = json.loads((tmp_path / "t" / "meta.json").read_text())
    assert meta["selection"] == {"limit": 10**9, "min_length": 100}


def test_a_document_in_blocks_is_longer_than_every_bound(tmp_path):
    (tmp_path / "long").write_text("word " * (1 << 18))
    (tmp_path / "short").write_text("word")
    sources = [str(tmp_path)]
    assert [p.data for p in Selection(max_length=1 << 20).of(pieces(sources))] == [b"word"]
    chosen = Selection(min_length=1 << 20)
    assert sum(len(p.data) for p in chosen.of(pieces(sources))) == 5 << 18
    assert (chosen.documents, chosen.left_out) == (1, 1)
    cut = Selection(limit=1 << 18)
    assert 3 << 16 <= sum(len(p.data) for p in cut.of(pieces(sources))) <= 1 << 18


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"limit": 0}, "at least 1 byte"),
        ({"min_length": 0}, "1 to 1,048,576"),
        ({"max_length": 1 << 21}, "1 to 1,048,576"),
        ({"min_length": 9, "max_length": 8}, "at most max_length"),
        ({"limit": 3}, "at least the 13 bytes of the first document"),
        ({"min_length": 99_999}, "0 bytes of text"),
    ],
)
def test_bad_selections(web, tmp_path, options, says):
    with pytest.raises(BadInput, match=says):
        build_tokens([f"{web.url}/a.jsonl"], tmp_path / "t", selection=Selection(**options))


def test_sizes():
    texts = {"2GB": 2 * 10**9, "1.5 GiB": 3 << 29, "500kB": 500_000, "17": 17, "17B": 17}
    assert {text: parse_size(text) for text in texts} == texts
    for bad in ("", "2 apples", "-1GB", "1e9", "GB", "2gb"):
        with pytest.raises(BadInput, match="a number of bytes, such as 2GB"):
            parse_size(bad)
