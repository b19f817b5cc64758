"""The policies that are compared, each with a budget of entries or of bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mukv.cache import FULL, Calibrated, Policy
from mukv.cache.budget import FINEST
from mukv.cache.words import split
from mukv.compress.reader import PolicyReader
from mukv.core.errors import BadInput
from mukv.runs.loaded import Model

BUDGETS = (0.25,)
"""Budgets where none is given."""


@dataclass(frozen=True)
class Candidate:
    """A policy with a budget.

    budget: share of the entries or number of entries, as given or as computed from bytes
    centres: its calibrated centres
    cache_bytes: of one row; None if they depend on the scores of a text
    """

    policy: Policy
    budget: float
    centres: Calibrated
    cache_bytes: int | None

    def __str__(self) -> str:
        return f"{self.policy.name} {self.budget:g}"


def fits_bytes(name: str) -> bool:
    """Whether the bytes of a policy depend on a budget that is not part of its name."""
    return Policy.parse(name, 1.0).keep != Policy.parse(name, 0.5).keep


def candidates(
    model: Model,
    reader: PolicyReader,
    names: str,
    budgets: Sequence[float] = (),
    shares: Sequence[float] = (),
) -> list[Candidate]:
    """Return `full`, then each policy with each budget, once where the budget has no effect.

    names: policies, separated by commas
    budgets: shares of the entries up to 1, or numbers of entries
    shares: bytes as shares of those of the full cache. The budget of each policy is the largest
        one, in thousandths, with which it takes at most these bytes. Policies whose bytes depend on
        no budget get `budgets`.

    Without either, the budgets are BUDGETS. Raises BadInput for unknown policies, and for those
    that do not fit the model or the number of bytes.
    """
    made = [_candidate(model, reader, FULL, 1.0)]
    for share in shares:
        if not 0 < share <= 1:
            raise BadInput(
                "--bytes", share, "a share of the full cache's bytes: above 0, at most 1"
            )
    for name in split(names, ","):
        takes, solvable = Policy.takes_budget(name, "--policy"), fits_bytes(name)
        for budget in budgets or (() if shares and solvable else BUDGETS):
            policy = Policy.parse(name, budget, "--policy")
            made.append(_candidate(model, reader, policy, budget if takes else policy.budget))
        for share in shares if solvable else ():
            made.append(_fitted(model, reader, name, share))
    unique: dict[tuple[Policy, float], Candidate] = {}
    for each in made:
        unique.setdefault((each.policy, each.budget), each)
    return list(unique.values())


def _candidate(model: Model, reader: PolicyReader, policy: Policy, budget: float) -> Candidate:
    chosen, centres = model.calibrated(policy)
    return Candidate(chosen, budget, centres, reader.cache_bytes(chosen, centres))


def _fitted(model: Model, reader: PolicyReader, name: str, share: float) -> Candidate:
    """Return the policy with the largest budget whose cache takes at most a share of the bytes of
    the full cache."""
    best, low, high = None, 1, FINEST
    least: int | None = None
    full = reader.cache_bytes(FULL, {})
    assert full is not None
    while low <= high:
        middle = (low + high) // 2
        try:
            policy = Policy.parse(name, middle / FINEST)
            found = _candidate(model, reader, policy, middle / FINEST)
        except BadInput as error:
            if error.where != "budget":
                raise
            low = middle + 1  # too few entries for the policy
            continue
        if found.cache_bytes is None:
            raise BadInput("--bytes", share, f"not with {name}, whose bytes depend on the text")
        if found.cache_bytes <= share * full:
            best, low = found, middle + 1
        else:
            least, high = found.cache_bytes, middle - 1
    if best is None:
        taken = "" if least is None else f": at least {least / full:.3f} of it"
        raise BadInput("--bytes", share, f"more, for {name} at this length{taken}")
    return best
