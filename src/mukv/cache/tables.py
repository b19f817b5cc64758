"""Tables of the parts of cache policies, by the names that they have in a policy's name."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from mukv.cache.attended import H2O, TOVA, SnapKV
from mukv.cache.budget import CacheBudget
from mukv.cache.by_key import KeyDiff, KeyNorm
from mukv.cache.by_value import CUR, LagKV, Leverage
from mukv.cache.chunks import WholeChunks
from mukv.cache.clusters import Clusters
from mukv.cache.compactor import Compactor
from mukv.cache.critical import Critical
from mukv.cache.dms import DMS
from mukv.cache.expected import Expected
from mukv.cache.fp8 import FP8
from mukv.cache.keep import Everything, Keep
from mukv.cache.kvzap import KVzap
from mukv.cache.layers import Layers
from mukv.cache.merge import Drop, Merge, Nearest
from mukv.cache.pages import Pages
from mukv.cache.positional import Random, Streaming
from mukv.cache.quantised import Int4, Int8
from mukv.cache.refine import Refine
from mukv.cache.replay import KVzip
from mukv.cache.rotated import Rotated
from mukv.cache.select import All, Select
from mukv.cache.sparq import SparQ
from mukv.cache.spread import Adaptive, Pyramid, Spread, Uniform
from mukv.cache.store import Exact, Store
from mukv.cache.think import ThinK
from mukv.cache.threshold import Threshold
from mukv.cache.values import TopK, TopP
from mukv.cache.when import Every, Folds, Hold, When
from mukv.cache.words import Word, built
from mukv.core.errors import BadInput, unknown_name
from mukv.core.table import PartTable, imported

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
        "lagkv": LagKV,
        "leverage": Leverage,
        "cur": CUR,
        "compactor": Compactor,
        "kvzip": KVzip,
        "kvzap": KVzap,
        "dms": DMS,
        "random": Random,
    },
    kinds=False,
)
STORES = PartTable(
    "store",
    Store,
    {"exact": Exact, "int8": Int8, "int4": Int4, "fp8": FP8, "rotated": Rotated, "think": ThinK},
    kinds=False,
)
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
SPREADS = PartTable(
    "spread",
    Spread,
    {"uniform": Uniform, "pyramid": Pyramid, "adaptive": Adaptive, "layers": Layers},
    kinds=False,
)
REFINERS = PartTable(
    "refine",
    Refine,
    {"threshold": Threshold, "critical": Critical, "chunk": WholeChunks},
    kinds=False,
)
WHENS = PartTable("when", When, {"folds": Folds, "hold": Hold, "every": Every}, kinds=False)
MERGES = PartTable("merge", Merge, {"drop": Drop, "merge": Nearest}, kinds=False)
TABLES: tuple[PartTable[Any], ...] = (KEEPERS, REFINERS, SPREADS, WHENS, MERGES, STORES, SELECTORS)
"""Parts of a policy, in the order in which its name has them."""
ONCE = ("spread", "when", "merge")
"""Parts that are fields of the policy that keeps entries, at most one of each."""
NAMES = tuple(name for table in TABLES for name in table)


def part_of(word: Word, budget: float, where: str) -> tuple[PartTable[Any], Any]:
    """Build the part that a word of a policy's name stands for; also return its table.

    budget: budget of a part that takes one and whose word has none
    where: name of the policy in errors

    Raises BadInput for unknown names and parameters, for values that don't fit, and for the budget
    of a part that takes none.
    """
    name = _imported(word.name, where)
    table = next((table for table in TABLES if name in table), None)
    if table is None:
        several = re.split(r"[\s,;&|/]+", name)
        if len(several) > 1 and all(part in NAMES for part in several):
            raise BadInput(where, name, "names of parts with + between them", "+".join(several))
        raise unknown_name(where, name, (name for table in TABLES for name in table))
    part = built(table[name], word, where)
    if part.has_budget:
        own = budget if word.budget is None else word.budget
        try:
            part = replace(part, budget=CacheBudget(own))
        except BadInput as error:
            raise BadInput(f"{where}: budget of {name}", own, error.allowed) from None
    elif word.budget is not None:
        allowed = f"{name} has no budget; it stands behind a part that has one"
        raise BadInput(where, word.text, f"{allowed}, as in snapkv:0.25+{name}")
    return table, part


def question(table: PartTable[Any]) -> str:
    """Return what the parts of a table decide, for errors."""
    return "when to choose entries" if table is WHENS else f"what to {table.part}"


def name_of(part: Any) -> str:
    """Return the name of a part in its table."""
    return next(name for table in TABLES for name, cls in table.items() if type(part) is cls)


def _imported(name: str, where: str) -> str:
    """Return the registered name of a part. A part of another package may be given by its dotted
    path, which is then imported.

    Raises BadInput for a path that can't be imported, and for a class that is no part of a policy.
    """
    if "." not in name or any(name in table for table in TABLES):
        return name
    cls = imported(name, where)
    for table in TABLES:
        if isinstance(cls, type) and issubclass(cls, table.base):
            cls = table.find(name, where)
            return next(known for known, other in table.items() if other is cls)
    bases = ", ".join(f"mukv.{table.base.__name__}" for table in TABLES)
    raise BadInput(where, name, f"a class that extends one of {bases}")
