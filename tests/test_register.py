"""Parts from outside the package: registered, named in YAML and overrides, recorded and loaded."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import jax.numpy as jnp
import numpy as np
import pytest

import mukv as package
from mukv.cache.policy import Policy
from mukv.core.table import Names
from mukv.runs import config, parts
from mukv.runs.folder import RunDirectory
from mukv.scaling.rows import EXPONENTS
from mukv.schema import reference, schema
from tests.conftest import MINUSCULE

pytestmark = pytest.mark.xdist_group("trained")
PAGE = Path(__file__).parents[1] / "docs" / "extending.md"


@pytest.fixture(autouse=True)
def _tables_as_before():
    """Restore the tables after a test that registers parts."""
    tables = [*parts.TABLES, *(parts.FAMILIES, parts.TRACKERS, parts.SOURCES, parts.FORMATS)]
    tables += [parts.TASKS, EXPONENTS]
    before = [dict(table) for table in tables]
    yield
    for table, old in zip(tables, before, strict=True):
        table.clear()
        table.update(old)


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Yield the name of a module with the example of the docs, which is not imported yet."""
    code = re.search(r"```python\n(.*?)```", PAGE.read_text(), re.S)
    assert code is not None
    (tmp_path / "my_parts.py").write_text(code[1])
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "my_parts"
    sys.modules.pop("my_parts", None)


def minuscule(*overrides: str) -> package.Run:
    return config.load("tiny", [*MINUSCULE, *overrides])


def test_the_example_by_its_kind(module):
    import my_parts  # pyright: ignore[reportMissingImports]

    run = minuscule("model.attention={kind: unit_queries, length: 2}", "train.schedule.kind=steps")
    assert run.model.attention == my_parts.UnitQueries(
        heads=2, kv_heads=1, head_dim=16, length=2.0, position=run.model.attention.position
    )
    assert run.train.schedule == my_parts.Steps(warmup=run.train.schedule.warmup)
    assert float(run.train.schedule.rate(jnp.asarray(250), run_plan())) == 0.25
    assert Policy.parse("newest:0.5+int8").keep == my_parts.Newest(
        Policy.parse("random:0.5").keep.budget
    )
    assert str(Policy.parse("newest:0.5+int8")) == "newest:0.5+int8"
    assert Policy.parse("newest(recent=3)").keep == my_parts.Newest(recent=3)
    with pytest.raises(package.BadInput, match=r"model\.attention\.length: got -1\.0; greater"):
        minuscule("model.attention={kind: unit_queries, length: -1.0}")
    with pytest.raises(package.BadInput, match="did you mean 'unit_queries'"):
        minuscule("model.attention.kind=unit_querys")


def run_plan():
    from mukv.scaling.schedules import Plan

    return Plan(1.0, 1000, 1)


def test_the_reference_shows_its_fields(module):
    import my_parts  # noqa: F401  # pyright: ignore[reportMissingImports]

    (key,) = reference.find(package.Run, "model.attention.length")
    assert (key.kinds, key.meaning, key.default) == (("unit_queries",), "of every query", 4.0)


@pytest.mark.product
def test_a_dotted_path_is_imported_recorded_and_loaded(mukv, token_file, module, tmp_path):
    run = tmp_path / "run"
    given = "model.attention={kind: my_parts.UnitQueries, length: 2.0}"
    done = mukv("train", "tiny", *MINUSCULE, given, f"data.path={token_file}", "--out", run)
    assert done.returncode == 0, done.stderr
    assert "kind: my_parts.UnitQueries" in (run / "config.yaml").read_text()
    made = package.load(run)
    assert made.network.attention.length == 2.0
    assert RunDirectory(run).load_config() == made.run
    logits = made.logits([[1, 2, 3]])
    # As another process finds it: nothing is registered, the module not imported.
    parts.ATTENTIONS.pop("unit_queries")
    sys.modules.pop("my_parts")
    np.testing.assert_array_equal(package.load(run).logits([[1, 2, 3]]), logits)
    done = mukv(
        "generate", run, "--prompt", "a", "--max-tokens", "4", "--cache", "my_parts.Newest:0.5"
    )
    assert done.returncode == 0, done.stderr
    parts.ATTENTIONS.pop("unit_queries")
    sys.modules.pop("my_parts")
    (tmp_path / "my_parts.py").unlink()
    done = mukv("eval", run, "--text", PAGE)
    assert done.returncode == 2
    assert "model.attention.kind: got 'my_parts.UnitQueries'" in done.stderr
    assert "there is no module 'my_parts'" in done.stderr


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("my_parts.UnitQuery", "a class of my_parts, which has no 'UnitQuery'"),
        ("my_part.UnitQueries", "there is no module 'my_part'"),
        ("my_parts.Steps", "a class that extends mukv.Mixer"),
        ("my_parts.jnp", "a class that extends mukv.Mixer"),
        ("my_parts..x", "the dotted path of a class"),
        ("os.system", "a class that extends mukv.Mixer"),
        ("broken.Part", "ZeroDivisionError"),
    ],
)
def test_a_path_that_cannot_be_used(module, tmp_path, kind, says):
    (tmp_path / "broken.py").write_text("1 / 0")
    with pytest.raises(package.BadInput) as caught:
        minuscule(f"model.attention.kind={kind}")
    assert caught.value.where == "model.attention.kind"
    assert says in str(caught.value)


@dataclass(frozen=True)
class Mine(package.Grouped):
    kind: Literal["mine"] = "mine"


def test_refused_registrations():
    @dataclass(frozen=True)
    class Taken(package.Attention):
        kind: Literal["latent"] = "latent"

    class Plain(package.Schedule):
        kind: Literal["plain"] = "plain"

    @dataclass(frozen=True)
    class Nameless(package.Schedule):
        pass

    @dataclass(frozen=True)
    class Loose(package.Optimizer):
        kind: str = "loose"

    @dataclass(frozen=True)
    class Odd(package.Keep):
        pass

    for part, name, says in (
        (Taken, None, "another name: mukv.attention.latent.Latent has this one"),
        (Plain, None, "frozen dataclass"),
        (Nameless, None, 'kind: Literal["mine"]'),
        (Loose, None, 'kind: Literal["mine"]'),
        (Mine, "yours", "its `kind` is 'mine'"),
        (Odd, None, "a name"),
        (Odd, "int8", "another name"),
        (Odd, "a:b", "letters, digits"),
        (str, None, "mukv.Mixer"),
        (3, None, "mukv.Mixer"),
        (lambda name, field: iter(()), None, "a name"),
        (lambda name, field: iter(()), "stdlib", "in use"),
        (parts.FAMILIES["LlamaForCausalLM"], "MistralForCausalLM", "in use"),
        (package.Parameterization((0.0, 0.0), (0.0, 0.5), (0.0, 0.5)), "mup", "in use"),
        (package.Parameterization((0.0, 0.0), (0.0, 0.5), (0.0, 0.5)), None, "a name"),
    ):
        with pytest.raises(package.BadInput, match=re.escape(says)):
            package.register(part, name=name)
    with pytest.raises(package.BadInput, match=r"must be 0\.5"):
        package.Parameterization((0.0, 0.0), (0.0, 0.1), (0.0, 0.5))


def test_a_class_may_be_registered_again():
    assert package.register(Mine) is Mine
    again = dataclass(frozen=True)(
        type("Mine", (Mine,), {"__module__": __name__, "__annotations__": {}})
    )
    package.register(again)
    assert isinstance(minuscule("model.attention.kind=mine").model.attention, again)


def test_a_class_without_a_path_is_found_while_it_is_registered():
    @package.register
    @dataclass(frozen=True)
    class Local(package.Feedforward):
        """Feed-forward part for this test. factor: an unused number."""

        kind: Literal["local"] = "local"
        factor: float = 1.0

    mlp = schema.to_mapping(Local())
    assert mlp["kind"].endswith("<locals>.Local")
    assert schema.build(package.Layer, {"mlp": mlp}).mlp == Local()
    assert schema.build(package.Layer, {"mlp": {"kind": "local"}}).mlp == Local()
    assert schema.build(package.Layer, {"mlp": {"hidden": 4}}).mlp == package.Gated(hidden=4)


def test_parameterisations_sources_formats_trackers_families_tasks(tmp_path, monkeypatch):
    from dataclasses import replace
    from io import BytesIO

    from mukv.core.params import Param
    from mukv.data.sources import open_source
    from mukv.train.metrics import Trackers

    assert isinstance(EXPONENTS, Names)
    row = package.Parameterization(*EXPONENTS["mup"])
    package.register(row, name="mine")
    declared = {"a": Param({"embed": 64, "hidden": 8}, fan_in=("embed",))}
    ours, known = (
        package.Scaling(kind=kind, base={"embed": 16}).resolve(declared, 2)["a"]
        for kind in ("mine", "mup")
    )
    assert ours == known

    @package.register(name="words")
    def words(name, field):
        yield name, BytesIO(name.encode())

    @package.register(name=".shout")
    def shout(path, field):
        yield path.name, BytesIO(path.read_text().upper().encode())

    (tmp_path / "a.shout").write_text("text")
    (_, said), (_, loud) = (
        *open_source("words:hello", ""),
        *open_source(str(tmp_path / "a.shout"), ""),
    )
    assert (said.read(), loud.read()) == (b"hello", b"TEXT")

    seen = []

    class Listed:
        def __init__(self, folder, name): ...
        def log(self, step, values):
            seen.append((step, dict(values)))

        def close(self): ...

    package.register(Listed, name="listed")
    trackers = Trackers(tmp_path, ["listed"], None)
    trackers.log(3, {"loss": 1.0})
    trackers.close()
    assert seen == [(3, {"loss": 1.0})]

    family = replace(parts.FAMILIES["LlamaForCausalLM"], architecture="MyForCausalLM")
    assert package.register(family) is parts.FAMILIES["MyForCausalLM"]

    @package.register
    @dataclass(frozen=True)
    class Twice(package.Needle):
        kind: Literal["twice"] = "twice"

    assert parts.TASKS["twice"] == Twice()
    assert minuscule("data.task.kind=twice", "train.length=512").data.task == Twice()
