"""Measure the loss that pretrained models gain when queries read only entries chosen by clusters.

    python reproductions/query-clusters/real.py MODEL... [--length 1024] [--samples 4]
    python reproductions/query-clusters/real.py --draw

MODEL: a folder as of `mukv import` or of Hugging Face. Reads windows of code, prose and dialogue.
All but the last 128 tokens of a window are prefilled; these are then read one by one under a
policy, and their loss is measured. Every policy lets a query read equally many entries of the body:

- latest: the first four and the most recent entries; the others are dropped
- pages: pages of 16 entries (4 below 1,024) with the largest bounds of the logits
- clusters of the prompt: k-means of the keys of this prompt
- keys, queries, means, aligned: centres that were calibrated on other windows of all three texts,
  after the rotation by position or before it

Measured numbers are kept in real.json, and centres under --folder, so that the command continues
where it was stopped; --draw makes real.png from the existing file.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

import mukv
from mukv.analysis.calibrate import calibrate
from mukv.analysis.samples import even, halves, joined
from mukv.attention import Attention, Query, Recall, Retrieved
from mukv.attention.grouped import Grouped
from mukv.cache import FULL, Policy
from mukv.cache.budget import CacheBudget
from mukv.cache.centres import KINDS, Centres, Kind, load_centres, unrotated
from mukv.cache.clusters import Clusters
from mukv.cache.select import Index, View
from mukv.cache.select import joined as whole_query
from mukv.cache.shelf import Shelf
from mukv.cli import launch
from mukv.compress.reader import PolicyReader
from mukv.core.compute import settled
from mukv.model import Decoder
from mukv.runs.loaded import Model
from mukv.show.figures import saved_figure
from mukv.show.progress import say
from mukv.storage.files import write_atomic

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
import subjects  # noqa: E402

SHARES = (1 / 4, 1 / 8, 1 / 16)
NATS = (0, 0.05, 0.1, 0.3, 1, 3)
"""Ticks of the figure."""
TAKEN = 128
"""Tokens at the end of each window whose loss is measured."""
CALIBRATED = 6144
"""Approximate number of tokens on which centres are calibrated, at least one window of each
text."""
FIXED = {"latest": "streaming", "pages": "pages", "clusters of the prompt": "clusters"}
"""Policies without calibration."""


@dataclass(frozen=True)
class Unrotated(Clusters):
    """Clusters of keys before rotation, which are compared with queries before rotation.

    The position of a query is the one with which the layer last made queries under `noting`.

    attention: that of the layers without a window, which all rotate alike
    """

    attention: Attention | None = None

    def order(self, view: View) -> tuple[Any, View]:
        assert self.attention is not None
        place = jnp.maximum(view.entries.position, 0)
        turned = unrotated(self.attention, view.key, place)
        order, found = super().order(replace(view, key=turned))
        return order, replace(found, key=view.key)

    def retrieve(self, shelf: Shelf, index: Index, query: Query, recall: Recall) -> Retrieved:
        assert self.attention is not None
        whole = whole_query(query)
        batch, heads, group, width = whole.shape
        flat = whole.reshape(batch, heads * group, 1, width)
        flat = unrotated(self.attention, flat, NOTED[0][:, None])
        turned = flat.reshape(batch, heads, group, 1, width)
        return super().retrieve(shelf, index, (turned,), recall)


NOTED: list[Any] = []
"""Positions [batch query] of the queries that were made last."""


def noting() -> AbstractContextManager[Any]:
    """Note the positions of the queries that each layer makes while its program is traced."""
    make = Grouped.query

    def noted(layer: Grouped, weights: Any, x: Any, position: Any) -> Any:
        NOTED[:] = [position]
        return make(layer, weights, x, position)

    return mock.patch.object(Grouped, "query", noted)


def names(share: float) -> dict[str, tuple[Kind, bool] | None]:
    """Return the policies at a share; of those with calibrated centres, their kind and whether they
    were calibrated after rotation.
    """
    made: dict[str, tuple[Kind, bool] | None] = {named(name, share): None for name in FIXED}
    for kind in KINDS:
        for rotated in (True, False):
            when = "after" if rotated else "before"
            made[named(f"{kind} {when} rotation", share)] = (kind, rotated)
    return made


def clusters_of(length: int) -> int:
    """Return the number of centres per head: that which the policy `clusters` has by default."""
    return round(math.sqrt(length))


class Subject:
    """A model at one length, with its windows, centres and reader."""

    def __init__(self, place: Path, length: int, samples: int, folder: Path):
        self.model: Model = mukv.load(place)
        network = self.model.network
        assert isinstance(network, Decoder)
        self.network, self.length = network, length
        self.folder = folder / place.name / str(length)
        texts = subjects.texts(length, 2 * samples, self.model.tokenizer)
        split = {name: halves(rows) for name, rows in texts.items()}
        self.rows = {name: np.asarray(judged.tokens) for name, (_, judged) in split.items()}
        each = max(1, round(CALIBRATED / length / len(texts)))
        few = [type(rows)(*(array[:each] for array in rows)) for rows, _ in split.values()]
        self.calibration = joined(few)
        compute = settled(self.model.run.train.compute)
        self.reader = PolicyReader(network, self.model.decoding, compute, length - TAKEN, length)
        whole = [layer.softmax for layer in network.layers if layer.window is None]
        self.attention = whole[0]
        assert all(each.position == self.attention.position for each in whole)

    def centres(self, kind: Kind, rotated: bool) -> Centres:
        """Return centres of a kind, calibrated now or by an earlier command."""
        folder = self.folder / f"{kind}-{'after' if rotated else 'before'}"
        if not (folder / "calibration").exists():
            folder.mkdir(parents=True, exist_ok=True)
            rows = even(self.calibration, 1)
            count = clusters_of(self.length)
            made = calibrate(self.network, self.model.weights, rows, kind, count, rotated)
            made.save(folder)
            say(f"centres: {folder}")
        return load_centres(folder, self.model.weights)

    def policy(self, name: str, share: float) -> tuple[Policy, Mapping[int, Any]]:
        """Return a policy and its calibrated centres."""
        calibrated = names(share)[name]
        if calibrated is None:
            return Policy.parse(FIXED[name.split(",")[0]], share), {}
        kind, rotated = calibrated
        budget = CacheBudget(share)
        select = Clusters(budget, calibrated=kind)
        if not rotated:
            select = Unrotated(budget, calibrated=kind, attention=self.attention)
        return Policy(select=select), self.centres(kind, rotated).arrays()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", type=Path, nargs="*", metavar="MODEL")
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--folder", type=Path, default=Path("runs/query-clusters"))
    parser.add_argument("--draw", action="store_true", help="only draw, from the existing file")
    given = parser.parse_args()
    path = HERE / "real.json"
    results: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    launch.prepare()
    mukv.register(Unrotated, name="unrotated")
    for place in given.models:
        measure(place, given.length, given.samples, given.folder, results, path)
    draw(results, HERE / "real.png")
    show(results)


def measure(
    place: Path, length: int, samples: int, folder: Path, results: dict[str, Any], path: Path
) -> None:
    """Measure the missing numbers of one model at one length, and write each at once."""
    found = results.setdefault(place.name, {}).setdefault(str(length), {"samples": samples})
    if found["samples"] != samples:
        raise SystemExit(f"{path} has {found['samples']} windows of {length} tokens")

    def save() -> None:
        write_atomic(path, json.dumps(results, indent=1) + "\n")

    wanted = {name: share for share in SHARES for name in names(share)}
    left = {text: [n for n in wanted if n not in found.get(text, {})] for text in subjects.TEXTS}
    if not any(left.values()):
        return
    subject = Subject(place, length, samples, folder)
    reader, read = subject.reader, subject.reader.read

    def bytes_read(policy: Policy, centres: Any) -> int:
        return reader.bytes_read(jax.eval_shape(lambda: reader.cache(1, policy, centres)))

    sizes = found.setdefault("bytes read", {"full": bytes_read(FULL, {})})
    for text, missing in left.items():
        if not missing:
            continue
        kept, tokens = found.setdefault(text, {}), subject.rows[text]
        prefilled = reader.record(tokens[:, :read])[:2]
        if "full" not in kept:
            kept["full"] = losses(reader, tokens, *prefilled, FULL, {})
        for name in missing:
            policy, centres = subject.policy(name, wanted[name])
            with noting():
                sizes.setdefault(name, bytes_read(policy, centres))
                kept[name] = losses(reader, tokens, *prefilled, policy, centres)
            save()
            say(f"{place.name}, {length}, {text}: {name}: {mean(more(kept, name)):+.3f}")


def losses(
    reader: PolicyReader, tokens: np.ndarray, logits: Any, record: Any, policy: Policy, centres: Any
) -> list[float]:
    """Return the mean loss of the last TAKEN tokens of every window, in nats.

    logits, record: of the prefilled tokens
    """
    cache, _ = reader.compressed(record, policy, centres, tokens[:, : reader.read])
    return reader.losses(logits, cache, tokens, lambda: None).mean(axis=1).tolist()


def more(found: dict[str, Any], name: str) -> list[float]:
    """Return how much more every window loses than with all entries, in nats a token."""
    return [one - full for one, full in zip(found[name], found["full"], strict=True)]


def draw(results: dict[str, Any], path: Path) -> None:
    """Draw the loss added by each policy, as the mean over texts, by model and length."""
    panels = [(m, length) for m, found in results.items() for length in found]
    panels = [(m, length) for m, length in panels if complete(results[m][length])]
    with saved_figure(path, (max(4.6 * len(panels), 9.2), 4.8)) as figure:
        row = figure.subplots(1, len(panels), squeeze=False)[0]
        for axes, (model, length) in zip(row, panels, strict=True):
            found = results[model][length]
            for number, one in enumerate(names(1)):
                policy, dashed = one.split(",")[0], "before" in one
                colour = number if number < len(FIXED) else len(FIXED) + (number - len(FIXED)) // 2
                lost = [
                    mean(x for t in complete(found) for x in more(found[t], named(policy, share)))
                    for share in SHARES
                ]
                axes.plot(
                    SHARES, lost, "--" if dashed else "-", marker="o", ms=3, color=f"C{colour}",
                    label=policy,
                )  # fmt: skip
            axes.set(xscale="log", title=f"{model}, {', '.join(complete(found))}")
            axes.set_yscale("symlog", linthresh=0.05)
            axes.set_ylim(bottom=0)
            axes.set_xticks(SHARES, [f"1/{round(1 / share)}" for share in SHARES])
            axes.set_yticks(NATS, map(str, NATS))
            axes.minorticks_off()
            axes.set(xlabel="share of entries read", ylabel="added loss, nats a token")
            axes.grid(alpha=0.3)
        handles = row[0].get_legend_handles_labels()
        figure.legend(*handles, loc="outside lower center", ncols=4, fontsize=8, handlelength=4)


def named(policy: str, share: float) -> str:
    return f"{policy}, 1/{round(1 / share)}"


def complete(found: dict[str, Any]) -> list[str]:
    """Return the texts on which all policies were measured."""
    every = [name for share in SHARES for name in names(share)]
    return [text for text in subjects.TEXTS if all(name in found.get(text, {}) for name in every)]


def show(results: dict[str, Any]) -> None:
    for model, lengths in results.items():
        for length, found in lengths.items():
            for name in (name for share in SHARES for name in names(share)):
                lost = [f"{text} {mean(more(found[text], name)):+.3f}" for text in complete(found)]
                say(f"{model}, {length}, {name}: {', '.join(lost)}")


if __name__ == "__main__":
    main()
