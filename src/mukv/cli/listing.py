"""The commands that list runs, presets, cache policies and configuration keys."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mukv.cli import launch
from mukv.cli.app import Json, app
from mukv.core.errors import BadInput
from mukv.core.names import even
from mukv.show import output
from mukv.show.terminal import Console, styled, table

if TYPE_CHECKING:
    from mukv.schema.reference import Key


@app.command()
def runs(
    folder: Annotated[
        Path, typer.Argument(metavar="[FOLDER]", help="A run directory, or a folder of them.")
    ] = Path("runs"),
    as_json: Json = False,
) -> None:
    """List run directories with their steps and last losses.

    Example: `mukv runs runs/demo`
    """
    launch.prepare()
    from mukv.runs.listing import run_list

    found = run_list(folder)
    if as_json:
        output.print_json({"runs": found})
        return
    shown = table(("run", "preset"), ("step", "of", "loss,\nnats/token", "held out,\nnats/token"))
    losses = (even([run[name] for run in found]) for name in ("loss", "validation_loss"))
    for run, *cells in zip(found, *losses, strict=True):
        steps = ("" if run[name] is None else f"{run[name]:,}" for name in ("step", "steps"))
        shown.add_row(run["run"], run["preset"] or "", *steps, *cells)
    Console().print(shown)


@app.command()
def presets(
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="A preset; default: all.")
    ] = None,
    as_json: Json = False,
) -> None:
    """List the presets with their meaning and number of parameters.

    Example: `mukv presets`
    """
    launch.prepare()
    from mukv.runs.listing import by_name, preset_list

    found = by_name(name, preset_list())
    if as_json:
        output.print_json({"presets": found})
        return
    shown = table(("preset", "meaning"), ("parameters",))
    for each in found:
        shown.add_row(each["name"], each["meaning"], f"{each['parameters']:,}")
    Console().print(shown)


@app.command()
def policies(
    name: Annotated[
        str | None,
        typer.Argument(metavar="[NAME]", help="A part, shown with all about it; default: all."),
    ] = None,
    as_json: Json = False,
) -> None:
    """List the parts of cache policies: what to keep, store or select, parameters, papers.

    Example: `mukv policies`
    """
    launch.prepare()
    from mukv.runs.listing import by_name, policy_list
    from mukv.schema.reference import short_yaml

    found = by_name(name, policy_list())
    if as_json:
        output.print_json({"policies": found})
        return
    if name is not None:
        _show_part(found[0])
        return
    shown = table(("name", "part", "meaning", "parameters", "source"), ())
    for each in found:
        parameters = (f"{k}={short_yaml(v['default'])}" for k, v in each["parameters"].items())
        words = ", ".join([*(["budget"] if each["budget"] else []), *parameters])
        source = each["source"] or ""
        meaning = each["meaning"].removesuffix(f" ({source})")  # it has a column of its own
        shown.add_row(each["name"], each["answers"], meaning, words, source)
    Console().print(shown)
    Console().say(
        "parts are joined by +, at most one for each of keep, spread, when, merge, store and "
        "select; parameters are in brackets, a budget after a colon: "
        "--cache 'snapkv(window=64):0.25+int8'",
        "dim",
    )
    Console().say("the prefix kvpress: gives the defaults of kvpress: kvpress:snapkv:0.25", "dim")


def _show_part(part: dict[str, Any]) -> None:
    """Print all about a part of a cache policy, and each of its parameters."""
    from mukv.schema.reference import short_yaml

    say = Console().print
    say(styled((part["name"], "bold"), f" ({part['answers']})"))
    say(f"  meaning: {part['meaning']}")
    if part["source"]:
        say(f"  source:  {part['source']}")
    say(f"  budget:  {'yes, such as ' + part['name'] + ':0.25' if part['budget'] else 'no'}")
    shown = table(("parameter", "meaning", "type", "default"), ())
    for key, value in part["parameters"].items():
        shown.add_row(key, value["meaning"], value["type"], short_yaml(value["default"]))
    if part["parameters"]:
        say(shown)


@app.command()
def docs(
    key: Annotated[
        str | None,
        typer.Argument(metavar="[KEY]", help="Such as train.schedule; default: all."),
    ] = None,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Print the whole reference as a page.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Show meaning, type, default and allowed values of a configuration key.

    Example: `mukv docs train.learning_rate`
    """
    launch.prepare()
    from mukv.runs.config import Run
    from mukv.schema import reference

    if markdown and (key is not None or as_json):
        raise BadInput("docs", key or "--json", "--markdown alone")
    if markdown:
        Console().file.write(reference.markdown(Run))
        return
    keys = reference.keys_of(Run) if key is None else _found(Run, key)
    inside = [] if key is None else reference.inside(keys)
    if as_json:
        output.print_json({"key": key, **_facts(keys, inside, key is None)})
        return
    if key is None:
        _show_keys(keys)
        Console().say("mukv docs KEY shows the keys in one of them, such as train.schedule", "dim")
        return
    for each in keys:
        _show_key(each)
    for kind, meaning, fields in inside:
        Console().say("")
        Console().print(styled((f"kind {kind}: " if kind else "", "bold"), meaning))
        _show_keys(fields)


def _found(root: type, key: str) -> list[Key]:
    """Return the fields at a dotted path. The error for the name of a preset or of a part of a
    cache policy names the command that describes it."""
    from mukv.cache.tables import NAMES
    from mukv.runs.config import presets
    from mukv.schema.reference import find

    try:
        return find(root, key)
    except BadInput as error:
        commands = {name: f"mukv describe {name}" for name in presets()}
        commands |= {name: f"mukv policies {name}" for name in NAMES}
        if key not in commands:
            raise
        raise BadInput(error.where, key, f"a configuration key; see `{commands[key]}`") from None


def _facts(keys: list[Key], inside: list[Any], top: bool) -> dict[str, Any]:
    """Return the object that `--json` prints.

    Without a KEY (`top`) it has the facts of all keys. Otherwise it has the facts of the first
    field of this name, under `variants` those of all fields of this name, and under `inside` the
    keys of the mappings that the field takes.
    """
    if top:
        return {"keys": {key.path: key.facts() for key in keys}}
    below = [
        {"kind": kind, "meaning": meaning, "keys": {each.path: each.facts() for each in fields}}
        for kind, meaning, fields in inside
    ]
    return {**keys[0].facts(), "variants": [key.facts() for key in keys], "inside": below}


def _show_key(key: Key) -> None:
    of = f" (of kind {', '.join(key.kinds)})" if key.kinds else ""
    Console().print(styled((key.path, "bold"), of))
    meaning, (parent, _, name) = key.meaning, key.path.rpartition(".")
    if not meaning and name == "kind":
        meaning = f"name of this kind; `mukv docs {parent}` shows the keys of each kind"
    Console().print(f"  meaning: {meaning}")
    Console().print(f"  type:    {key.type}")
    Console().print(f"  default: {key.default_text}")
    if key.allowed:
        Console().print(f"  allowed: {', '.join(key.allowed)}")


def _show_keys(keys: list[Key]) -> None:
    shown = table(("key", "meaning", "type", "default"), ())
    for key in keys:
        shown.add_row(key.path, key.meaning, key.type, key.default_text)
    Console().print(shown)
