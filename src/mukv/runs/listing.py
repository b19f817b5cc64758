"""List the presets, cache policies and run directories, as plain data."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mukv.cache.tables import TABLES
from mukv.cache.words import PEERS, parameters
from mukv.core.errors import BadInput, unknown_name
from mukv.core.params import count
from mukv.core.table import PartTable
from mukv.runs import config
from mukv.runs.folder import RunDirectory
from mukv.schema.reference import keys_of, summary
from mukv.schema.yaml_text import read_yaml
from mukv.train.metrics import read_metrics


def preset_list() -> list[dict[str, Any]]:
    """Return name, meaning (the first comment of the file) and number of parameters of every
    preset."""
    found = []
    for name in config.presets():
        text = (config.presets_folder() / f"{name}.yaml").read_text("utf-8")
        comment = re.match(r"(?:#.*\n)*", text)
        words = " ".join((comment[0] if comment else "").replace("#", " ").split())
        model = config.load(name).model
        found.append({"name": name, "meaning": words, "parameters": count(model.params())})
    return found


def by_name(name: str | None, listed: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the object with this name, as a list; all if `name` is None. Raises BadInput if there
    is none."""
    found = [each for each in listed if name in (None, each["name"])]
    if name is not None and not found:
        raise unknown_name("NAME", name, [each["name"] for each in listed])
    return found


def policy_list() -> list[dict[str, Any]]:
    """Return every part that a cache policy can have, as the objects of `mukv policies --json`.

    name: name of the part
    answers: step of the policy that the part implements: keep, refine, spread, when, merge, store,
        select
    meaning, source: what the part does, and the paper that describes it
    budget: whether the part has a budget
    parameters: default, type and meaning of each parameter
    peers: defaults of other libraries that differ, by library
    """
    return [_of_part(name, table) for table in TABLES for name in table]


def _of_part(name: str, table: PartTable[Any]) -> dict[str, Any]:
    cls = table[name]
    text = " ".join((cls.__doc__ or "").split())
    keys = {key.path: key for key in keys_of(cls)}
    return {
        "name": name,
        "answers": table.part,
        "meaning": summary(cls),
        "source": source_of(text) or source_of(summary(cls)),
        "budget": cls.has_budget,
        "parameters": {
            each: {
                "default": keys[each].default,
                "type": keys[each].type,
                "meaning": keys[each].meaning,
            }
            for each in parameters(cls)
        },
        "peers": {peer: known[name] for peer, known in PEERS.items() if name in known},
    }


def source_of(text: str) -> str | None:
    """Return author and year of the first paper that a text names in brackets."""
    found = re.search(r"\(([^()]*?[A-Z][^()]*? (?:19|20)\d\d)[^()]*\)", text)
    return found[1] if found else None


def run_list(folder: Path) -> list[dict[str, Any]]:
    """Return facts on each run directory in a folder, or on the folder itself if it is a run
    directory: preset (if the folder is named after one), total and completed steps, and last losses
    in nats per token. Raises BadInput if there is no run directory."""
    itself = [folder] if RunDirectory(folder).exists else []
    found = itself or sorted(path.parent for path in folder.glob("**/config.yaml"))
    if not found:
        raise BadInput("FOLDER", str(folder), "a run directory, or a folder of them")
    return [_of_run(path) for path in found]


def _of_run(path: Path) -> dict[str, Any]:
    directory = RunDirectory(path)
    last: dict[str, Any] = {}
    for record in read_metrics(directory.metrics):
        last |= record
    try:
        training = read_yaml(directory.config).get("train")
    except BadInput:
        training = None
    steps = training.get("steps") if isinstance(training, dict) else None
    preset = re.sub(r"-[0-9a-f]{8}$", "", path.name)
    return {
        "run": str(path),
        "preset": preset if preset in config.presets() else None,
        "steps": steps if isinstance(steps, int) else None,
        "step": last.get("step"),
        "loss": last.get("loss"),
        "validation_loss": last.get("validation_loss"),
    }
