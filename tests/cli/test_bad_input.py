"""Bad arguments and bad files give one error line and the right exit status, and leave no files."""

from __future__ import annotations

import errno
import json
import os
import shutil
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mukv.core.errors import BadInput
from mukv.data.tokens import fingerprint
from mukv.runs import inputs, loaded
from mukv.storage.weights import load_weights, save_weights
from tests.conftest import MINUSCULE

pytestmark = pytest.mark.xdist_group("trained")


def listing(folder: Path) -> dict[str, int]:
    return {
        str(path.relative_to(folder)): path.stat().st_size
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture
def place(tmp_path, token_file, trained, monkeypatch):
    """Return a folder with valid and invalid files, in which the command is run."""
    shutil.copytree(token_file, tmp_path / "tokens")
    shutil.copytree(trained, tmp_path / "run")
    for name in ("truncated", "foreign", "no-ids"):
        shutil.copytree(token_file, tmp_path / name)
    with (tmp_path / "truncated" / "train.bin").open("r+b") as file:
        file.truncate(9)
    (tmp_path / "foreign" / "meta.json").write_text('{"format": "other"}')
    ids = tmp_path / "no-ids" / "train.bin"
    ids.write_bytes(np.full(ids.stat().st_size // 2, 300, "<u2").tobytes())
    meta = json.loads((tmp_path / "no-ids" / "meta.json").read_text())
    meta["fingerprint"] = fingerprint(tmp_path / "no-ids")
    (tmp_path / "no-ids" / "meta.json").write_text(json.dumps(meta))
    (tmp_path / "latin.txt").write_bytes("déjà".encode("latin-1"))
    (tmp_path / "empty.txt").touch()
    (tmp_path / "a.txt").write_text("some text")
    (tmp_path / "one.txt").write_text("a")
    (tmp_path / "long.txt").write_text("Some more text. " * 9)
    np.save(tmp_path / "floats.npy", np.ones(3))
    np.save(tmp_path / "large.npy", np.array([1, 264]))
    np.save(tmp_path / "negative.npy", np.array([[1, -1]]))
    np.save(tmp_path / "none.npy", np.zeros((0, 3), int))
    np.save(tmp_path / "single.npy", np.array([1]))
    np.save(tmp_path / "cube.npy", np.ones((2, 2, 2), int))
    np.savez(tmp_path / "many.npz", a=np.arange(3))
    (tmp_path / "object.npy").write_bytes(b"\x93NUMPY\x01\x00")
    (tmp_path / "list.yaml").write_text("- 1")
    (tmp_path / "broken.yaml").write_text("a: [")
    (tmp_path / "good.yaml").write_text("extends: tiny")
    (tmp_path / "empty folder").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(mukv, place, args, message, status=2):
    before = listing(place)
    done = mukv(*args)
    assert done.returncode == status, done.stderr
    lines = done.stderr.splitlines()
    assert [line for line in lines if line.startswith("error: ")] == lines[-1:], done.stderr
    assert "Traceback" not in done.stderr
    missing = [part for part in message if part not in lines[-1]]
    assert missing == [], lines[-1]
    assert listing(place) == before


def label(args) -> str:
    return " ".join(word for word in args if word not in MINUSCULE)[:80]


TRAIN = ("train", "tiny", *MINUSCULE, "--out", "new", "data.path=tokens")
EVAL = ("eval", "run")
GENERATE = ("generate", "run", "--prompt", "a")
COMPRESS = ("compress", "run", "--text", "long.txt")
IDS = ("generate", "run", "--token-ids")
BAD = [
    # Prompts from files.
    (("generate", "run", "--prompt-file", "no.txt"), ["--prompt-file", "no.txt", "readable"]),
    (("generate", "run", "--prompt-file", "latin.txt"), ["--prompt-file", "latin.txt", "UTF-8"]),
    (
        ("generate", "run", "--prompt-file", "-", "--prompt-file", "-"),
        ["--prompt-file", "standard input once"],
    ),
    (("generate", "run", "--special", "--token-ids", "1"), ["--special", "--prompt"]),
    (("generate", "run", "--prompt-file", "a.txt", "--token-ids", "1"), ["exactly one"]),
    # Chat.
    (("chat", "run"), ["run", "chat template"]),
    (("chat", "nowhere"), ["MODEL", "nowhere"]),
    (("chat", "run", "--policy", "snapkw"), ["--policy", "snapkw", "did you mean 'snapkv'"]),
    (("chat", "run", "--stop", ""), ["--stop", "at least one character"]),
    (("chat", "run", "--length", "1"), ["--length", "at least 2"]),
    # The command itself.
    (("trian",), ["trian", "train"]),
    (("eval", "empty folder", "--text", "a.txt"), ["MODEL", "empty folder", "config.yaml"]),
    (("train",), ["CONFIG"]),
    (("train", "tiny", "--owt", "x"), ["--owt", "--out"]),
    (("generate", "run", "--max-tokens", "many"), ["--max-tokens", "integer"]),
    # Configuration.
    (("train", "tyny"), ["CONFIG", "tyny", "did you mean 'tiny'"]),
    (("train", "no.yaml"), ["no.yaml", "no such file"]),
    (("train", "list.yaml"), ["list.yaml", "list", "mapping"]),
    (("train", "broken.yaml"), ["broken.yaml", "line 1, column 5"]),
    (("train", "latin.txt"), ["latin.txt", "YAML", "tiny"]),
    (("describe", "tiny", "train.stepz=3"), ["train.stepz", "did you mean 'steps'"]),
    (("describe", "tiny", "trian.steps=3"), ["trian", "did you mean 'train'"]),
    (("describe", "tiny", "train.steps"), ["train.steps", "key=value"]),
    (("describe", "tiny", "data.path=#x"), ["data.path", "#x", "quotes"]),
    (("describe", "tiny", "data.path=a #b"), ["data.path", "a #b", "quotes"]),
    (("eval", "n" * 256, "--text", "a.txt"), ["nnn", "name too long"]),
    (("describe", "tiny", "train.steps=many"), ["train.steps", "'many'", "a whole number"]),
    (("describe", "tiny", "train.steps=3.5"), ["train.steps", "3.5", "a whole number"]),
    (("describe", "tiny", f"model.attention.head_dim={10**30}"), ["head_dim", "up to 2**53"]),
    (("describe", "tiny", "train.steps=0"), ["train.steps", "0", "at least 1"]),
    (("describe", "tiny", "train.learning_rate=.nan"), ["train.learning_rate", "nan", "finite"]),
    (("describe", "tiny", "model.d_model=0"), ["model.d_model", "0", "at least 1"]),
    (("describe", "tiny", "model.attention.head_dim=7"), ["head_dim", "7", "even"]),
    (
        ("describe", "tiny", "model.attention.kv_heads=3"),
        ["model.attention.kv_heads", "3", "must divide heads (4)", "1, 2, 4", "did you mean"],
    ),
    (("describe", "tiny", "model.attention.kind=groupd"), ["kind", "groupd", "grouped"]),
    (("describe", "tiny", "model.plan=[{pattern: [{reads: 3}]}]"), ["plan", "reads 3", "layer 0"]),
    (("describe", "tiny", "model.plan=[]"), ["model.plan", "at least one stage"]),
    (("describe", "tiny-concept", "model.encoder=[{}]"), ["encoder", "needs a window", "4 tokens"]),
    (
        ("describe", "tiny-concept", "model.chunker={kind: fixed, size: 64}"),
        ["encoder", "window 32", "at least a chunk (64 tokens)"],
    ),
    (("describe", "tiny-concept-learned", "model.chunker.ratio=2"), ["ratio", "2", "room (4)"]),
    (("describe", "tiny-concept", "model.chunker.span=7"), ["pool", "7 tokens", "divides d_model"]),
    (("describe", "tiny-concept", "model.chunker.delimiters=[300]"), ["delimiters", "300", "263"]),
    (
        ("train", "tiny-concept", "data.path=tokens", "model.chunker.delimiters=[260]"),
        ["delimiters", "260", "256"],
    ),
    (("describe", "tiny", "model.context=8"), ["train.length", "128", "model.context (8)"]),
    (("describe", "tiny", "train.compute.dtype=float16"), ["dtype", "float16", "bfloat16"]),
    # Training.
    ((*TRAIN, "model.vocab_size=100"), ["model.vocab_size", "100", "at least the 257", "tokens"]),
    ((*TRAIN, "data.path=tokenz"), ["data.path", "tokenz", "did you mean 'tokens'"]),
    ((*TRAIN, "data.path=a.txt"), ["data.path", "a.txt", "mukv data"]),
    ((*TRAIN, "data.path=truncated"), ["truncated/train.bin", "9 bytes"]),
    ((*TRAIN, "data.path=foreign"), ["foreign/meta.json", "format"]),
    ((*TRAIN, "mesh.data=64"), ["mesh", "64", "8 cpu devices"]),
    ((*TRAIN, "mesh.data=4"), ["train.batch", "multiple of mesh.data (4)"]),
    ((*TRAIN, "mesh.context=3"), ["train.length", "multiple of mesh.context (3)"]),
    ((*TRAIN, "train.trackers=[wandbb]"), ["train.trackers", "wandbb", "did you mean 'wandb'"]),
    ((*TRAIN, "train.trackers=[wandb]"), ["train.trackers", "wandb", "pip install"]),
    ((*TRAIN, "--out", "a.txt"), ["a.txt", "run directory or a new path"]),
    ((*TRAIN, "--out", "a.txt/inside"), ["a.txt/inside", "in the way"]),
    ((*TRAIN, "--out", "tokens"), ["tokens", "a path in use"]),
    ((*TRAIN, "--out", "/proc/new"), ["/proc/new", "can't be written"]),
    (  # Before data are read.
        (*TRAIN, "data.path=tokenz", "train.start=run", "model.d_model=64"),
        ["run: embedding", "(264, 32)", "differ in model.d_model (32 there, 64 here)"],
    ),
    ((*TRAIN, "data.path=tokenz", "train.adapter.rank=2"), ["train.start", "None"]),
    (("train", "run", "model.d_model=64"), ["model.d_model: got 64", "run has 32", "--out"]),
    (("train", "run", "model.plan=[{}]"), ["model.plan.0.repeats: got 1", "run has 2"]),
    (("train", "run", "train.seed=9"), ["train.seed", "9", "has 0", "--out"]),
    # Texts.
    (("data", "latin.txt", "--out", "new"), ["latin.txt", "UTF-8"]),
    (("data", "empty.txt", "--out", "new"), ["SOURCE", "text"]),
    (("data", "empty folder", "--out", "new"), ["SOURCE", "text"]),
    (("data", "b.txt", "--out", "new"), ["b.txt", "did you mean 'a.txt'"]),
    (("data", "one.txt", "--out", "new"), ["SOURCE", "two tokens"]),
    (("data", "a.txt", "--out", "tokens"), ["tokens", "overwrite"]),
    (("data", "a.txt", "--out", "run"), ["run", "a folder in use"]),
    (("data", "a.txt", "--out", "latin.txt"), ["latin.txt", "in the way"]),
    (("data", "a.txt", "--out", "latin.txt/new"), ["latin.txt", "in the way"]),
    (("data", "a.txt", "--out", "/proc/new"), ["/proc/new", "can't be written"]),
    (("data", "a.txt", "--out", "new", "--tokenizer", "bites"), ["bites", "did you mean 'bytes'"]),
    (("data", "a.txt", "--out", "new", "--tokenizer", "bpe:9"), ["9", "at least 257"]),
    (("data", "a.txt", "--out", "new", "--validation", "2"), ["validation", "2", "0 and 1"]),
    (("data", "a.txt", "--out", "new", "--invalid", "skp"), ["skp", "did you mean 'skip'"]),
    (("data", "a.txt", "--out", "new", "--workers", "0"), ["workers", "at least 1"]),
    # Evaluation.
    (("eval", "rum", "--text", "a.txt"), ["rum", "did you mean 'run'"]),
    (EVAL, ["neither", "--text, --tokens", "exactly one"]),
    ((*EVAL, "--text", "a.txt", "--tokens", "large.npy"), ["--text and --tokens", "exactly one"]),
    ((*EVAL, "--text", "b.txt"), ["--text", "b.txt", "No such file"]),
    ((*EVAL, "--text", "run"), ["--text", "run", "directory"]),
    ((*EVAL, "--text", "latin.txt"), ["--text", "latin.txt", "UTF-8", "byte 1"]),
    ((*EVAL, "--text", "empty.txt"), ["--text", "empty.txt", "not empty"]),
    ((*EVAL, "--text", "a.txt", "--length", "0"), ["--length", "0", "at least 1"]),
    ((*EVAL, "--tokens", "b.npy"), ["--tokens", "b.npy", "No such file"]),
    ((*EVAL, "--tokens", "a.txt"), ["--tokens", "a.txt", "numpy.save"]),
    ((*EVAL, "--tokens", "empty.txt"), ["--tokens", "empty.txt", "numpy.save"]),
    ((*EVAL, "--tokens", "object.npy"), ["--tokens", "object.npy", "numpy.save"]),
    ((*EVAL, "--tokens", "many.npz"), ["--tokens", "many.npz", "one array"]),
    ((*EVAL, "--tokens", "floats.npy"), ["--tokens", "float64", "whole numbers"]),
    ((*EVAL, "--tokens", "cube.npy"), ["--tokens", "(2, 2, 2)", "[row token]"]),
    ((*EVAL, "--tokens", "none.npy"), ["--tokens", "(0, 3)", "[row token]"]),
    ((*EVAL, "--tokens", "single.npy"), ["tokens", "at least 2"]),
    ((*EVAL, "--tokens", "large.npy"), ["tokens", "264", "0 to 263"]),
    ((*EVAL, "--tokens", "negative.npy"), ["tokens", "-1", "0 to 263"]),
    # Generation.
    (("generate", "run"), ["neither", "--prompt, --token-ids", "exactly one"]),
    (("generate", "tokens", "--prompt", "a"), ["tokens", "a run directory"]),
    ((*IDS, "1,x"), ["--token-ids", "1,x", "1,2,3"]),
    ((*IDS, ""), ["--token-ids", "at least one token"]),
    ((*IDS, "1,,2"), ["--token-ids", "1,,2", "1,2,3"]),
    ((*IDS, "1,264"), ["--token-ids", "264", "0 to 263"]),
    ((*IDS, "-1"), ["--token-ids", "-1", "0 to 263"]),
    ((*IDS, "1" + "0" * 400), ["--token-ids", "0 to 263"]),
    ((*GENERATE, "--stop", "x"), ["--stop", "x", "1,2,3"]),
    ((*GENERATE, "--max-tokens", str(10**30)), ["--max-tokens", "at most", "32 bits"]),
    ((*GENERATE, "--max-tokens", "0"), ["--max-tokens", "0", "at least 1"]),
    ((*GENERATE, "--top-p", "1.5"), ["--top-p", "1.5", "above 0 and at most 1"]),
    ((*GENERATE, "--top-p", "nan"), ["--top-p", "nan"]),
    ((*GENERATE, "--top-k", "0"), ["--top-k", "0", "at least 1"]),
    ((*GENERATE, "--temperature", "-1"), ["temperature", "-1", "at least 0"]),
    ((*GENERATE, "--temperature", "nan"), ["temperature", "nan", "at least 0"]),
    ((*GENERATE, "--seed", "-1"), ["seed", "-1", "0 to"]),
    ((*GENERATE, "--seed", str(2**64)), ["seed", str(2**64), "0 to"]),
    ((*GENERATE, "--copies", "0"), ["--copies", "0", "at least 1"]),
    ((*GENERATE, "--cache", "ful"), ["--cache", "ful", "did you mean 'full'"]),
    ((*GENERATE, "--cache", "dms"), ["--cache", "dms", "learned gates", "layer 0"]),
    ((*GENERATE, "--cache", "snapkv+h2o"), ["--cache", "one part that says what to keep"]),
    ((*GENERATE, "--cache", "streaming", "--budget", "3"), ["budget", "3", "at least 5 entries"]),
    ((*COMPRESS, "--policy", "int8,dms"), ["--policy", "dms", "learned gates"]),
    (("bench", "run", "--policy", "dms"), ["--policy", "dms", "learned gates"]),
    (("policies", "dns"), ["NAME", "dns", "did you mean 'dms'"]),
    (("presets", "tinny"), ["NAME", "tinny", "did you mean 'tiny'"]),
    (("docs", "dms"), ["KEY", "dms", "see `mukv policies dms`"]),
    (("docs", "tiny-mla"), ["KEY", "tiny-mla", "see `mukv describe tiny-mla`"]),
    (
        ("describe", "tiny", "train.stages=[{begin:50}]"),
        ["train.stages", "a space after", "begin: 50"],
    ),
    (
        ("describe", "tiny-mla", "model.attention.eviction={window: 4}"),
        ["model.attention.eviction", "of this kind, but of grouped", "allowed: "],
    ),
    (
        ("describe", "tiny", "mesh.context=4", "train.length=66", "--device", "h100"),
        ["train.length", "66", "mesh.context (4)", "64 or 68"],
    ),
    (COMPRESS[:2], ["neither", "--text, --tokens", "exactly one"]),
    ((*COMPRESS, "--policy", "snapvk"), ["--policy", "snapvk", "did you mean 'snapkv'"]),
    ((*COMPRESS, "--policy", "snapkv", "--budget", "x"), ["--budget", "x", "numbers"]),
    ((*COMPRESS, "--policy", "snapkv", "--budget", "0"), ["budget", "0.0", "a share above 0"]),
    ((*COMPRESS, "--policy", "sparq", "--budget", "0.1"), ["budget", "sparq must hold at least"]),
    ((*COMPRESS, "--samples", "0"), ["samples", "0", "at least 1"]),
    ((*COMPRESS, "--strings", "-1"), ["strings", "-1", "at least 0"]),
    ((*COMPRESS, "--strings", "0", "--aware"), ["--aware", "--strings 0", "at least one"]),
    ((*COMPRESS, "--policy", "snapkv", "--bytes", "x"), ["--bytes", "x", "numbers"]),
    ((*COMPRESS, "--policy", "snapkv", "--bytes", "0.001"), ["--bytes", "0.001", "snapkv"]),
    ((*COMPRESS, "--compute", "float16"), ["--compute", "float16", "bfloat16, float32"]),
    (("eval", "run", "--text", "a.txt", "--compute", "bf16"), ["--compute", "bf16", "bfloat16"]),
    ((*COMPRESS[:2], "--text", "a.txt"), ["text", "10 tokens", "at least 32"]),
]


@pytest.mark.parametrize(("args", "message"), BAD, ids=[label(args) for args, _ in BAD])
def test_bad_input(mukv, place, args, message):
    refused(mukv, place, args, message)


def test_without_a_command_the_help_is_shown(mukv):
    done = mukv()
    assert done.returncode == 2
    assert "describe" in done.stdout + done.stderr
    assert "error" not in done.stdout + done.stderr


@pytest.mark.product
@pytest.mark.parametrize("name", ["provenance.json", "tokenizer.json"])
def test_a_folder_in_the_way(mukv, place, name):
    (place / "run" / name).unlink()
    (place / "run" / name).mkdir()
    refused(mukv, place, ("train", "run"), [f"run/{name}", "in the way"])


def test_out_of_memory(mukv, place, monkeypatch):
    def generate(*_: object) -> None:
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\n at ...")

    monkeypatch.setattr(loaded, "generate", generate)
    refused(mukv, place, GENERATE, ["not enough memory", "allocating 9 bytes"], status=1)


@pytest.mark.product
def test_ids_that_are_no_tokens(mukv, place):
    done = mukv(*TRAIN, "data.path=no-ids")
    assert done.returncode == 2
    assert "id 300" in done.stderr.splitlines()[-1]


WEIGHTS, CONFIG = "weights/weights.safetensors", "config.yaml"
DAMAGE = [
    (CONFIG, b"model: [", ["config.yaml", "YAML"]),
    (CONFIG, b"modle: {}", ["modle", "did you mean 'model'"]),
    ("tokenizer.json", None, ["tokenizer"]),
    ("tokenizer.json", b"{}", ["tokenizer"]),
    (WEIGHTS, b"garbage", [WEIGHTS, "cut short"]),
    (WEIGHTS, None, ["weights"]),
]


@pytest.mark.parametrize(("name", "content", "message"), DAMAGE)
def test_a_damaged_run(mukv, place, name, content, message):
    shutil.rmtree(place / "run" / "checkpoints")
    (place / "run" / name).unlink()
    if content is not None:
        (place / "run" / name).write_bytes(content)
    refused(mukv, place, GENERATE, message)


def test_weights_of_another_model(mukv, place):
    shutil.rmtree(place / "run" / "checkpoints")
    path = place / "run" / "config.yaml"
    path.write_text(path.read_text().replace("d_model: 32", "d_model: 16"))
    refused(mukv, place, GENERATE, ["run/weights: embedding", "(264, 32)", "(264, 16)"])


def test_initial_weights_that_are_not_finite_leave_no_folder(mukv, place):
    weights, metadata = load_weights(place / "run" / "weights")
    weights["embedding"] = np.full_like(weights["embedding"], np.nan)
    save_weights(place / "run" / "weights", weights, metadata)
    refused(mukv, place, (*TRAIN, "train.start=run"), ["run: embedding", "finite"])


@pytest.mark.parametrize("args", [(*GENERATE,), ("train", "run")])
@pytest.mark.parametrize("how", ["truncated", "foreign", "other model"])
def test_a_bad_checkpoint(mukv, place, how, args):
    shutil.rmtree(place / "run" / "weights")
    step = place / "run" / "checkpoints" / "3"
    if how == "truncated":
        data = max((path for path in step.rglob("*") if path.is_file()), key=os.path.getsize)
        os.truncate(data, 100)
        refused(mukv, place, args, ["checkpoints/3"], status=1)
    elif how == "foreign":
        shutil.rmtree(step)
        step.mkdir()
        (step / "photograph").touch()
        refused(mukv, place, args, ["checkpoints/3", "no checkpoint of mukv"])
    else:
        path = place / "run" / "config.yaml"
        path.write_text(path.read_text().replace("d_model: 32", "d_model: 16"))
        refused(mukv, place, args, ["checkpoints/3", "float32[264, 32]", "float32[264, 16]"])


@pytest.mark.parametrize("args", [("data", "a.txt", "--out", "new"), TRAIN], ids=["data", "train"])
def test_a_full_disk(mukv, place, monkeypatch, args):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    refused(mukv, place, args, ["new", "the disk is full"], status=1)


@given(
    st.binary()
    | st.binary().map(b"\x93NUMPY\x01\x00".__add__)
    | st.binary().map(b"PK\x03\x04".__add__)
    | st.text("{}()',:<iu8descrfortran_orderTrueFalseshape 0123456789").map(
        lambda text: b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()
    )
)
@example(b"\x93NUMPY\x01\x00\x50\x00{'descr': '<i8', 'fortran_order': False, 'shape': (9**9,9**9)}")
def test_random_bytes_as_ids_are_at_worst_bad_input(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "random.npy"
    path.write_bytes(content)
    with suppress(BadInput):
        inputs.rows_of_ids(path)


def test_a_shape_beyond_all_memory(mukv, place):
    header = "{'descr': '<i8', 'fortran_order': False, 'shape': (9999999999999,)}\n".ljust(118)
    (place / "huge.npy").write_bytes(b"\x93NUMPY\x01\x00\x76\x00" + header.encode() + b"12345678")
    refused(mukv, place, (*EVAL, "--tokens", "huge.npy"), ["--tokens", "huge.npy", "numpy.save"])
