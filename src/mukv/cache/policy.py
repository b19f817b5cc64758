"""Cache policies: which entries are kept, how they are stored, which of them a query reads.

These are three independent choices, each with the default "everything". A policy is named by its
choices, joined by "+": `snapkv+int8+topk`. A budget applies to every choice that has one;
`snapkv:0.5+topk:64` gives each its own. Layers with a window are not affected.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import jax.numpy as jnp

from mukv.attention import Attention
from mukv.attention.mixer import ENTRIES
from mukv.cache.attended import H2O, TOVA, SnapKV
from mukv.cache.budget import CacheBudget
from mukv.cache.by_key import KeyDiff, KeyNorm
from mukv.cache.clusters import Clusters
from mukv.cache.expected import Expected
from mukv.cache.keep import Everything, Keep, Spread
from mukv.cache.kept import Kept, empty
from mukv.cache.pages import Pages
from mukv.cache.positional import Random, Streaming
from mukv.cache.quantised import Int4, Int8
from mukv.cache.select import All, Select
from mukv.cache.sparq import SparQ
from mukv.cache.store import Exact, Store
from mukv.cache.values import TopK, TopP
from mukv.core.errors import BadInput, unknown_name
from mukv.core.table import PartTable, imported
from mukv.core.typing import Array

KEEPERS = PartTable(
    "keep",
    Keep,
    {
        "full": Everything,
        "streaming": Streaming,
        "snapkv": SnapKV,
        "h2o": H2O,
        "tova": TOVA,
        "knorm": KeyNorm,
        "keydiff": KeyDiff,
        "expected": Expected,
        "random": Random,
    },
    kinds=False,
)
STORES = PartTable("store", Store, {"exact": Exact, "int8": Int8, "int4": Int4}, kinds=False)
SELECTORS = PartTable(
    "select",
    Select,
    {
        "all": All,
        "topk": TopK,
        "topp": TopP,
        "sparq": SparQ,
        "pages": Pages,
        "clusters": Clusters,
    },
    kinds=False,
)
SPREADS: dict[str, Spread] = {"uniform": "uniform", "pyramid": "pyramid", "adaptive": "adaptive"}
Calibrated = Mapping[int, Mapping[str, Array]]
"""A model's calibrated centres: arrays of each writing layer, by its index."""
NAMES = (*KEEPERS, *STORES, *SELECTORS, *SPREADS)


@dataclass(frozen=True)
class Policy:
    """A cache policy.

    keep: which entries are kept
    store: how they are stored
    select: which of them a query reads
    """

    keep: Keep = field(default_factory=Everything)
    store: Store = field(default_factory=Exact)
    select: Select = field(default_factory=All)

    @classmethod
    def parse(cls, text: str, budget: float = 1.0, where: str = "policy") -> Policy:
        """Parse the name of a policy. Raises BadInput for unknown names and for two choices of one
        kind.

        budget: of the choices that do not have their own
        where: name of the policy in errors
        """
        answers: dict[str, Any] = {}
        for word in text.split("+"):
            name, _, own = word.strip().partition(":")
            name = _imported(name, where)
            amount = CacheBudget(_number(own, where, word) if own else budget)
            if name in KEEPERS:
                question, answer = "keep", KEEPERS[name](amount)
            elif name in STORES:
                question, answer = "store", STORES[name]()
            elif name in SELECTORS:
                question, answer = "select", SELECTORS[name](amount)
            elif name in SPREADS:
                question, answer = "spread", SPREADS[name]
            else:
                raise unknown_name(where, name, (*KEEPERS, *STORES, *SELECTORS, *SPREADS))
            if own and not hasattr(answer, "budget"):
                raise BadInput(where, word, f"{name} has no budget")
            if question in answers:
                raise BadInput(where, text, f"at most one part that says what to {question}")
            answers[question] = answer
        spread = answers.pop("spread", "uniform")
        policy = cls(**answers)
        if spread == "uniform":
            return policy
        if not policy.keep.evicts:
            raise BadInput(where, text, f"{spread} needs a policy that drops entries, like snapkv")
        return replace(policy, keep=replace(policy.keep, spread=spread))

    def __str__(self) -> str:
        """Return the name without budgets."""
        tables = ((KEEPERS, self.keep), (STORES, self.store), (SELECTORS, self.select))
        names = [next(n for n, t in table.items() if type(part) is t) for table, part in tables]
        if self.keep.spread != "uniform":
            names.insert(1, self.keep.spread)
        return "+".join(n for n in names if n not in ("full", "exact", "all")) or "full"

    @property
    def everything(self) -> bool:
        """Whether the policy has no effect."""
        return str(self) == "full"

    @classmethod
    def takes_budget(cls, text: str, where: str = "policy") -> bool:
        """Whether the separately given budget has an effect: not if no choice has a budget, or each
        has its own.
        """
        return cls.parse(text, 1.0, where) != cls.parse(text, 0.5, where)

    @property
    def budget(self) -> float:
        """The budget of kept entries, or else of read entries; 1 without either."""
        return (self.keep if self.keep.evicts else self.select).budget.amount

    def check(self, number: int, attention: Attention) -> None:
        """Raise BadInput, with the reason, if the policy does not fit a reading layer."""
        layer = f"layer {number}"
        if attention.position.sequential and (self.keep.evicts or self.select.skips_keys):
            raise BadInput(
                "policy",
                str(self),
                f"{layer} has the position encoding {attention.position.kind}, which depends on "
                "all entries between a query and a key, so that no entry may be dropped or "
                "skipped; int8, int4, topk and topp fit",
            )
        if isinstance(self.select, TopK) and not attention.values_apart:
            raise BadInput(
                "policy",
                str(self),
                f"{layer} makes keys and values of the same numbers ({attention.kind}), so that "
                "skipping values saves no reads; pages, clusters and sparq fit",
            )
        paced = [bag for bag in attention.bags.values() if bag.every > 1 and bag.window is None]
        if self.keep.needs_queries and paced:
            raise BadInput(
                "policy",
                str(self),
                f"{layer} stores one entry per {paced[0].every} tokens ({attention.kind}), which "
                "can't be chosen by queries of tokens; streaming, random, knorm and keydiff fit",
            )
        if self.keep.spread == "adaptive":
            if attention.entry_sets == 1:
                raise BadInput(
                    "policy",
                    str(self),
                    f"{layer} has one set of entries for all heads: adaptive needs one per head",
                )
            if not isinstance(self.select, All):
                raise BadInput(
                    "policy", str(self), "adaptive is read whole: no select policy goes with it"
                )
        calibrated = isinstance(self.select, Clusters) and self.select.calibrated
        if calibrated and attention.entry_sets != attention.key_heads:
            raise BadInput(
                "policy",
                str(self),
                f"{layer} has one set of entries for all heads ({attention.kind}): calibrated "
                "centres, one set per head, don't fit; clusters of the prompt do",
            )

    def body(
        self,
        attention: Attention,
        d_model: int,
        batch: int,
        length: int,
        dtype: jnp.dtype,
        place: tuple[int, int],
        centres: Mapping[str, Array] | None = None,
        bag: str = ENTRIES,
    ) -> Kept:
        """Make an empty body for `length` entries.

        place: index of the layer among the layers with a policy, and their number
        centres: calibrated centres of this layer; None for none
        bag: name of the mixer's store that holds these entries

        Raises BadInput for a budget below what the policy must hold.
        """
        keep = self.keep
        if keep.spread == "pyramid":
            keep = replace(keep, budget=keep.budget.pyramid(*place))
        slots = keep.budget.of(length) if keep.evicts else length
        if slots < keep.minimum:
            raise _too_small(self, keep.budget, slots, length, keep.minimum)
        select = self.select.sized(slots)
        slots = -(-slots // math.lcm(self.store.multiple, select.run)) * math.lcm(
            self.store.multiple, select.run
        )
        read = select.budget.of(slots)
        if not select.budget.everything and read < select.minimum:
            raise _too_small(self, select.budget, read, slots, select.minimum)
        given = dict(centres or {}) if isinstance(select, Clusters) and select.calibrated else {}
        return empty(attention, d_model, batch, slots, dtype, keep, self.store, select, given, bag)


FULL = Policy()


def _imported(name: str, where: str) -> str:
    """The name in a table of a part of another package, which may be given as its dotted path.

    Raises BadInput for a path that can't be imported, and for a class that is no part of a policy.
    """
    tables = (KEEPERS, STORES, SELECTORS)
    if "." not in name or any(name in table for table in tables):
        return name
    cls = imported(name, where)
    for table in tables:
        if isinstance(cls, type) and issubclass(cls, table.base):
            cls = table.find(name, where)
            return next(known for known, other in table.items() if other is cls)
    raise BadInput(where, name, "a class that extends mukv.Keep, mukv.Store or mukv.Select")


def _too_small(policy: Policy, budget: CacheBudget, entries: int, of: int, least: int) -> BadInput:
    return BadInput(
        "budget",
        budget.amount,
        f"{policy} must hold at least {least} entries; this is {entries} of {of}",
    )


def _number(text: str, where: str, word: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise BadInput(where, word, "a number behind the colon, such as snapkv:0.5") from None
