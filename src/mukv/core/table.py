"""Tables of classes by name, which classes of other packages can join.

A field with the annotation `Annotated[Base, TABLE]` takes every class of the table, chosen by
`kind` in YAML; the table alone defines the allowed names. A class of another package is also found
by its dotted path (`my_package.my_module.MyAttention`), and is imported on use.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from importlib import import_module
from typing import Any, Generic, Literal, TypeVar, get_args, get_origin, get_type_hints

from mukv.core.errors import BadInput, Failed, unknown_name

T = TypeVar("T")
OURS = __name__.partition(".")[0]


class Component:
    """Base of the base classes of a table whose classes have a field `kind: Literal["name"]`."""

    kind: Any


class Names(dict[str, T], Generic[T]):
    """Values by the names that a field with the annotation `Annotated[str, NAMES]` takes."""

    __hash__ = object.__hash__  # pyright: ignore[reportAssignmentType]

    def __eq__(self, other: object) -> bool:
        return self is other


class PartTable(Names[type[T]], Generic[T]):
    """Classes of one kind of part, by their names in YAML.

    part: what the classes are, such as "attention"
    base: class that all of them extend
    kinds: whether each class states its name in a field `kind`
    """

    def __init__(
        self, part: str, base: type[T], classes: Mapping[str, type[T]], kinds: bool = True
    ) -> None:
        super().__init__(classes)
        self.part, self.base, self.kinds = part, base, kinds

    def add(self, cls: Any, name: str | None = None) -> None:
        """Add a class of another package; a class with the same path is replaced (after a reload).

        name: name of a class that has no field `kind`. Raises BadInput for a class that does not
            extend the base or is not a frozen dataclass, for a missing or invalid `kind`, and for a
            name in use.
        """
        where = f"register {getattr(cls, '__name__', cls)}"
        self._check(cls, where)
        if self.kinds and name is not None and name != kind_of(cls):
            raise BadInput(f"{where}: name", name, f"none: its `kind` is {kind_of(cls)!r}")
        name = kind_of(cls) if self.kinds else name
        if name is None:
            allowed = 'a field such as kind: Literal["mine"] = "mine"' if self.kinds else "a name"
            raise BadInput(f"{where}: {'kind' if self.kinds else 'name'}", None, allowed)
        check_name(where, name)
        there = self.get(name)
        if there is not None and path_of(there) != path_of(cls):
            raise BadInput(f"{where}: name", name, f"another name: {path_of(there)} has this one")
        self[name] = cls

    def _check(self, cls: Any, where: str) -> None:
        """Raise BadInput unless `cls` extends the base and is a frozen dataclass itself."""
        if not inspect.isclass(cls) or not issubclass(cls, self.base):
            allowed = f"a class that extends mukv.{self.base.__name__}"
            raise BadInput(where, cls, allowed)
        parameters = getattr(cls, "__dataclass_params__", None)
        own = "__dataclass_fields__" in vars(cls)
        if not is_dataclass(cls) or not own or not (parameters and parameters.frozen):
            raise BadInput(where, cls, "a frozen dataclass: write @dataclass(frozen=True) above it")

    def find(self, name: str, where: str) -> type[T]:
        """Return the class with this name or dotted path; a class that had to be imported joins the
        table.

        where: field of the configuration, for errors. Raises BadInput for an unknown name, for a
            path that can't be imported, and for a class that does not fit.
        """
        if name in self:
            return self[name]
        for cls in self.values():
            if path_of(cls) == name:
                return cls
        if "." not in name:
            raise unknown_name(where, name, self)
        cls = imported(name, where)
        try:
            self.add(cls, None if self.kinds else name)
        except BadInput as error:
            raise BadInput(where, name, f"{error.allowed} ({error.where})") from None
        return cls


def kind_of(cls: type) -> str | None:
    """Return the name in a dataclass's field `kind: Literal[...]`; None if it has none."""
    if not any(field.name == "kind" for field in fields(cls)):
        return None
    try:
        hint = get_type_hints(cls)["kind"]
    except NameError:  # a name that is known to type checkers alone
        return getattr(cls, "kind", None)
    names = get_args(hint) if get_origin(hint) is Literal else ()
    return names[0] if len(names) == 1 and isinstance(names[0], str) else None


def check_name(where: str, name: str) -> None:
    """Raise BadInput for a name that could be confused with a path or a policy's option."""
    parts = name.split(".")
    if not all(part.isidentifier() for part in parts):
        allowed = "a name of letters, digits and _, such as my_attention"
        raise BadInput(f"{where}: name", name, allowed)


def path_of(part: Any) -> str:
    """Return the dotted path of a class or function: its module and its name there."""
    return f"{part.__module__}.{part.__qualname__}"


def from_outside(cls: type) -> bool:
    """Return whether a class is a `Component` of another package."""
    return issubclass(cls, Component) and cls.__module__.partition(".")[0] != OURS


def imported(path: str, where: str) -> Any:
    """Import the object that a dotted path names.

    where: field of the configuration, for errors. Raises BadInput if the module or the object does
        not exist, or if the module fails while it is imported.
    """
    module, _, name = path.rpartition(".")
    if not all(part.isidentifier() for part in path.split(".")):
        allowed = "the dotted path of a class that can be imported: package.module.Class"
        raise BadInput(where, path, allowed)
    try:
        found = import_module(module)
    except (BadInput, Failed):
        raise
    except ModuleNotFoundError as error:
        allowed = f"a class in a module that can be imported: there is no module {error.name!r}"
        raise BadInput(where, path, allowed) from None
    except Exception as error:
        reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        raise BadInput(where, path, f"a module that can be imported ({reason})") from error
    if not hasattr(found, name):
        raise BadInput(where, path, f"a class of {module}, which has no {name!r}")
    return getattr(found, name)
