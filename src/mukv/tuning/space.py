"""Parse the search space of a sweep: `key=LOW..HIGH[:log][:COUNT]`, or `key=A,B,C`.

All other arguments are ordinary overrides, which hold for all trials.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np

from mukv.core.errors import BadInput
from mukv.schema.yaml_text import parse_yaml

INTERVAL = re.compile(
    r"(?P<low>(?!\.\.)[^.:,\[{/]*(?:\.\d[^.:,/]*)?)\.\.(?P<high>[^:,/]+)(?P<rest>(?::\w+)*)"
)
FORM = "LOW..HIGH, LOW..HIGH:log, LOW..HIGH:log:COUNT, or values separated by commas"


@dataclass(frozen=True)
class Interval:
    """Numbers from low to high.

    log: whether the scale is logarithmic
    count: number of values in a grid; None if none is given
    """

    low: float
    high: float
    log: bool = False
    count: int | None = None

    @property
    def whole(self) -> bool:
        """Whether only integers are in the interval."""
        return isinstance(self.low, int) and isinstance(self.high, int)

    @property
    def values(self) -> tuple[Any, ...] | None:
        """The values of the grid; None without `count`."""
        if self.count is None:
            return None
        shares = np.linspace(0, 1, self.count).tolist()
        return tuple(dict.fromkeys(self.at(share) for share in shares))

    def at(self, share: float) -> float:
        """Return the number at a fraction of the way from low to high."""
        if self.log:
            value = self.low * (self.high / self.low) ** share
        else:
            value = self.low + (self.high - self.low) * share
        return round(value) if self.whole else value

    def suggest(self, trial: Any, name: str) -> Any:
        """Let an Optuna trial choose a value."""
        pick = trial.suggest_int if self.whole else trial.suggest_float
        return pick(name, self.low, self.high, log=self.log)


@dataclass(frozen=True)
class Choice:
    """One of several values."""

    values: tuple[Any, ...]

    def at(self, share: float) -> Any:
        """Return the value at a fraction of the way through the values."""
        return self.values[min(int(share * len(self.values)), len(self.values) - 1)]

    def suggest(self, trial: Any, name: str) -> Any:
        """Let an Optuna trial choose a value."""
        return trial.suggest_categorical(name, self.values)


Space = dict[str, Interval | Choice]


def split(given: Sequence[str]) -> tuple[Space, list[str]]:
    """Split arguments into the search space, by key, and the overrides that hold for all trials.
    Raises BadInput."""
    space: Space = {}
    fixed: list[str] = []
    for item in given:
        key, equals, text = item.partition("=")
        part = _range(key, text) if equals else None
        if part is None:
            fixed.append(item)
        elif key in space:
            raise BadInput(key, text, "a key may be given only once")
        else:
            space[key] = part
    if not space:
        raise BadInput("sweep", " ".join(given) or "no range", f"at least one key={FORM}")
    return space, fixed


SEED = "train.seed"
MOST_SEEDS = 64


def without_seeds(space: Space, seed: int) -> tuple[Space, tuple[int, ...]]:
    """Return the space without `train.seed`, and the seeds with which each of its points is
    trained.

    Results are averaged over seeds, since choosing the best of several seeds would select by
    chance.

    seed: the only seed if the space has no `train.seed`

    Raises BadInput for seeds that are not whole numbers.
    """
    part = space.get(SEED)
    if part is None:
        return space, (seed,)
    values = part.values
    if isinstance(part, Interval) and values is None and part.whole:
        if part.high - part.low >= MOST_SEEDS:
            given = f"{part.low}..{part.high}"
            raise BadInput(SEED, given, f"at most {MOST_SEEDS} seeds, as 0..3 or 0,1,2,3")
        values = tuple(range(int(part.low), int(part.high) + 1))
    if not values or not all(type(value) is int for value in values):
        raise BadInput(SEED, str(part), "whole numbers, as 0..3 or 0,1,2,3")
    return {name: other for name, other in space.items() if name != SEED}, values


def at_edge(part: Interval | Choice, value: Any) -> bool:
    """Return whether a value is at an end of the searched range, so that the optimum may be beyond
    it. False for values without an order."""
    if isinstance(part, Interval) and part.values is None:
        share = (value - part.low) / (part.high - part.low)
        if part.log:
            share = math.log(value / part.low) / math.log(part.high / part.low)
        return not 0.05 <= share <= 0.95
    values = part.values or ()
    numeric = all(type(each) in (int, float) for each in values)
    return numeric and len(values) > 1 and value in (min(values), max(values))


def _range(key: str, text: str) -> Interval | Choice | None:
    match = INTERVAL.fullmatch(text.strip())
    if match:
        return _interval(key, text, match)
    if ".." in text and not text.lstrip().startswith(("[", "{", "'", '"')) and "/" not in text:
        raise BadInput(key, text, FORM)
    parts = _parts(text)
    if len(parts) < 2:
        return None
    values = tuple(parse_yaml(part, key) for part in parts)
    for value in values:
        if isinstance(value, dict | list) or value is None:
            raise BadInput(key, text, "plain values between the commas")
    if len(set(values)) < len(values):
        raise BadInput(key, text, "distinct values")
    return Choice(values)


def _interval(key: str, text: str, match: re.Match[str]) -> Interval:
    ends = [parse_yaml(match[name], key) for name in ("low", "high")]
    if not all(isinstance(end, int | float) and not isinstance(end, bool) for end in ends):
        raise BadInput(key, text, FORM)
    low, high = ends
    if not all(map(math.isfinite, ends)) or low >= high:
        raise BadInput(key, text, f"LOW below HIGH (did you mean {high}..{low}{match['rest']}?)")
    log, count = False, None
    for option in match["rest"].split(":")[1:]:
        if option == "log":
            log = True
        elif option.isdecimal() and int(option) >= 2:
            count = int(option)
        else:
            raise BadInput(key, text, f"{FORM}; COUNT at least 2")
    if log and low <= 0:
        raise BadInput(key, text, "LOW greater than 0 on a logarithmic scale")
    return Interval(low, high, log, count)


def _parts(text: str) -> list[str]:
    """Split at commas outside of brackets and quotes."""
    depth, quote, parts = 0, "", [""]
    for letter in text:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"":
            quote = letter
        depth += (letter in "[{(") - (letter in "]})")
        if letter == "," and not depth and not quote:
            parts.append("")
        else:
            parts[-1] += letter
    return parts


def grid(space: Space) -> list[dict[str, Any]]:
    """Return every combination. Raises BadInput for an interval without a count."""
    for name, part in space.items():
        if part.values is None:
            given = f"{part.at(0)}..{part.at(1)}"
            raise BadInput(name, given, f"{given}:COUNT for a grid, or another --sampler")
    values = [part.values or () for part in space.values()]
    return [dict(zip(space, each, strict=True)) for each in product(*values)]


def random(space: Space, seed: int) -> Iterator[dict[str, Any]]:
    """Yield points without end; point i depends only on the seed and i."""
    number = 0
    while True:
        shares = np.random.default_rng([seed, number]).random(len(space)).tolist()
        pairs = zip(space.items(), shares, strict=True)
        yield {name: part.at(share) for (name, part), share in pairs}
        number += 1


def corners(space: Space) -> list[dict[str, Any]]:
    """Return the points at the low ends and at the high ends of all ranges, to be checked before
    any trial."""
    return [{name: part.at(share) for name, part in space.items()} for share in (0.0, 1.0)]
