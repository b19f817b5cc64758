"""Mixtures take rows of each part in fixed shares, as a pure function of the step."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mukv.core.errors import BadInput
from mukv.data.batches import Batches
from mukv.data.build import build_tokens
from mukv.data.mixture import CYCLE, MixtureFeed, dealt
from mukv.data.tokens import TokenFile
from mukv.runs import config
from mukv.runs.config import Run
from mukv.runs.folder import RunDirectory
from mukv.runs.resolve import open_corpus, open_feed
from mukv.runs.train import train_run
from mukv.train.metrics import read_metrics
from mukv.train.validation import validated
from mukv.tuning.together import Point, Together
from tests.conftest import MINUSCULE
from tests.processes import contents

WEIGHTS = (3.0, 1.0, 0.0)
SHORT = ("train.batch=4", "train.length=16", "train.schedule={kind: inverse_sqrt, warmup: 1}")


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> list[TokenFile]:
    """Return three token files, each of one letter in different documents."""
    folder = tmp_path_factory.mktemp("parts")
    made = []
    for letter, count in zip("abc", (40, 25, 30), strict=True):
        lines = [letter * (5 + 3 * number % 11) for number in range(count)]
        (folder / letter).mkdir()
        for number, line in enumerate(lines):
            (folder / letter / f"{number:02}.txt").write_text(line + str(number))
        made.append(build_tokens([str(folder / letter)], folder / f"{letter}-tokens"))
    return made


@pytest.fixture(scope="module")
def feed(files) -> MixtureFeed:
    return MixtureFeed((*files,), WEIGHTS, "packed")


def kinds(tokens: np.ndarray) -> list[str]:
    """Return the letter of each row."""
    (letters,) = [np.frombuffer(b"abc", np.uint8)]
    return ["abc"[int(np.argmax((row[:, None] == letters).sum(0)))] for row in tokens]


def test_shares_hold_in_every_batch_and_exactly_in_a_cycle(feed):
    batches = feed.source("train", 0, 8, 16)
    for step in (0, 1, 77, CYCLE // 8 - 1, CYCLE):
        found = kinds(batches.at(step).tokens)
        assert abs(found.count("a") - 6) <= 1
        assert "c" not in found
    _, part, number = batches._table
    assert np.bincount(part).tolist() == [CYCLE * 3 // 4, CYCLE // 4]
    for k in range(2):
        assert sorted(number[part == k]) == list(range((part == k).sum()))


def test_rows_are_those_of_the_parts_in_their_order(feed, files):
    """The n-th row of a part in the mixture is the n-th row of that part alone."""
    mixed = [feed.source("train", 5, 8, 16).at(step) for step in range(12)]
    for letter, file in zip("ab", files, strict=False):
        alone = Batches(file, 5, 4, 16)
        found = [
            (batch.tokens[row], batch.segment[row], batch.position[row], batch.weight[row])
            for batch in mixed
            for row, kind in enumerate(kinds(batch.tokens))
            if kind == letter
        ]
        for n, row in enumerate(found):
            batch = alone.at(n // 4)
            for mine, name in zip(row, ("tokens", "segment", "position", "weight"), strict=True):
                np.testing.assert_array_equal(mine, getattr(batch, name)[n % 4])


def test_parts_continue_after_a_cycle(feed, files):
    batches, per = feed.source("train", 0, 8, 16), CYCLE * 3 // 4
    batch = batches.at(CYCLE // 8)
    first = kinds(batch.tokens).index("a")
    expected = Batches(files[0], 0, 1, 16).at(per)
    np.testing.assert_array_equal(batch.tokens[first], expected.tokens[0])


def test_hosts_share_the_same_batch(feed):
    batches = feed.source("train", 3, 8, 16)
    whole = batches.at(9)
    for hosts in (2, 4):
        parts = [batches.at(9, host, hosts) for host in range(hosts)]
        for name in whole._fields:
            joined = np.concatenate([getattr(part, name) for part in parts])
            np.testing.assert_array_equal(joined, getattr(whole, name))


def test_validation_covers_every_part(feed, files):
    batches = feed.source("validation", 0, 2, 16)
    seen = sum(int(batch.weight.sum()) for batch in batches.once())
    alone = (Batches(file, 0, 2, 16, "validation").once() for file in files)
    assert seen == sum(int(batch.weight.sum()) for part in alone for batch in part) > 0
    assert len(list(batches.once(3))) == 3


@pytest.mark.parametrize(
    ("weights", "rows"),
    [
        ((1, 1), [CYCLE // 2] * 2),
        ((1, 1, 1), [CYCLE // 3 + 1, CYCLE // 3, CYCLE // 3]),
        ((CYCLE - 1, 1), [CYCLE - 1, 1]),
        ((0, 2, 0), [0, CYCLE, 0]),
    ],
)
def test_rows_of_a_cycle(weights, rows):
    assert dealt(weights).tolist() == rows


def load(files: list[TokenFile], *overrides: str, weights: tuple[float, ...] = WEIGHTS) -> Run:
    pairs = zip(files, weights, strict=True)
    parts = ", ".join(f"{{path: {file.path}, weight: {weight}}}" for file, weight in pairs)
    return config.load("tiny", [*MINUSCULE, *SHORT, f"data.mixture=[{parts}]", *overrides])


@pytest.mark.product
def test_a_resumed_run_has_the_same_bits_and_each_part_is_validated(files, tmp_path):
    folders = [RunDirectory(tmp_path / name) for name in ("whole", "halves")]
    train_run(load(files, "train.steps=4"), folders[0])
    for steps in (2, 4):
        train_run(load(files, f"train.steps={steps}"), folders[1])
    assert contents(folders[0].weights) == contents(folders[1].weights)
    last = list(read_metrics(folders[0].path / "metrics.jsonl"))[-1]
    losses = [last[f"validation_loss/{letter}-tokens"] for letter in "abc"]
    np.testing.assert_allclose(last["validation_loss"], 0.75 * losses[0] + 0.25 * losses[1], 1e-6)
    (together,) = _swept(load(files, "train.steps=4"))
    for name in (name for name in last if name.startswith("validation_")):
        assert together[name] == pytest.approx(last[name], rel=1e-4), name
    with pytest.raises(BadInput, match=r"data\.mixture\.0\.weight: got 4"):
        train_run(load(files, "train.steps=4", weights=(4, 1, 0)), folders[1])


def _swept(run: Run) -> list[dict[str, float]]:
    """Return the last metrics of the run as a point of a sweep."""
    *_, last = Together([Point(run.model, run.train)], open_feed(run)[1]).run()
    return last.numbers


def test_points_of_a_sweep_are_validated_as_a_run_is(feed):
    """The validation loss of two points at once equals that of each alone, the weighted mean of the
    parts."""
    source = feed.source("validation", 0, 2, 16)
    parts = list(source.parts.values())
    sums = np.array([[[6.0, 8.0], [2.0, 2.0], [9.0, 9.0]], [[5.0, 1.0], [1.0, 1.0], [3.0, 3.0]]])
    sums = np.concatenate([sums, np.ones((1, 3, 2))])

    def summed(sources, limit):
        assert limit == 1
        (part,) = sources
        return sums[parts.index(part)]

    both = validated([source], 3, summed)
    np.testing.assert_allclose(both["validation_loss"], [0.75 * 3 + 0.25 * 5, 0.75 * 4 + 0.25])
    assert list(both["validation_loss/b-tokens"]) == [5.0, 1.0]
    for point in (0, 1):
        alone = validated([source], 3, lambda *given, n=point: summed(*given)[:, n])
        assert {name: float(value) for name, value in alone.items()} == pytest.approx(
            {name: value[point] for name, value in both.items()}
        )


def test_bad_mixtures(files, tmp_path):
    """Errors name the key of a bad mixture before anything is compiled."""
    for weights, says in {
        (0, 0, 0): r"mixture: weights: got \[0.*sum above 0",
        (1, -1, 0): r"data\.mixture\.1\.weight: got -1",
        (1, 1e-9, 0): r"mixture\.1\.weight: got 1e-09; 0, or at least 1/16384",
    }.items():
        with pytest.raises(BadInput, match=says):
            load(files, weights=weights)
    with pytest.raises(BadInput, match=r"data\.path: got '/x'; null where data\.mixture"):
        load(files, "data.path=/x")
    with pytest.raises(BadInput, match=r"data\.mixture\.1\.path: got '/nowhere'"):
        open_feed(load(files, "data.mixture.1.path=/nowhere"))
    (tmp_path / "text").write_text("other words " * 50)
    other = build_tokens([str(tmp_path / "text")], tmp_path / "other", "bpe:260")
    with pytest.raises(BadInput, match=r"data\.mixture\.1\.path.*the tokenizer of"):
        open_feed(load([files[0], other], weights=(1, 1)))
    empty = _emptied(files[1], tmp_path / "empty")
    with pytest.raises(BadInput, match=r"data\.mixture\.1\.path.*validation part has 0 tokens"):
        MixtureFeed((files[0], empty), (1, 1), "packed")
    with pytest.raises(BadInput, match=r"data\.mixture.*a single text"):
        open_corpus(load(files))


def _emptied(file: TokenFile, path: Path) -> TokenFile:
    """Return the token file without its validation text."""
    nothing = type(file.validation)(file.validation.tokens[:0], file.validation.starts[:0], 0)
    return type(file)(path, file.train, nothing, file.tokenizer, file.fingerprint, ())
