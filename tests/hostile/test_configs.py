"""Hostile configurations: YAML texts and files, and every key with invalid values."""

from __future__ import annotations

import itertools
import json
import os
import random
from pathlib import Path

import pytest

from mukv.core.errors import BadInput
from mukv.runs import config
from mukv.runs.describe import describe
from mukv.runs.resolve import resolve
from mukv.schema import schema
from mukv.schema.numbers import leaves
from mukv.schema.yaml_text import parse_yaml
from tests.hostile.harness import check_all
from tests.pairs import params

LAUGHS = "a: &a [1,1,1,1,1,1,1,1,1]\n" + "".join(
    f"{new}: &{new} [{','.join([f'*{old}'] * 9)}]\n"
    for old, new in itertools.pairwise("abcdefghij")
)
MERGES = LAUGHS.replace("[1,1,1,1,1,1,1,1,1]", "{x: 1}").replace("[*", "{<<: [*").replace("]", "]}")
TEXTS = {
    "aliases in lists": LAUGHS,
    "aliases in merges": MERGES.replace("{x: 1]}", "{x: 1}"),
    "itself in a list": "&a [*a]",
    "itself in a mapping": "a: &a {b: *a}",
    "itself in a merge": "&a\n<<: *a",
    "brackets": "[" * 10**5,
    "braces": "{a: " * 10**5,
    "dashes": "- " * 10**5,
    "many values": "a: [" + "1," * 60_000 + "]",
    "many stages": "model: {plan: [" + "{}," * 12_000 + "]}",
    "a huge text": "a: " + "x" * (2 << 20),
    "a huge key": "x" * 10**5 + ": 1",
    "digits": "train: {steps: " + "9" * 5000 + "}",
    "hexadecimal": "train: {steps: 0x" + "f" * 5000 + "}",
    "a double key": "train: {}\ntrain: {}",
    "tabs": "train:\n\tsteps: 1",
    "NUL": "a: \0",
    "NUL in a path": 'data: {path: "a\\0b"}',
    "NUL in a start": 'train: {start: "a\\0b"}',
    "half a surrogate": 'data: {path: "\\ud800"}',
    "documents": "a: 1\n---\nb: 2",
    "version": "%YAML 9.9\n---\na: 1",
    "list": "[]",
    "nothing": "",
    "a word": "tiny",
    **{
        f"tag {tag} {text}": f"train: {{steps: !!{tag} {text}}}"
        for tag in ("bool", "int", "float", "binary", "timestamp", "set", "omap", "pairs", "null")
        for text in ('"x"', "[]", "{}", "2020-01-01")
    },
    **{f"tag {tag}": f"a: {tag} x" for tag in ("!!python/object:os.system", "!x")},
    **{f"key {key}": f"{key}: 1" for key in ("1", "1.5", "true", "null", "? [1]\n", "? {a: 1}\n")},
    **{f"extends {json.dumps(each)}": f"extends: {json.dumps(each)}" for each in (
        *(1, None, [], {}, "", ".", "/", "/dev/zero", "a/../..", "~no/x.yaml", "x" * 5000 + "/y"),
        *("self.yaml", "circle.yaml", "pipe.yaml", "folder.yaml", "no.yaml", "\0/x"),
    )},
}  # fmt: skip


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.yaml").mkdir()
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "zero.yaml").symlink_to("/dev/zero")
    (tmp_path / "self.yaml").write_text("extends: self.yaml")
    (tmp_path / "circle.yaml").write_text("extends: ./back.yaml")
    (tmp_path / "back.yaml").write_text("extends: ./circle.yaml")
    (tmp_path / "utf16.yaml").write_bytes("extends: tiny".encode("utf-16"))
    (tmp_path / "latin.yaml").write_bytes(b"extends: tin\xff")
    (tmp_path / "nowhere.yaml").symlink_to("nowhere")
    (tmp_path / "loop.yaml").symlink_to("loop.yaml")
    (tmp_path / "large.yaml").write_bytes(b"#" * (9 << 20))
    return tmp_path


def test_files(folder, record_property):
    bad = {
        *("folder", "pipe", "zero", "self", "circle", "utf16", "latin", "nowhere", "loop", "large"),
    }
    counts = check_all(
        "config files",
        [(name, lambda name=name: resolve(f"./{name}.yaml", [], None)) for name in sorted(bad)],
        record_property,
    )
    assert counts == {"refused": len(bad)}
    (folder / "bom.yaml").write_bytes(b"\xef\xbb\xbfextends: tiny")
    assert resolve("bom.yaml", [], None)[0] == config.load("tiny")


@pytest.mark.product
def test_texts(folder, record_property):
    """A hostile text is accepted or refused, given as a file and as an override."""

    def as_file(text: str) -> None:
        Path("x.yaml").write_bytes(text.encode(errors="surrogatepass"))
        resolve("x.yaml", [], None)

    def as_override(text: str) -> None:
        resolve("tiny", [f"train.steps={text}"], None)

    calls = [
        (f"{kind}: {name}", lambda text=text, do=do: do(text))
        for name, text in TEXTS.items()
        for kind, do in (("file", as_file), ("override", as_override))
    ]
    counts = check_all("config texts", calls, record_property)
    assert counts["refused"] > len(TEXTS)


def test_noise(record_property):
    """Random strings of YAML's special characters are accepted or refused."""
    random.seed(0)
    signs = [
        *"[]{}:,&*!|>%@`#-?\"' \n\t0aé\0",
        "<<",
        "...",
        "---",
        "!!int ",
        "&a ",
        "*a",
        "1e9",
        ": ",
    ]

    def parse(text: str) -> None:
        parse_yaml(text, "x")

    texts = ["".join(random.choices(signs, k=random.randint(1, 30))) for _ in range(300)]
    calls = [(repr(text), lambda text=text: parse(text)) for text in texts]
    check_all("config noise", calls, record_property)


VALUES = [
    "-1",
    "0",
    "2147483648",
    str(1 << 53),
    "1e308",
    "-1e400",
    ".nan",
    "'x'",
    "true",
    "[]",
    "{}",
]


@pytest.mark.product
@pytest.mark.parametrize("preset", params(["tiny", "tiny-concept-learned"], ["tiny"]))
def test_every_key(preset, record_property):
    """Each value of a whole configuration is accepted or refused when replaced by a non-number or
    an absurd number."""
    random.seed(0)
    paths = list(leaves(schema.to_mapping(config.load(preset))))

    def read(path: str, value: str) -> None:
        describe(config.load(preset, [f"{path}={value}"]))

    calls = [
        (f"{path}={value}", lambda path=path, value=value: read(path, value))
        for path in paths
        for value in random.sample(VALUES, 4)
    ]
    counts = check_all(f"keys of {preset}", calls, record_property)
    assert counts["refused"] > 2 * len(paths)


@pytest.mark.product
@pytest.mark.parametrize(
    ("override", "message"),
    [
        (f"train.steps={1 << 53}", r"train.steps: got 9007199254740992; at most 2,147,483,647"),
        (f"train.batch={1 << 31}", "at most 2,147,483,647"),
        (f"train.seed={1 << 64}", "train.seed"),
        ("train.seed=-1", "0 to 4294967295"),
        ("train.learning_rate=1e300", "up to 3.4e38"),
        (f"model.plan=[{{repeats: {10**9}}}]", "at most 10,000"),
        ("model.plan=[{repeats: 9999}, {repeats: 9999}]", "19,998 layers'; at most 10,000"),
        ('model.plan=!!bool "x"', "can't be read as !!bool"),
        (f"data.path={'y' * 1_000_000}", None),
        (f"train.steps={'y' * 1_000_000}", r"got 'y+\.\.\."),
    ],
)
def test_values(override, message):
    if message is None:
        config.load("tiny", [override])
        return
    with pytest.raises(BadInput, match=message) as told:
        config.load("tiny", [override])
    assert len(str(told.value)) < 1000
