"""Offer the sizes of the ladder (presets `ladder-1m` to `ladder-1b`) as the option `--size`.

At a size, a finding trains the preset of that size for 20 tokens per parameter. The base of each
variant's scaling is the same variant at the first size, so that learning rates tuned there are
carried. Before anything is trained, memory and hours are estimated and printed; a size that does
not fit the machine is refused.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from string import Template

import yaml
from rich.console import Console

from mukv.core.errors import BadInput
from mukv.core.names import gibibytes
from mukv.core.params import count
from mukv.data.build import build_tokens, speed_meter
from mukv.data.tokens import TokenFile, open_tokens
from mukv.model import Decoder
from mukv.runs import config
from mukv.runs.config import Run
from mukv.runs.estimate import Estimate
from mukv.scaling.parameterization import sizes
from mukv.train.footprint import this_machine

PREFIX = "ladder-"
SIZES = sorted(
    (name.removeprefix(PREFIX) for name in config.presets() if name.startswith(PREFIX)),
    key=lambda size: float(size[:-1]) * {"m": 1, "b": 1000}[size[-1]],
)
FIRST = SIZES[0]
CORPUS = Path("runs/ladder/corpus")
SOURCES = ("stdlib", "package:numpy", "package:scipy", "package:jax")
"""Sources of the text: Python code of packages that mukv depends on, as bytes."""
EPOCHS = 4
"""Largest number of times that a text is read; repeating it so often costs little (Muennighoff et
al. 2023)."""
HOURS = 72.0
"""Estimated hours beyond which a command is refused without --hours."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add --size, --data and --hours."""
    parser.add_argument("--size", choices=SIZES, help="a size of the ladder")
    parser.add_argument("--data", type=Path, help=f"token file for --size; default: {CORPUS}")
    parser.add_argument(
        "--hours", type=float, default=HOURS, help="refuse a size that takes longer; default: 72"
    )


def preset(size: str) -> str:
    """Return the name of the preset of a size."""
    return f"{PREFIX}{size}"


def named(path: Path, size: str | None) -> Path:
    """Return the path of a file of results at a size: results.json becomes results-3m.json."""
    return path if size is None else path.with_stem(f"{path.stem}-{size}")


def words(size: str) -> dict[str, int]:
    """Return the sizes that replace `$`-words in the variants of a file."""
    model = config.load(preset(size)).model
    assert isinstance(model, Decoder)
    attention = model.attention
    return {
        "heads": attention.heads,
        "head_dim": attention.head_dim,
        "layers": len(model.layers),
    }


def filled(given: Sequence[str], stated: Mapping[str, int]) -> list[str]:
    """Replace `$`-words in overrides: heads, head_dim and layers, and parts of them.

    stated: heads, head_dim and layers
    """
    known = dict(stated)
    for name, size in stated.items():
        known |= {f"half_{name}": size // 2, f"third_{name}": size // 3, f"twice_{name}": 2 * size}
    return [Template(each).substitute(known) for each in given]


def first(path: Path) -> Path:
    """Return the results of the first size. Raises BadInput if there are none yet."""
    if not path.exists():
        allowed = f"{FIRST} first, where the rates are tuned: {path} is not there"
        raise BadInput("--size", "a larger size", allowed)
    return path


SET_BY_SIZE = (
    *("model.d_model", "model.attention", "model.mlp.hidden"),
    *("train.steps", "train.batch", "train.length", "train.schedule", "train.evaluate_every"),
)
"""Keys whose overrides for all variants are left out at a size: its preset sets them."""


def around(rates: Sequence[float]) -> tuple[float, ...]:
    """Return rates for a sweep: those of a file, or octaves around its only one."""
    if len(rates) > 1:
        return tuple(rates)
    return tuple(rates[0] * factor for factor in (0.25, 0.5, 1.0, 2.0))


def kept(overrides: Sequence[str]) -> list[str]:
    """Return the overrides that a size leaves as they are."""
    return [each for each in overrides if each.partition("=")[0] not in SET_BY_SIZE]


def carried(overrides: Sequence[str]) -> list[str]:
    """Return overrides with a base for scaling: the sizes of the same variant at the first size."""
    alone = [*overrides, "model.scaling.base=null", "model.scaling.depth=null"]
    model = config.load(preset(FIRST), alone).model
    base = sizes(model.params()) | {"layer": len(model.layers)}
    return [*overrides, "model.scaling.base=null", f"model.scaling.base={yaml_line(base)}"]


def yaml_line(mapping: Mapping[str, object]) -> str:
    """Format a mapping as one line of YAML."""
    text = yaml.safe_dump(dict(mapping), default_flow_style=True, sort_keys=False, width=10**6)
    return text.strip()


def corpus(given: Path | None) -> TokenFile:
    """Open the token file of --data, or the one of installed packages, built on first use."""
    if given is not None:
        return open_tokens(given)
    if CORPUS.exists():
        return open_tokens(CORPUS)
    with speed_meter("text of the ladder", Console(stderr=True)) as report:
        return build_tokens(SOURCES, CORPUS, report=report)


def tokens_of(run: Run) -> int:
    """Return the number of tokens that a run is trained on."""
    return run.train.steps * run.train.batch * run.train.length


def require_text(run: Run, text: TokenFile) -> None:
    """Raise BadInput for a text that a run would read more than EPOCHS times."""
    held, needed = text.split("train").tokens.size, tokens_of(run)
    if needed > EPOCHS * held:
        allowed = (
            f"a token file of at least {-(-needed // EPOCHS):,} tokens (this size reads "
            f"{needed:,}, each at most {EPOCHS} times); this one has {held:,}. "
            "`mukv data hf:NAME --limit SIZE` makes one"
        )
        raise BadInput("--data", str(text.path), allowed)


def require_fits(size: str, run: Run, runs: int, at_once: int, hours: float) -> None:
    """Print the estimated memory and hours of a comparison; raise BadInput if they do not fit.

    runs: number of runs to be trained, like `run`
    at_once: number of them that are trained at the same time
    hours: the largest estimate that is accepted
    """
    machine = this_machine()
    found = Estimate(replace(run, mesh=config.MeshShape()), machine)
    bytes_each = sum(found.bytes(found.compute.rematerialise).values())
    seconds = max(found.seconds["compute"], found.seconds["memory"]) * run.train.steps
    total = seconds * runs / 3600
    Console(stderr=True).print(
        f"{preset(size)}: {count(run.model.params()):,} parameters, {tokens_of(run):,} tokens; "
        f"{runs} runs of {gibibytes(bytes_each)} and at least {seconds / 3600:,.1f} hours each, "
        f"{total:,.1f} hours in all on {machine.kind}",
        soft_wrap=True,
    )
    if bytes_each * at_once > machine.memory:
        allowed = (
            f"a size that fits: {at_once} at once take {gibibytes(bytes_each * at_once)} of "
            f"memory, and {gibibytes(machine.memory)} are free"
        )
        raise BadInput("--size", size, allowed)
    if total > hours:
        allowed = f"a size of at most {hours:g} hours (this one: {total:,.1f}), or a larger --hours"
        raise BadInput("--size", size, allowed)


def told(main: Callable[[], None]) -> None:
    """Run a command; print a BadInput as one line and exit with status 2."""
    try:
        main()
    except BadInput as error:
        Console(stderr=True).print(str(error), soft_wrap=True)
        sys.exit(2)
