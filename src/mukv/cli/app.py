"""Define the application of the command line, and the options that several commands share."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from mukv.cli.typed import App
from mukv.core.errors import BadInput
from mukv.core.version import VERSION
from mukv.show import output
from mukv.storage.locks import RUN, writing, writing_inside

ORDER = (
    *("demo", "data", "train", "eval", "generate", "chat", "sweep", "transfer", "analyze"),
    *("compress", "convert", "bench", "import", "export", "report", "runs", "describe"),
    *("presets", "policies", "docs"),
)
"""The commands in the order of `mukv --help`, which is the order of a typical workflow."""


class InOrder(TyperGroup):
    """A group that lists its commands in the order of ORDER."""

    def list_commands(self, ctx: Any) -> list[str]:
        return sorted(super().list_commands(ctx), key=ORDER.index)


app = App(
    cls=InOrder,
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="A JAX laboratory for transformers with a small memory.",
)


def _version(asked: bool) -> None:
    if asked:
        sys.stdout.write(f"mukv {VERSION}\n")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version.", callback=_version, is_eager=True),
    ] = False,
) -> None:
    """A JAX laboratory for transformers with a small memory."""


Json = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[key=value]...", help="Overrides, such as train.steps=50."),
]
ModelName = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="A run directory, a Hugging Face folder, a GGUF file or a hub id."
    ),
]

AllowNonfinite = Annotated[
    bool,
    typer.Option("--allow-nonfinite", help="Accept weights that are infinite or not a number."),
]

StoredAs = Annotated[
    str | None,
    typer.Option(
        metavar="FORMAT",
        help="Convert the weights while they are read: int8, int4 or bfloat16; default: as they "
        "are.",
    ),
]

ComputeType = Annotated[
    str | None,
    typer.Option(
        "--compute",
        metavar="TYPE",
        help="Type of activations, products and cache: float32 or bfloat16; default: the model's.",
    ),
]


def exactly_one(command: str, **options: object) -> None:
    """Raise BadInput unless exactly one of these options is not None."""
    given = [name for name, value in options.items() if value is not None]
    if len(given) != 1:
        names = " and ".join(_dashed(name) for name in given) or "neither"
        allowed = f"exactly one of {', '.join(map(_dashed, options))}"
        raise BadInput(command, names, allowed)


def note_unused_budget(policies: str) -> None:
    """Warn of the policies, separated by commas, that take no budget."""
    from mukv.cache import Policy
    from mukv.cache.words import split

    unused = [name for name in split(policies, ",") if not Policy.takes_budget(name)]
    if unused:
        output.warn(f"--budget means nothing to {', '.join(unused)}")


def tell(notes: Iterable[str]) -> None:
    """Print notes as warnings, one per line."""
    for note in notes:
        output.warn(note)


def hold(context: typer.Context, *folders: Path) -> None:
    """Lock these folders, or the run directories that contain them, against other writers until the
    command ends. Raises BadInput, with the process id, if another process has locked a folder."""
    context.with_resource(writing(*folders))


def hold_run(context: typer.Context, path: Path) -> None:
    """Lock the run directory that contains a path, if there is one, until the command ends."""
    context.with_resource(writing_inside(path))


def _dashed(name: str) -> str:
    return "--" + name.replace("_", "-")


def beside(model: str, name: str) -> Path:
    """Return the folder of results: `name` in a run directory, or else in `runs`, because the
    folder of a model from elsewhere is not written to.
    """
    path = Path(model)
    return path / name if (path / RUN).is_file() else Path("runs") / f"{name}-{path.name}"
