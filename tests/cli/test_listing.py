"""Commands that list the version, presets, policies, runs and configuration keys."""

from __future__ import annotations

import json

import pytest

import mukv as package
from mukv.cache.policy import Policy
from mukv.cache.tables import NAMES
from mukv.cli.app import ORDER, app
from mukv.runs import config

pytestmark = pytest.mark.xdist_group("trained")


@pytest.fixture(scope="module")
def facts(mukv):
    def run(*args):
        done = mukv(*args, "--json")
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return run


def test_version(mukv):
    done = mukv("--version")
    assert (done.returncode, done.stdout) == (0, f"mukv {package.__version__}\n")


def test_commands_are_in_the_order_of_use(mukv):
    names = [c.name or c.callback.__name__ for c in app.registered_commands]
    assert set(names) <= set(ORDER)
    text = mukv("--help").stdout
    places = [text.index(f"\u2502 {name} ") for name in ORDER if name in names]
    assert places == sorted(places)


def test_presets(facts, mukv):
    found = facts("presets")["presets"]
    assert [each["name"] for each in found] == config.presets()
    assert all(len(each["meaning"]) > 10 for each in found)
    tiny = next(each for each in found if each["name"] == "tiny")
    assert tiny["parameters"] == facts("describe", "tiny")["parameters"]
    assert "ALiBi" in mukv("presets").stdout


def test_policies(facts, mukv):
    found = {each["name"]: each for each in facts("policies")["policies"]}
    assert found.keys() == set(NAMES)
    snapkv = found["snapkv"]
    assert (snapkv["answers"], snapkv["source"]) == ("keep", "Li et al. 2024")
    assert snapkv["budget"]
    assert snapkv["parameters"]["window"]["default"] == Policy.parse("snapkv").keep.window
    assert not found["full"]["budget"]
    for each in found.values():
        assert each["meaning"]
        assert all(len(field["meaning"]) > 4 for field in each["parameters"].values())
    assert "Xiao et al. 2023" in " ".join(mukv("policies").stdout.split())


def test_one_name_is_listed_alone(facts, mukv):
    (part,) = facts("policies", "snapkv")["policies"]
    (preset,) = facts("presets", "tiny")["presets"]
    assert (part["name"], preset["name"]) == ("snapkv", "tiny")
    shown = " ".join(mukv("policies", "snapkv").stdout.split())
    assert all(words in shown for words in (part["meaning"], part["source"], *part["parameters"]))


def test_runs(facts, mukv, trained, tmp_path):
    (found,) = facts("runs", trained.parent)["runs"]
    assert found["run"] == str(trained)
    assert (found["step"], found["steps"], found["preset"]) == (3, 3, None)
    assert found["loss"] > 0
    assert found["validation_loss"] > 0
    shown = mukv("runs", trained).stdout
    assert f"{found['validation_loss']:.2f}"[:3] in shown
    assert "held out" in shown
    done = mukv("runs", tmp_path)
    assert done.returncode == 2
    assert "FOLDER" in done.stderr


def test_docs(facts, mukv):
    found = facts("docs", "train.schedule")
    assert found["default"]["kind"] == "cosine"
    assert found["allowed"] == ["cosine", "linear", "wsd", "inverse_sqrt", "power"]
    assert {each["kind"] for each in found["inside"]} == set(found["allowed"])
    assert set(facts("docs")["keys"]) == {"model", "data", "train", "mesh"}
    shown = mukv("docs", "model.attention.rank").stdout
    assert "of kind latent" in shown
    assert "default: 64" in shown
    assert mukv("docs", "--markdown").stdout.startswith("# Configuration reference")
    done = mukv("docs", "train.stepz")
    assert done.returncode == 2
    assert "did you mean 'train.steps'?" in done.stderr
