"""What all commands share: the application, and options that they have in common."""

from __future__ import annotations

from typing import Annotated

import typer

app = typer.Typer(
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="A JAX laboratory for transformers with a small memory.",
)
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[key=value]...", help="For instance train.steps=50")
]
ModelName = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="A run directory, a Hugging Face folder or a hub id."),
]
