"""Cache policies: which entries are kept, how they are stored, which of them a query reads.

These are three independent fields; by default all entries are kept, stored exactly and read. The
choice of what is kept has further parts: `refine`, `spread`, `when` and `merge`. The name of a
policy joins its parts by "+", each with its parameters and its budget:
`snapkv(window=64):0.25+int8+topk`. A budget that is given separately applies to every part without
a budget of its own. Layers with a window are not affected.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import jax.numpy as jnp

from mukv.attention import Attention
from mukv.attention.mixer import ENTRIES
from mukv.cache.budget import CacheBudget
from mukv.cache.clusters import Clusters
from mukv.cache.keep import Everything, Keep
from mukv.cache.kept import Kept, empty
from mukv.cache.layers import PAGE
from mukv.cache.merge import Drop
from mukv.cache.replay import TWICE, KVzip
from mukv.cache.select import All, Select
from mukv.cache.spread import Uniform
from mukv.cache.store import Exact, Store
from mukv.cache.tables import ONCE, REFINERS, TABLES, name_of, part_of, question
from mukv.cache.values import TopK
from mukv.cache.when import Every, Folds
from mukv.cache.words import read_word, shown, split
from mukv.core.errors import BadInput
from mukv.core.typing import Array

Calibrated = Mapping[int, Mapping[str, Array]]
"""What is calibrated for a model, centres or predictors: arrays of each writing layer by index."""


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
        """Parse the name of a policy; the inverse of `str`.

        budget: budget of the parts that do not have their own
        where: name of the policy in errors

        Raises BadInput for unknown names and parameters, for values that don't fit, and for two
        parts of one kind.
        """
        found: dict[str, list[Any]] = {table.part: [] for table in TABLES}
        words = split(text, "+")
        if len(words) > 1 and not all(map(str.strip, words)):
            raise BadInput(where, text, "the name of a part on each side of +")
        for word in (read_word(word, where) for word in words):
            table, part = part_of(word, budget, where)
            if found[table.part] and table is not REFINERS:
                raise BadInput(where, text, f"at most one part that says {question(table)}")
            if type(part) in map(type, found[table.part]):
                raise BadInput(where, text, f"{word.name} once")
            found[table.part].append(part)
        refine, once = found.pop("refine"), {part: found.pop(part) for part in ONCE}
        policy = cls(**{question: part for question, parts in found.items() for part in parts})
        given = {part: parts[0] for part, parts in once.items() if parts}
        if not policy.keep.evicts:
            usual = Uniform(), Folds(), Drop()
            idle = [part for part in (*refine, *given.values()) if part not in usual]
            if idle:
                needs = f"{name_of(idle[0])} needs a policy that drops entries, like snapkv"
                raise BadInput(where, text, needs)
            return policy
        return replace(policy, keep=replace(policy.keep, refine=tuple(refine), **given))

    def __str__(self) -> str:
        """Return the name, with the parameters that are not at their defaults and the budgets."""
        return self._named(budgets=True)

    @property
    def name(self) -> str:
        """The name without budgets."""
        return self._named(budgets=False)

    def _named(self, budgets: bool) -> str:
        def word(part: Any) -> str:
            limit = part.budget.amount if budgets and part.has_budget else 1
            return shown(name_of(part), part, None if limit == 1 else limit)

        keep, usual = self.keep, type(self.keep)()
        once = [getattr(keep, step) for step in ONCE if getattr(keep, step) != getattr(usual, step)]
        parts = (keep, *keep.refine, *once, self.store, self.select)
        left_out = (Everything, Exact, All)
        return "+".join(word(part) for part in parts if type(part) not in left_out) or "full"

    @property
    def everything(self) -> bool:
        """Whether the policy has no effect."""
        return self.name == "full"

    @classmethod
    def takes_budget(cls, text: str, where: str = "policy") -> bool:
        """Whether a separately given budget has an effect. It has none if no part takes a budget,
        or each part has its own.
        """
        return cls.parse(text, 1.0, where) != cls.parse(text, 0.5, where)

    @property
    def budget(self) -> float:
        """The budget of kept entries, or, if all are kept, of read entries; 1 if all are read."""
        return (self.keep if self.keep.evicts else self.select).budget.amount

    def check(self, number: int, attention: Attention) -> None:
        """Raise BadInput, with the reason, if the policy does not fit a reading layer."""
        layer = f"layer {number}"
        if attention.position.sequential and (self.keep.evicts or self.select.skips_keys):
            raise BadInput(
                "policy",
                self.name,
                f"{layer} has the position encoding {attention.position.kind}, which depends on "
                "all entries between a query and a key, so that no entry may be dropped or "
                "skipped; int8, int4, fp8, rotated, think, topk and topp fit",
            )
        if isinstance(self.select, TopK) and not attention.values_apart:
            raise BadInput(
                "policy",
                self.name,
                f"{layer} makes keys and values of the same numbers ({attention.kind}), so that "
                "skipping values saves no reads; pages, clusters and sparq fit",
            )
        paced = [bag for bag in attention.bags.values() if bag.every > 1 and bag.window is None]
        if (self.keep.needs_queries or self.keep.rotates_back) and paced:
            raise BadInput(
                "policy",
                self.name,
                f"{layer} stores one entry per {paced[0].every} tokens ({attention.kind}), which "
                "can't be chosen by queries of tokens or by keys that are rotated back; streaming, "
                "random, knorm, keydiff, cur and lagkv fit",
            )
        if any(step.needs_weights for step in self.keep.refine):
            if self.keep.signed:
                allowed = (
                    f"a policy whose scores are at least 0, like snapkv, not {name_of(self.keep)}"
                )
                raise BadInput("policy", self.name, allowed)
            self._check_projection(layer, attention, "critical")
        if isinstance(self.keep, KVzip) and self.keep.plus:
            self._check_projection(layer, attention, "plus")
        self._check_layers()
        self.keep.check(self, layer, attention)
        if self.keep.spread.pools:
            shared = name_of(self.keep.spread)
            alone = self.keep.spread.over_layers and attention.key_heads == 1
            if attention.entry_sets == 1 and not alone:
                raise BadInput(
                    "policy",
                    self.name,
                    f"{layer} has one set of entries for all heads: {shared} needs one per head",
                )
            if not isinstance(self.select, All):
                raise BadInput(
                    "policy", self.name, f"{shared} is read whole: no select policy goes with it"
                )
            if self.store.needs_queries:
                allowed = f"the heads of a pool ({shared}) have no channels of their own"
                raise BadInput("policy", self.name, f"no {name_of(self.store)}: {allowed}")
        calibrated = isinstance(self.select, Clusters) and self.select.calibrated
        if calibrated and attention.entry_sets != attention.key_heads:
            raise BadInput(
                "policy",
                self.name,
                f"{layer} has one set of entries for all heads ({attention.kind}): calibrated "
                "centres, one set per head, don't fit; clusters of the prompt do",
            )

        plain = attention.values_apart and attention.keys == ("key",)
        for part, asks in (
            (self.keep.merge, self.keep.merge.changes),
            (self.store, self.store.needs_queries),
        ):
            if asks and not plain:
                allowed = f"{layer} does not store one key and one value per head"
                allowed = f"no {name_of(part)}: {allowed} ({attention.kind})"
                raise BadInput("policy", self.name, allowed)

    def _check_projection(self, layer: str, attention: Attention, part: str) -> None:
        """Raise BadInput for a layer without one output projection of all heads."""
        if "output" not in attention.output_params(1):
            allowed = f"{layer} projects its heads in several steps ({attention.kind})"
            raise BadInput("policy", self.name, f"no {part}: {allowed}")

    def _check_layers(self) -> None:
        """Raise BadInput for a budget over layers without scores that allow it, for a threshold at
        times that depend on the budget, and for scores from a second reading that can't be made
        again."""
        keep, allowed = self.keep, None
        if keep.spread.over_layers and not keep.replays:
            allowed = f"layers with scores that compare layers, those of kvzip, not {name_of(keep)}"
        elif keep.spread.over_layers and not all(step.before_sharing for step in keep.refine):
            step = next(step for step in keep.refine if not step.before_sharing)
            allowed = f"layers without {name_of(step)}"
        elif isinstance(keep.when, Every) and keep.by_threshold:
            part = next((step for step in keep.refine if step.before_sharing), keep)
            allowed = f"{name_of(part)} without every: it drops entries whatever their number"
        elif keep.replays and not keep.when.holds:
            allowed = f"{name_of(keep)}+hold: what follows the prompt has no scores"
        if allowed:
            raise BadInput("policy", self.name, allowed)

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
        after: int | None = None,
        kept: int | None = None,
    ) -> Kept:
        """Make an empty body for `length` entries.

        place: index of the layer among the layers with a policy, and their number
        centres: calibrated arrays of this layer; None for none
        bag: name of the mixer's store that holds these entries
        after: most entries of a row that follow its prompt; None if that is not known
        kept: entries that all heads together keep of a prompt, if layers share a budget

        Raises BadInput for a budget below the minimum of the policy.
        """
        whole, more = self.keep.when.room(length, after)
        keep = self.keep.of_attention(attention).of_layer(*place, whole)
        slots = keep.budget.of(whole) if keep.evicts else length
        if slots < keep.minimum:
            raise _too_small(self.name, keep.budget, slots, whole, keep.minimum)
        slots = min(slots + more, length)
        select = self.select.sized(slots)
        slots = -(-slots // math.lcm(self.store.multiple, select.run)) * math.lcm(
            self.store.multiple, select.run
        )
        read = select.budget.of(slots)
        if not select.budget.everything and read < select.minimum:
            raise _too_small(self.name, select.budget, read, slots, select.minimum)
        if isinstance(select, Clusters) and select.calibrated and not centres:
            allowed = "a model with calibrated centres: mukv analyze MODEL --calibrate keys"
            raise BadInput("policy", self.name, allowed)
        noted, given = keep.calibrated, dict(centres or {})
        noted = {name: given.pop(name) for name in noted if name in given}
        if not (isinstance(select, Clusters) and select.calibrated):
            given = {}
        pool = None
        if keep.spread.over_layers:
            if kept is None:
                raise BadInput("policy", self.name, TWICE)
            unit = math.lcm(PAGE, self.store.multiple)
            pool = -(-(kept + more * attention.key_heads) // unit) * unit
        parts = keep, self.store, select, given, bag, pool, noted
        return empty(attention, d_model, batch, slots, dtype, *parts)


FULL = Policy()


def _too_small(policy: str, budget: CacheBudget, entries: int, of: int, least: int) -> BadInput:
    return BadInput(
        "budget",
        budget.amount,
        f"{policy} must hold at least {least} entries; this is {entries} of {of}",
    )
