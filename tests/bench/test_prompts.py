"""Tasks that are asked by prompts: the prompts, the grades of answers, and what is stored."""

from __future__ import annotations

import itertools
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import mukv as package
from mukv.bench.asking import Asker, largest
from mukv.bench.examine import ExamineSettings
from mukv.bench.grading import closeness, names
from mukv.bench.prompting import asker_of, examine_prompts, shown
from mukv.bench.run import test_model as bench_model
from mukv.cache import Policy
from mukv.core.errors import BadInput
from mukv.infer.decode import Generation
from mukv.runs.loaded import Model
from mukv.tasks import Needle
from mukv.tasks.prompts import NOISE, PROMPTED, PromptForm, sentences_of
from mukv.tasks.solvers.prompts import SOLVERS_IN_WORDS
from tests.pairs import params

CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>{% endfor %}<model>"
TRIMMED = CHAT.replace("m.content", "m.content[:40]")
FEW = ExamineSettings(samples=3)
LENGTH = 1400


@pytest.fixture
def speaker(trained) -> Model:
    return package.load(trained)


@pytest.fixture
def chatty(trained, tmp_path) -> Path:
    """Return the minuscule model with a chat template."""
    pytest.importorskip("jinja2")
    folder = Path(shutil.copytree(trained, tmp_path / "chatty"))
    (folder / "chat_template.jinja").write_text(CHAT)
    return folder


def answering(monkeypatch, answer) -> list[str]:
    """Replace generation by a function of the prompt; return the prompts that it was given."""
    given: list[str] = []

    def generate_ids(self, prompts, most, policy=None, then=None):
        texts = [self.tokenizer.decode(ids) for ids in prompts]
        given.extend(texts)
        tokens = [self.tokenizer.encode(answer(text)).tolist()[:most] for text in texts]
        return Generation(tokens, 640 * len(prompts), 0.0, 0.0, 0.0)

    monkeypatch.setattr(Model, "generate_ids", generate_ids)
    return given


@pytest.mark.parametrize("name", params(PROMPTED, [*PROMPTED][:1]))
def test_a_perfect_model_scores_one(monkeypatch, speaker, name):
    solve = SOLVERS_IN_WORDS[PROMPTED[name].kind]
    given = answering(monkeypatch, lambda text: f" {', '.join(reversed(solve(text)))}.")
    form = PromptForm(PROMPTED[name])
    found = examine_prompts(asker_of(speaker, form, FEW), name, form, 3000, FEW)
    assert found.row["exact_match"] == found.row["partial"] == found.row["oracle"] == 1
    assert found.row["form"] == "plain"
    assert [each["prompt"] for each in found.answers] == given[:3]
    for each in found.answers:
        assert not any(answer in each["prompt"][-60:] for answer in each["expected"])


def test_one_wrong_digit_lowers_partial(monkeypatch, speaker):
    """If one digit of seven is wrong, `exact_match` is 0 and `partial` is 6/7."""

    def off_by_one(text: str) -> str:
        (number,) = SOLVERS_IN_WORDS["needle"](text)
        return f" {number[:-1]}{(int(number[-1]) + 1) % 10}."

    answering(monkeypatch, off_by_one)
    form = PromptForm(PROMPTED["needle"])
    found = examine_prompts(asker_of(speaker, form, FEW), "needle", form, LENGTH, FEW)
    assert found.row["exact_match"] == 0
    assert found.row["partial"] == pytest.approx(6 / 7)
    assert found.row["partial"] > found.row["partial_chance"] + 0.2
    assert found.answers[0]["right"] == [False]
    assert found.answers[0]["answer"] == off_by_one(found.answers[0]["prompt"])


def edits(one: str, two: str) -> int:
    """Compute the Levenshtein distance by its recursion."""
    row = list(range(len(two) + 1))
    for count, letter in enumerate(one, start=1):
        before, row = row, [count]
        for place, other in enumerate(two):
            row.append(min(before[place + 1] + 1, row[-1] + 1, before[place] + (letter != other)))
    return row[-1]


def test_closeness_is_to_the_nearest_part_of_an_answer():
    random = np.random.default_rng(0)
    for _ in range(150):
        wanted = "".join(random.choice(list("abc"), random.integers(1, 6)))
        answer = "".join(random.choice(list("abcd"), random.integers(0, 9)))
        cuts = itertools.combinations_with_replacement(range(len(answer) + 1), 2)
        least = min(edits(wanted, answer[start:stop]) for start, stop in cuts)
        assert closeness(answer, wanted) == pytest.approx(1 - least / len(wanted)), (answer, wanted)


def test_an_answer_names_whole_words():
    assert names("It is 1234567.", "1234567")
    assert names("debe, Pamo", "PAMO")
    assert not names("It is 12345678.", "1234567")
    assert not names("", "1")


def test_the_largest_that_fits():
    for answer, least, guess in itertools.product(range(3, 40, 4), (1, 3), (1, 3, 9, 50)):
        calls: list[int] = []

        def fits(size: int, top: int = answer, calls: list[int] = calls) -> bool:
            calls.append(size)
            return size <= top

        assert largest(fits, least, max(least, guess)) == answer
        assert len(calls) < 16


def test_a_prompt_fills_its_length(speaker):
    form, asker = PromptForm(PROMPTED["needle_multi_query"]), Asker(speaker)
    for length in (1200, 1900):
        for prompt in asker.fitting(form, length, 0, np.arange(4)):
            assert length - 40 < asker.needed(prompt) <= length
    with pytest.raises(BadInput, match=r"length.*at least \d+ tokens of this model for needle"):
        asker.fitting(form, 200, 0, np.arange(4))


def test_the_question_is_read_after_the_policy_has_chosen(monkeypatch, speaker):
    form, policy = PromptForm(PROMPTED["needle"]), Policy.parse("streaming:0.5")
    read = []

    def generate_ids(self, prompts, most, policy=None, then=None):
        read.append((prompts, then))
        return Generation([[] for _ in prompts], 640 * len(prompts), 0.0, 0.0, 0.0)

    monkeypatch.setattr(Model, "generate_ids", generate_ids)
    for aware in (False, True):
        settings = replace(FEW, policy=policy, aware=aware)
        found = examine_prompts(asker_of(speaker, form, settings), "needle", form, LENGTH, settings)
        assert found.row["aware"] == aware
    (contexts, questions), (whole, nothing) = read
    assert nothing is None
    assert [one + two for one, two in zip(contexts, questions, strict=True)] == whole
    for context, question in zip(contexts, questions, strict=True):
        assert speaker.tokenizer.decode(question).startswith("What is the special magic number for")
        assert "What is" not in speaker.tokenizer.decode(context)


@pytest.mark.parametrize("template", [CHAT, TRIMMED], ids=["around", "changed"])
def test_the_template_is_put_around_each_prompt(chatty, template):
    (chatty / "chat_template.jinja").write_text(template)
    model, form = package.load(chatty), PromptForm(PROMPTED["needle"])
    asker = asker_of(model, form, replace(FEW, shots=1))
    (shot,) = form.batch(form.task.smallest, 0, "train", np.arange(1))
    prompt = form.batch(60, 0, "test", np.array([7]))[0]
    turns = [shot.message, f"{shot.opening} {shot.answers[0]}.".strip(), prompt.message]
    kept = [turn[:40] if template == TRIMMED else turn for turn in turns]
    first, answer, asked = kept
    assert asker.whole(prompt) == (
        f"<user>{first}</user><assistant>{answer}</assistant><user>{asked}</user><model>"
        + prompt.opening
    )
    assert model.tokenizer.decode(asker.ids(prompt)) == asker.whole(prompt)
    if template == TRIMMED:
        with pytest.raises(BadInput, match="--aware"):
            asker.parts(prompt)
    else:
        context, behind = asker.parts(prompt, after=True)
        assert context + behind == asker.ids(prompt)
        assert model.tokenizer.decode(context).endswith(prompt.question)
    plain = asker_of(model, form, replace(FEW, shots=1, form="plain")).whole(prompt)
    assert plain.startswith(f"{shot.message}{shot.opening} {shot.answers[0]}.\n\n{prompt.message}")


@pytest.mark.product
def test_answers_are_shown_and_stored(mukv, chatty, tmp_path):
    given = ("--tasks", "needle,variable_tracking", "--lengths", LENGTH, "--samples", 2)
    done = mukv("bench", chatty, *given, "--out", tmp_path / "out", "--json")
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout.splitlines()[-1])["rows"]
    for row in rows:
        for key in ("task", "length", "exact_match", "chance", "oracle", "cache_bytes_per_token"):
            assert key in row
        assert (row["form"], row["samples"]) == ("chat", 2)
    assert "<user>A special magic number is hidden" in done.stderr
    assert done.stderr.index("[expected: 1940612]") < done.stderr.index("no answer is right")
    assert "needle, 1,400 tokens: expected '1940612', answered " in done.stderr
    kept = json.loads((tmp_path / "out" / "needle.json").read_text())
    assert kept["knobs"]["digits"] == 7
    for each in kept["every"]:
        assert each["prompt"].endswith("mentioned in the provided text is")
        assert each["expected"][0] in each["prompt"]
        assert isinstance(each["answer"], str)
        assert 0 <= each["partial"][0] < 1


@pytest.mark.product
def test_a_policy_and_a_haystack(mukv, chatty, tmp_path):
    (tmp_path / "prose.txt").write_text("It was late. Nobody came, and he left! " * 20)
    given = ("--tasks", "needle", "--lengths", 900, "--samples", 1, "--json")
    words = ("--haystack", tmp_path / "prose.txt", "--form", "plain")
    rows = []
    for number, policy in enumerate(((), ("--policy", "streaming:0.25"))):
        out = tmp_path / f"out{number}"
        done = mukv("bench", chatty, *given, *words, *policy, "--out", out)
        assert done.returncode == 0, done.stderr
        rows += json.loads(done.stdout.splitlines()[-1])["rows"]
        assert "Nobody came, and he left! " in (out / "needle.json").read_text()
    assert rows[1]["cache_bytes_per_token"] < rows[0]["cache_bytes_per_token"]


@pytest.mark.product
def test_answers_to_the_text_of_a_task_are_kept(speaker, tmp_path):
    settings = ExamineSettings(samples=3, free=2, form="text")
    told: list[str] = []
    bench_model(speaker, {"needle": Needle()}, [320], settings, tmp_path, told.append)
    kept = json.loads((tmp_path / "needle.json").read_text())
    assert kept["rows"][0]["form"] == "text"
    assert len(kept["every"]) == 3
    assert len(kept["decoded"]) == 2
    for each in kept["every"]:
        assert (each["partial"] == 1) == each["right"]
    for each, first in zip(kept["decoded"], kept["every"], strict=False):
        assert each["prompt"].endswith(" is")
        assert each["expected"] == first["expected"]
        assert each["right"] == (each["answer"] == each["expected"])
    if not kept["rows"][0]["exact_match"]:
        assert f"expected {first['expected'].strip()!r}" in "\n".join(told)


def test_sentences_of_a_text():
    assert sentences_of('He said:\n"It is!" Then (he left).\n\nNo end') == (
        *('He said: "It is!', "Then (he left).", "No end"),
    )
    assert max(map(len, sentences_of("word " * 500))) <= 300
    assert sentences_of(" \n ") == ()
    form = PromptForm(PROMPTED["needle"], ("One.", "Two.", "Three."))
    first, second = form.batch(30, 0, "test", np.arange(2))
    assert "One. Two." in first.message
    assert NOISE[0] not in first.message + second.message


def test_a_long_prompt_is_shown_by_its_ends():
    text = shown("a" * 500 + "b" * 500, ("1", "2"))
    assert text.startswith("a" * 400 + "\n[... 200 characters ...]\n" + "b" * 400)
    assert text.endswith("[expected: 1, 2]")


@pytest.mark.product
@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("--form", "chats"), "did you mean 'chat'"),
        (("--form", "chat"), "a model with a chat template"),
        (("--tasks", "mqar", "--form", "plain"), "a task that can be asked in words: needle"),
        (("--tasks", "needle", "--lengths", "100"), "for needle"),
        (("--haystack", "none.txt"), "a readable file"),
        (("--facts", "40", "--tasks", "needle"), "at least facts"),
        (("--samples", "0"), "--samples"),
    ],
)
def test_bad_input_is_reported_before_anything_runs(mukv, trained, tmp_path, given, said):
    done = mukv("bench", trained, *given, "--out", tmp_path / "out")
    assert done.returncode == 2, done.stderr
    assert said in " ".join(done.stderr.split())
    assert not (tmp_path / "out").exists()
