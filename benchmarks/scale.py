"""Find the best mesh of llama-3.1-8b and llama-3.1-70b on clusters by estimates, without devices.

Run: python benchmarks/scale.py > table.md

For each cluster, every size of the axis `tensor` up to 8, every policy of rematerialisation and
every number of pieces of the batch is estimated as `mukv describe --device` does. The script
prints, as Markdown, the one that fits and has the largest MFU without overlap. A step has at least
512 rows of 8,192 tokens, 4.2 million, and one row per device of the axis `data`.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

ROWS, LENGTH = 512, 8192
CLUSTERS = (("h100", 64), ("h100", 256), ("v5p", 64), ("v5p", 4096))
COLUMNS = (
    *("model", "devices", "mesh", "rows", "pieces", "rematerialise", "memory, GiB", "TFLOPs"),
    *("over data, GiB", "over tensor, GiB", "least s: products", "memory", "data", "tensor"),
    *("MFU at most", "without overlap", "limited by"),
)


class Setting(NamedTuple):
    """A point of the search: sizes of the mesh axes, pieces of the batch, and the policy."""

    data: int
    tensor: int
    pieces: int
    policy: bool | str


def settings(devices: int) -> Iterator[Setting]:
    """Yield every setting for this number of devices."""
    from mukv.runs.estimate import POLICIES

    for tensor in (1, 2, 4, 8):
        data = devices // tensor
        pieces = 1
        while pieces * data <= max(ROWS, data):
            for policy in POLICIES:
                yield Setting(data, tensor, pieces, policy)
            pieces *= 2


def best(preset: str, name: str, devices: int) -> list[str]:
    """Return the row of the table for one model and cluster."""
    from mukv.core.device import DEVICES, GIBIBYTE
    from mukv.core.mesh import MeshShape
    from mukv.runs import config
    from mukv.runs.estimate import Estimate

    device = DEVICES[name]
    changes = [f"train.length={LENGTH}", f"train.compute.platform={device.platform}"]
    start = Estimate(config.load(preset, changes), device)
    fitting: list[tuple[float, Setting, Estimate]] = []
    for one in settings(devices):
        run = start.run
        compute = replace(run.train.compute, rematerialise=one.policy)
        batch = max(ROWS, one.data)
        training = replace(run.train, batch=batch, accumulate=one.pieces, compute=compute)
        run = replace(run, mesh=MeshShape(one.data, one.tensor), train=training)
        found = replace(start, run=run)
        if found.fits(found.bytes(one.policy)):
            fitting.append((found.utilisation(overlap=False), one, found))
    if not fitting:
        return [preset, f"{devices:,} {name}", "does not fit", *[""] * (len(COLUMNS) - 3)]
    _, one, found = max(fitting, key=lambda row: row[0])
    moved, spent = found.collectives, found.seconds
    return [
        *(preset, f"{devices:,} {name}", f"{one.data} x {one.tensor}", f"{found.batch:,}"),
        *(str(one.pieces), str(one.policy).lower()),
        f"{sum(found.bytes(one.policy).values()) / GIBIBYTE:.1f}",
        f"{(found.flops + found.recomputed) / 1e12:,.0f}",
        *(f"{moved[axis] / GIBIBYTE:,.1f}" for axis in ("data", "tensor")),
        *(f"{spent[key]:.2f}" for key in ("compute", "memory", "data_links", "tensor_links")),
        f"{found.utilisation(overlap=True):.0%}",
        f"{found.utilisation(overlap=False):.0%}",
        found.limit.replace("_", " "),
    ]


def main() -> None:
    assert __doc__
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    models = ["llama-3.1-8b", "llama-3.1-70b"]
    parser.add_argument("--models", nargs="+", default=models, metavar="PRESET")
    given = parser.parse_args()
    numbers = ("memory, GiB", "TFLOPs", "rows", "pieces", "MFU at most", "without overlap")
    rule = ("---:" if name in numbers or "GiB" in name else "---" for name in COLUMNS)
    print(f"| {' | '.join(COLUMNS)} |", f"| {' | '.join(rule)} |", sep="\n")
    for preset in given.models:
        for name, devices in CLUSTERS:
            print(f"| {' | '.join(best(preset, name, devices))} |", flush=True)


if __name__ == "__main__":
    main()
