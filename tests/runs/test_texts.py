"""A model reads text with its own tokenizer; ids of another tokenizer are refused."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import pytest

import mukv as package
from mukv.core.errors import BadInput
from mukv.data.build import build_tokens
from mukv.data.sources import SOURCES
from mukv.data.tokenizer import load_tokenizer
from mukv.data.tokens import open_tokens
from mukv.runs import config
from mukv.runs.resolve import named_tokenizer, open_corpus, open_feed, resolve
from mukv.runs.train import train_run
from tests.conftest import MINUSCULE
from tests.pairs import params

pytestmark = pytest.mark.xdist_group("texts")
TEXT = "The hat of the cat is on the mat. "
STEP = ("train.steps=1", "train.batch=2", "train.length=16")


def bpe(folder: Path, words: str) -> Path:
    """Make a token file of a BPE of 268 ids, trained on these words."""
    (folder / "words.txt").write_text(words * 40)
    return build_tokens([str(folder / "words.txt")], folder / "tokens", "bpe:268").path


@pytest.fixture(scope="module")
def tokens(tmp_path_factory) -> Path:
    return bpe(tmp_path_factory.mktemp("own"), TEXT)


@pytest.fixture(scope="module")
def another(tmp_path_factory) -> Path:
    """Return a token file with as many ids, which stand for other tokens."""
    return bpe(tmp_path_factory.mktemp("another"), "Nobody knows whose dog barks below. ")


@pytest.fixture(scope="module")
def imported(mukv, tokens, tmp_path_factory) -> Path:
    """Return the run directory of an imported model."""
    folder = tmp_path_factory.mktemp("model")
    given = ("train", "tiny", *MINUSCULE, *STEP, f"data.path={tokens}", "--out", folder / "run")
    for args in (
        given,
        ("export", folder / "run", "--out", folder / "published"),
        ("import", folder / "published", "--out", folder / "imported"),
    ):
        done = mukv(*args)
        assert done.returncode == 0, done.stderr
    return folder / "imported"


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    """Use a separate cache folder, and a default text of a few lines."""
    monkeypatch.setenv("MUKV_CACHE", str(tmp_path / "cache"))

    def few(name: str, field: str):
        for number in range(30):
            yield f"{number}.py", io.BytesIO(f"the_hat = {number}  # the mat\n".encode() * 9)

    monkeypatch.setitem(SOURCES, "stdlib", few)


@pytest.fixture
def text(tmp_path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("The cat is the hat of the mat. " * 30)
    return path


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.mark.product
def test_a_text_is_trained_on_with_the_tokenizer_of_the_start(mukv, imported, text, tmp_path):
    before, out = contents(imported), tmp_path / "tuned"
    done = mukv("train", imported, *STEP, f"data.path={text}", "--out", out, "--json")
    assert done.returncode == 0, done.stderr
    assert contents(imported) == before
    assert (out / "tokenizer.json").read_bytes() == before["tokenizer.json"]
    made = RunOf(out)
    ids = [*made.corpus.train.tokens, *made.corpus.validation.tokens[1:]]
    assert made.model.tokenizer.decode(ids) == text.read_text()
    # The name of the token file follows from the text: another text is another file.
    first = made.corpus.path
    run, _ = resolve(str(imported), [f"data.path={text}"], None)
    assert open_corpus(run).path == first
    text.write_text("Another mat. " * 30)
    changed = open_corpus(run)
    assert changed.path.parent == first.parent
    assert changed.path != first


class RunOf:
    """Stand in for a trained model with its run and data."""

    def __init__(self, folder: Path):
        self.model = package.load(folder)
        self.corpus = open_tokens(Path(self.model.run.data.path))


@pytest.mark.product
def test_an_imported_model_is_begun_from_and_left_as_it_is(imported):
    run, folder = resolve(str(imported), ["train.steps=1"], None)
    assert run.train.start == str(imported.resolve())
    assert folder.path.parent == Path("runs")
    with pytest.raises(BadInput, match=r"an imported or converted model.*--out"):
        train_run(run, type(folder)(imported))


@pytest.mark.product
def test_without_a_text_the_default_one_is_read_with_its_own_tokenizer(mukv, imported, tmp_path):
    run, feed = open_feed(resolve(str(imported), [], None)[0])
    own = load_tokenizer(imported)
    assert feed.tokenizer.content == own.content
    corpus = open_tokens(Path(run.data.path))
    assert corpus.sources == ("stdlib",)
    assert own.decode(corpus.train.tokens[:40]).startswith("the_hat = ")
    done = mukv("analyze", imported, "--length", 16, "--samples", 2, "--out", tmp_path / "a")
    assert done.returncode == 0, done.stderr
    assert "held-out text of stdlib" in done.stderr
    # It also differs from the file of bytes, for models without a tokenizer.
    assert open_corpus(config.load("tiny", [])).path != corpus.path


@pytest.mark.parametrize("command", params(["train", "analyze", "sweep"], ["train"]))
def test_ids_of_another_tokenizer_are_refused(mukv, imported, another, tmp_path, command):
    """Token files of another vocabulary are refused, although its size is the same."""
    assert open_tokens(another).vocab_size == load_tokenizer(imported).vocab_size
    started = (*MINUSCULE, *STEP, f"train.start={imported}", f"data.path={another}")
    if command == "analyze":
        model = Path(shutil.copytree(imported, tmp_path / "model"))
        text = (model / "config.yaml").read_text().replace("path: null", f"path: {another}")
        assert str(another) in text
        (model / "config.yaml").write_text(text)
        done = mukv("analyze", model, "--length", 16, "--out", tmp_path / "a")
    elif command == "sweep":
        searched = ("tiny", "train.learning_rate=1e-4,1e-2", *started)
        done = mukv("sweep", *searched, "--out", tmp_path / "sweep")
    else:
        done = mukv("train", "tiny", *started, "--out", tmp_path / "tuned")
    assert done.returncode == 2, done.stderr
    last = done.stderr.splitlines()[-1]
    stamps = (each.fingerprint[:12] for each in map(load_tokenizer, (another, imported)))
    for part in ("data.path", str(another), "the model's own tokenizer", *stamps):
        assert part in last, done.stderr
    assert not (tmp_path / "tuned").exists()


def test_a_task_is_not_trained_on_by_a_model_of_text(imported):
    given = [f"train.start={imported}", "data.task={kind: needle}", "train.length=64"]
    run = config.load("tiny", [*given, "model.vocab_size=272"])
    with pytest.raises(BadInput, match=r"data\.task.*own tokenizer"):
        open_feed(run)


@pytest.mark.product
def test_one_task_may_follow_another(mukv, tmp_path):
    """A model of one task may train on another, whose words are arbitrary ids."""
    given = ("tiny", *MINUSCULE, *STEP, "train.length=64", "data.task={kind: mqar}")
    done = mukv("train", *given, "model.vocab_size=152", "--out", tmp_path / "first")
    assert done.returncode == 0, done.stderr
    started = (f"train.start={tmp_path / 'first'}", "model.vocab_size=152", "train.length=64")
    _, feed = open_feed(config.load("tiny", [*started, "data.task={kind: needle}"]))
    assert feed.tokenizer.fingerprint != load_tokenizer(tmp_path / "first").fingerprint


@pytest.mark.product
def test_models_without_a_tokenizer_refuse_text(imported, tokens, text, tmp_path):
    bare = Path(shutil.copytree(imported, tmp_path / "bare"))
    (bare / "tokenizer.json").unlink()
    run, _ = resolve(str(bare), [], None)
    with pytest.raises(BadInput, match="no tokenizer to read text"):
        open_corpus(run)
    run, _ = resolve(str(bare), [f"data.path={tokens}"], None)
    assert open_corpus(run).path == tokens
    with pytest.raises(BadInput, match=r"mukv data .* --out FOLDER"):
        open_corpus(config.load("tiny", [f"data.path={text}"]))


def test_mukv_data_takes_the_tokenizer_of_a_model(mukv, imported, text, tmp_path):
    done = mukv("data", text, "--tokenizer", imported, "--out", tmp_path / "data", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["vocab_size"] == load_tokenizer(imported).vocab_size
    assert open_tokens(tmp_path / "data").tokenizer.content == load_tokenizer(imported).content
    assert named_tokenizer("bpe:300") == "bpe:300"
    assert named_tokenizer(str(imported)) == str(imported)


@pytest.mark.product
def test_a_run_continues_without_the_model_it_started_from(mukv, imported, text, tmp_path):
    start = Path(shutil.copytree(imported, tmp_path / "start"))
    given = (f"data.path={text}", "--out", tmp_path / "tuned")
    assert mukv("train", start, *STEP, *given).returncode == 0
    shutil.rmtree(start)
    done = mukv("train", tmp_path / "tuned", "train.steps=2", f"data.path={text}")
    assert done.returncode == 0, done.stderr
    text.write_text("Another text. " * 30)
    done = mukv("train", tmp_path / "tuned", "train.steps=2", f"data.path={text}")
    assert done.returncode == 2
    assert "began with data of fingerprint" in done.stderr
