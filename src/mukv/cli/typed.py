"""Rewrite errors of the library for the command line, and recognise swapped arguments.

An error of the library names a field (`max_tokens`); the command line shows the option or argument
as it is typed (`--max-tokens`). If two arguments seem to be swapped, the error says so.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperCommand

from mukv.cli.addresses import with_copies
from mukv.core.errors import BadInput

ALIASES: Mapping[str, Mapping[str, str]] = {
    "": {"preset": "CONFIG", "override": "key=value"},
    "eval": {
        "tokens": "--text or --tokens",
        "text": "--text or --tokens",
        "stride": "--stride",
    },
    "generate": {
        "prompt": "--prompt, --prompt-file or --token-ids",
        "text": "--prompt or --prompt-file",
        "policy": "--cache",
    },
    "chat": {"--chat": "MODEL", "conversation": "conversation", "messages": "message"},
    "compress": {"text": "--text or --tokens", "tokens": "--text or --tokens"},
    "analyze": {"tokens": "--text or --tokens", "text": "--text or --tokens"},
    "data": {"package": "SOURCE", "hf": "SOURCE", "vocab_size": "--tokenizer"},
    "sweep": {"ranges": "key=RANGE"},
    "bench": {"preset": "MODEL or CONFIG", "policy": "--cache or --policy"},
}
"""Aliases by command ("" for all): options or arguments that set fields of the library. Of several
options errors name the one that was typed."""
OPTIONS_OF_KEYS: Mapping[str, Mapping[str, str]] = {"bench": {"train.steps": "steps"}}
"""Configuration keys that an option sets, by command. Errors name the option if it was given."""
USE: Mapping[str, str] = {
    "eval": "mukv eval MODEL --text FILE",
    "generate": "mukv generate MODEL --prompt TEXT",
    "chat": "mukv chat MODEL",
    "compress": "mukv compress MODEL --text FILE",
    "analyze": "mukv analyze MODEL --text FILE",
    "export": "mukv export RUN --out FOLDER",
    "import": "mukv import SOURCE --out RUN",
    "convert": "mukv convert MODEL --to gqa:N --out RUN",
    "train": "mukv train CONFIG key=value",
    "describe": "mukv describe CONFIG key=value",
    "transfer": "mukv transfer CONFIG key=value",
    "sweep": "mukv sweep CONFIG key=RANGE",
    "bench": "mukv bench CONFIG key=value",
    "data": "mukv data SOURCE --out FOLDER",
}
"""Example of each command's arguments, for error messages."""
CONFIGURED = ("train", "describe", "transfer", "sweep", "bench")
"""Commands whose first argument is a configuration, and whose other arguments are overrides."""


FROM_ZERO = frozenset({"seed", "shots", "strings", "free", "temperature"})
"""Options whose number may be 0; any other number must be greater than 0."""
SEEDS = (1 << 32) - 1


class Command(TyperCommand):
    """A command that checks the range of numbers, and rewrites errors as `reworded` does."""

    def make_context(self, info_name: Any, args: list[str], *rest: Any, **named: Any) -> Any:
        """Parse the arguments. Raises BadInput with a hint if two of them seem to be swapped."""
        words = list(args)
        try:
            context = super().make_context(info_name, args, *rest, **named)
        except Exception as error:
            hint = swapped(self, words) if hasattr(error, "format_message") else None
            if hint is None:
                raise
            detail = error.format_message()  # pyright: ignore[reportAttributeAccessIssue]
            raise BadInput(f"mukv {self.name}", " ".join(words), f"{hint} ({detail})") from error
        context.meta["words"] = words
        return context

    def invoke(self, ctx: Any) -> Any:
        """Run the command. Raises BadInput that names options and arguments as they are typed."""
        for param in self.params:
            require_number(param, ctx.params.get(param.name))
        try:
            with ExitStack() as copies:
                arguments = (p.name for p in self.params if p.param_type_name == "argument")
                ctx.params = with_copies(ctx.params, next(arguments, None), copies)
                return super().invoke(ctx)
        except BadInput as error:
            raise reworded(error, self, ctx.meta["words"]) from error


class App(typer.Typer):
    """An application whose commands are of the class Command."""

    def command(self, *args: Any, **named: Any) -> Any:
        return super().command(*args, cls=Command, **named)


def require_number(param: Any, value: Any) -> None:
    """Raise BadInput for a number that is out of range for a parameter of this name and type."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return
    spelt, zero = spellings([param])[param.name], param.name in FROM_ZERO
    if isinstance(value, float):
        if not math.isfinite(value) or value < 0 or (value == 0 and not zero):
            allowed = f"a finite number, {'at least' if zero else 'greater than'} 0"
            raise BadInput(spelt, value, allowed)
    elif param.name == "seed" and not 0 <= value <= SEEDS:
        raise BadInput(spelt, value, f"0 to {SEEDS} (32 bits)")
    elif value < (0 if zero else 1):
        raise BadInput(spelt, value, f"at least {0 if zero else 1}")
    elif value > SEEDS // 2:
        raise BadInput(spelt, value, f"at most {SEEDS // 2:,} (32 bits)")


def reworded(error: BadInput, command: Command, words: list[str]) -> BadInput:
    """Return an error that names parameters as they are typed, with a hint if two arguments seem to
    be swapped."""
    spelt, name = spellings(command.params), str(command.name)
    aliases = {**ALIASES[""], **ALIASES.get(name, {})}
    where = _typed(aliases.get(error.where, ""), words) or spelt.get(error.where) or error.where
    option = OPTIONS_OF_KEYS.get(name, {}).get(error.where)
    if option and any(word.split("=")[0] == spelt[option] for word in words):
        where = spelt[option]

    def spell(match: re.Match[str]) -> str:
        return spelt.get(match[1], match[0])

    allowed = re.sub(r"`(\w+)`", spell, error.allowed)
    hint = swapped(command, words)
    if hint is not None:
        allowed = f"{hint}; {allowed}"
    if (where, allowed) == (error.where, error.allowed):
        return error
    return BadInput(where, error.given, allowed, error.nearest)


def _typed(options: str, words: list[str]) -> str:
    """Return the one of several options that is among the words of a command line; all of them if
    it is not exactly one."""
    given = {word.split("=")[0] for word in words}
    found = [option for option in re.findall(r"--[\w-]+", options) if option in given]
    return found[0] if len(found) == 1 else options


def spellings(params: Iterable[Any]) -> dict[str, str]:
    """Return how each parameter is typed: the longest name of an option, the metavar of an
    argument."""
    found: dict[str, str] = {}
    for param in params:
        if param.param_type_name == "option":
            found[param.name] = max(param.opts, key=len)
        else:
            found[param.name] = re.sub(r"[\[\].]", "", param.metavar or param.name.upper())
    return found


def swapped(command: Command, words: list[str]) -> str | None:
    """Describe an argument that seems to be in the place of another; None if there is none."""
    name = str(command.name)
    if name not in USE:
        return None
    places, options = _parted(words, command)
    use = f"write {USE[name]}"
    if name in CONFIGURED:
        if len(places) > 1 and _is_change(places[0]):
            later = [word for word in places[1:] if not _is_change(word)]
            if later:
                return f"the CONFIG stands first: {later[0]!r} came after a change; {use}"
        return None
    if name == "data":
        out = options.get("--out")
        if places and out and not any(map(_there, places)) and _there(out):
            return f"--out {out!r} is there and SOURCE {places[0]!r} is not: swapped? {use}"
        return None
    if not places or _is_model(places[0]):
        if len(places) > 1:
            return f"one word too many, {places[1]!r}; {use}"
        return None
    for word in places[1:]:
        if _is_model(word):
            return f"{word!r} is the model, and must stand first; {use}"
    for option, value in options.items():
        if _is_model(value):
            return f"{option} {value!r} is a model, and {places[0]!r} is none: swapped? {use}"
    if len(places) > 1:
        return f"one word too many, {places[1]!r}; {use}"
    return None


def _parted(words: list[str], command: Command) -> tuple[list[str], dict[str, str]]:
    """Split the words of a command line into arguments, and options with their values."""
    switches = [param for param in command.params if getattr(param, "is_flag", False)]
    flags = {"--help", *(spelling for param in switches for spelling in param.opts)}
    places: list[str] = []
    options: dict[str, str] = {}
    pending: str | None = None
    for word in words:
        if word.startswith("--"):
            option, equals, value = word.partition("=")
            pending = None if equals or option in flags else option
            if equals:
                options[option] = value
        elif pending is not None:
            options[pending], pending = word, None
        else:
            places.append(word)
    return places, options


def _is_change(word: str) -> bool:
    return re.match(r"[A-Za-z_][\w.]*=", word) is not None


def _is_model(word: str) -> bool:
    """Whether this is a run directory, a Hugging Face folder or a GGUF file."""
    try:
        path = Path(word)
        if path.is_dir():
            return any((path / name).is_file() for name in ("config.yaml", "config.json"))
        return path.suffix == ".gguf" and path.is_file()
    except (OSError, ValueError):
        return False


def _there(word: str) -> bool:
    try:
        return Path(word).exists()
    except (OSError, ValueError):
        return False
