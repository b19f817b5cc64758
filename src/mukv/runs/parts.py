"""Register parts from outside of the package (`mukv.register`)."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, overload

from mukv.attention import ATTENTIONS
from mukv.cache.tables import TABLES as POLICY
from mukv.conversion import CONVERSIONS
from mukv.core.errors import BadInput
from mukv.core.table import PartTable, check_name, path_of
from mukv.data.sources import FORMATS, SOURCES
from mukv.hub import FAMILIES
from mukv.hub.family import Family
from mukv.model import MODELS
from mukv.model.block import RESIDUALS
from mukv.model.concept import CHUNKERS, INJECTIONS, POOLS
from mukv.model.feedforward import FEEDFORWARDS
from mukv.position import POSITIONS
from mukv.position.rope_scaling import SCALINGS
from mukv.scaling.budget import BUDGETS
from mukv.scaling.optimizers import OPTIMIZERS
from mukv.scaling.rows import Parameterization, add_row
from mukv.scaling.schedules import SCHEDULES
from mukv.tasks import TASK_KINDS, TASKS
from mukv.train.adapters import ADAPTERS
from mukv.train.metrics import TRACKERS

TABLES: tuple[PartTable[Any], ...] = (
    *(ATTENTIONS, POSITIONS, SCALINGS, FEEDFORWARDS, RESIDUALS, MODELS),
    *(CHUNKERS, POOLS, INJECTIONS, SCHEDULES, OPTIMIZERS, BUDGETS, TASK_KINDS),
    ADAPTERS,
    *POLICY,
    CONVERSIONS,
)


@overload
def register(part: Any, *, name: str | None = None) -> Any: ...


@overload
def register(part: None = None, *, name: str | None = None) -> Callable[[Any], Any]: ...


def register(part: Any = None, *, name: str | None = None) -> Any:
    """Register a part of another package, so that YAML, overrides and options can name it. Can be
    used as a decorator.

    part: one of
        - a frozen dataclass that extends a base class such as `mukv.Attention`, `mukv.Position`,
          `mukv.Feedforward`, `mukv.Schedule`, `mukv.Optimizer` or `mukv.Task`, with its name in a
          field `kind`
        - a part of a cache policy: `mukv.Keep`, `mukv.Refine`, `mukv.Spread`, `mukv.When`,
          `mukv.Merge`, `mukv.Store` or `mukv.Select`
        - a `mukv.Conversion`, `mukv.Parameterization` or `mukv.Family`
        - a tracker: a class with the methods `log` and `close`
        - a function that reads a text source or, if `name` begins with a dot, a file format
    name: name of a part that has no field `kind`

    Returns the part. Raises BadInput for a name in use, for another base class, for a class that is
    not a frozen dataclass, and for a missing `kind` or name.
    """
    if part is None:
        return lambda given: register(given, name=name)
    where = f"register {getattr(part, '__name__', type(part).__name__)}"
    if isinstance(part, Parameterization):
        add_row(part, _given(where, name))
    elif isinstance(part, Family):
        _put(FAMILIES, where, name or part.architecture, part)
    elif inspect.isclass(part):
        _register_class(part, name, where)
    elif inspect.isfunction(part) and name is not None and name.startswith("."):
        _put(FORMATS, where, name, part)
    elif inspect.isfunction(part):
        _put(SOURCES, where, _given(where, name), part)
    else:
        raise _no_part(where, part)
    return part


def _register_class(part: type, name: str | None, where: str) -> None:
    table = next((table for table in TABLES if issubclass(part, table.base)), None)
    if table is None:
        if not all(callable(getattr(part, method, None)) for method in ("log", "close")):
            raise _no_part(where, part)
        _put(TRACKERS, where, _given(where, name), part)
        return
    if table in POLICY and name is not None:
        taken = next((t[name] for t in POLICY if name in t and t is not table), None)
        if taken is not None:
            raise BadInput(f"{where}: name", name, "another name: a policy has this one")
    table.add(part, name)
    if table is TASK_KINDS:
        try:
            TASKS[part().kind] = part()
        except TypeError:
            del table[part.kind]
            raise BadInput(where, part, "a task whose fields have defaults") from None


def _given(where: str, name: str | None) -> str:
    if name is None:
        raise BadInput(f"{where}: name", None, "a name: mukv.register(part, name=...)")
    check_name(where, name)
    return name


def _put(table: dict[str, Any], where: str, name: str, part: Any) -> None:
    there = table.get(name)
    if there is not None and (isinstance(part, Family) or path_of(there) != path_of(part)):
        raise BadInput(f"{where}: name", name, "another name: this one is in use")
    table[name] = part


def _no_part(where: str, part: Any) -> BadInput:
    bases = ", ".join(f"mukv.{table.base.__name__}" for table in TABLES)
    return BadInput(
        where, part, f"a class that extends one of {bases}; a tracker, a family or a text source"
    )
