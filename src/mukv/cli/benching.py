"""The command that asks a model what it remembers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from mukv.cli import launch
from mukv.cli.app import Json, Overrides, app, beside, hold
from mukv.core.errors import BadInput, unknown_name
from mukv.core.names import even
from mukv.show import output
from mukv.show.terminal import Console, table

SAMPLES, PROMPT_SAMPLES = 200, 20
"""Of each task and length, unless told otherwise: with teacher forcing, and of decoded prompts."""
TEXT_LENGTH = 1024
"""Tokens of the shortest text that a model is asked about, unless told otherwise: every task's
default fits in as many bytes."""


@app.command()
def bench(
    context: typer.Context,
    source: Annotated[
        str | None,
        typer.Argument(metavar="[MODEL or CONFIG]", help="A model, or what is trained for this."),
    ] = None,
    overrides: Overrides = None,
    oracle: Annotated[
        bool, typer.Option("--oracle", help="No model: an independent solver, a guesser.")
    ] = False,
    tasks: Annotated[
        str | None, typer.Option(help="Names with commas; default: all that can be asked so.")
    ] = None,
    lengths: Annotated[
        str | None,
        typer.Option(
            help="In tokens, with commas; a CONFIG is trained at the first. Default: as in "
            "training, or as the tasks need (text: 1024), and 2 to 16 times that."
        ),
    ] = None,
    facts: Annotated[
        int | None, typer.Option(help="To be remembered; default: the task's.")
    ] = None,
    growing: Annotated[
        bool, typer.Option("--growing", help="Facts grow with the length (of a CONFIG).")
    ] = False,
    seeds: Annotated[int, typer.Option(help="Runs at each learning rate (of a CONFIG).")] = 3,
    learning_rates: Annotated[
        str | None, typer.Option(help="With commas; default: the configured one, half and twice.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Of training; default: as configured.")] = None,
    cache: Annotated[
        str,
        typer.Option(
            "--cache",
            "--policy",
            help="Cache policy of decoded answers, such as snapkv:0.25+int8.",
        ),
    ] = "full",
    form: Annotated[
        str | None,
        typer.Option(
            help="Of a MODEL's questions: chat (a prompt in its chat template), plain (a prompt "
            "without one) or text (the task's own text); default: chat or plain."
        ),
    ] = None,
    haystack: Annotated[
        Path | None,
        typer.Option(help="Text whose sentences are the filler of prompts; default: RULER's."),
    ] = None,
    shots: Annotated[int, typer.Option(help="Solved samples before each text.")] = 0,
    samples: Annotated[
        int | None,
        typer.Option(help="Of each task and length; default: 200, of prompts 20."),
    ] = None,
    free: Annotated[
        int, typer.Option(help="Samples of the task's text that are also decoded.")
    ] = 16,
    seed: Annotated[int, typer.Option(help="Of the samples.")] = 0,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            help="Folder of results; default: `bench` in the run directory, or runs/bench-NAME.",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """How much of a text a model still knows, by task and length.

    A MODEL is tested. A CONFIG is trained on each task at one length, for each learning rate and
    seed, and tested at longer ones; the same command goes on where it was interrupted.

    A MODEL that was not trained on a task is asked with prompts, decodes its answers, and a sample
    is shown first.

    Example: `mukv bench tiny --tasks mqar,needle --lengths 128,256,512 --steps 300 --seeds 1`
    """
    launch.prepare()
    from mukv.bench import oracle as without_model
    from mukv.bench.examine import ExamineSettings
    from mukv.bench.run import test_model, try_configuration, with_facts
    from mukv.bench.trial import Trial
    from mukv.cache import Policy
    from mukv.runs import loaded
    from mukv.runs.resolve import resolve
    from mukv.tasks import TASKS
    from mukv.tasks.prompts import PROMPTED
    from mukv.train import footprint

    policy = Policy.parse(cache, where="--cache")
    about = {"form": form, "haystack": sentences(haystack)}
    settings = ExamineSettings(samples or SAMPLES, seed, free, shots, policy, **about)
    names = chosen(tasks, list(TASKS))
    if lengths is not None:
        longest = max(whole_numbers("--lengths", lengths))
        taken = 16 * settings.samples * longest
        footprint.require_bytes("their texts", taken, "--lengths", longest)
    asked = with_facts({name: TASKS[name] for name in names}, facts)
    if (source is None) != oracle:
        raise BadInput("bench", source or "no model", "MODEL, CONFIG or --oracle: one of them")
    if source is None:
        sizes = whole_numbers("--lengths", lengths or "512")
        show(without_model.check(asked, sizes, settings.samples, seed), None, as_json)
        return
    folder = (
        beside(source, "bench") if is_model(source) else Path("runs") / f"bench-{Path(source).stem}"
    )
    folder = out or folder
    hold(context, folder)
    tell = Console(stderr=True).say
    if is_model(source):
        model = loaded.load(source)
        trained = model.run.data.task
        if trained is not None and tasks is None:
            asked = with_facts({trained.kind: trained}, facts)
        elif trained is None and form != "text":
            # Numbers of seven digits; without --tasks only what has a prompt.
            names = [name for name in names if tasks is not None or name in PROMPTED]
            asked = with_facts({name: {**TASKS, **PROMPTED}[name] for name in names}, facts)
            settings = replace(settings, samples=samples or PROMPT_SAMPLES)
        first = TEXT_LENGTH if trained is None else model.run.train.length
        sizes = sizes_of(lengths, first, model.network.context)
        rows = test_model(model, asked, sizes, settings, folder, tell)
    else:
        given = [*(overrides or []), *([] if steps is None else [f"train.steps={steps}"])]
        run, _ = resolve(source, given, None)
        if run.data.task is not None and tasks is None:
            asked = with_facts({run.data.task.kind: run.data.task}, facts)
        first = max(run.train.length, *(task.smallest for task in asked.values()))
        sizes = sizes_of(lengths, first, run.model.context)
        rate = run.train.learning_rate
        rates = rates_of(learning_rates) if learning_rates else (rate / 2, rate, 2 * rate)
        trial = Trial(run, tuple(sizes), rates, seeds, folder, settings, growing)
        rows = try_configuration(trial, asked, folder, tell)
    show(rows, folder, as_json)


def sentences(path: Path | None) -> tuple[str, ...]:
    """The sentences of a text file; RULER's filler without one. Raises BadInput."""
    from mukv.runs import inputs
    from mukv.tasks.prompts import NOISE, sentences_of

    if path is None:
        return NOISE
    (text,) = inputs.texts([path], "--haystack")
    found = sentences_of(text)
    if not found:
        raise BadInput("--haystack", str(path), "a text with at least one sentence")
    return found


def is_model(source: str) -> bool:
    """A folder, a GGUF file or a hub id, and no preset or YAML file."""
    path = Path(source)
    named_so = "/" in source and not source.endswith((".yaml", ".yml"))
    return path.is_dir() or path.suffix == ".gguf" or named_so


def sizes_of(given: str | None, first: int, context: int | None) -> list[int]:
    """Lengths as asked for; else the first and up to 16 times that, as the context allows."""
    if given is not None:
        return whole_numbers("--lengths", given)
    sizes = [first * times for times in (1, 2, 4, 8, 16)]
    return [size for size in sizes if context is None or size <= context] or [context or first]


def rates_of(text: str) -> tuple[float, ...]:
    """Learning rates from "1e-3,3e-3"."""
    try:
        found = tuple(sorted({float(part) for part in text.split(",")}))
    except ValueError:
        raise BadInput("--learning-rates", text, "numbers with commas, such as 1e-3,3e-3") from None
    if not 0 < found[0] <= found[-1] < 1e9:
        raise BadInput("--learning-rates", text, "numbers greater than 0")
    return found


def chosen(text: str | None, names: Sequence[str]) -> list[str]:
    """Names from "a,b", each in the table."""
    if text is None:
        return list(names)
    found = [part.strip() for part in text.split(",") if part.strip()]
    for name in found:
        if name not in names:
            raise unknown_name("--tasks", name, names)
    if not found:
        raise BadInput("--tasks", text, f"names such as {names[0]},{names[1]}")
    return list(dict.fromkeys(found))


def whole_numbers(option: str, text: str) -> list[int]:
    """Whole numbers of at least 1 from "1,2,3", each once, in order."""
    try:
        found = sorted({int(part) for part in text.split(",")})
    except ValueError:
        raise BadInput(option, text, "whole numbers with commas between, such as 64,128") from None
    if found[0] < 1:
        raise BadInput(option, text, "numbers of at least 1")
    return found


def show(rows: Sequence[dict[str, Any]], out: Path | None, as_json: bool) -> None:
    """As one object, or as a table."""
    if as_json:
        output.print_json({"rows": rows, **({} if out is None else {"out": str(out)})})
        return
    columns = {
        "length\ntokens": [f"{row['length']:,}" for row in rows],
        "exact\nmatch": [f"{row['exact_match']:.3f}" for row in rows],
        "95 %\ninterval": ["{:.3f}-{:.3f}".format(*row["interval"]) for row in rows],
        "partial": even([row.get("partial") for row in rows], 3),
        "free\nrunning": even([row.get("free_running") for row in rows], 3),
        "calibr.\nerror": even([row.get("calibration_error") for row in rows], 3),
        "chance": even([float(row["chance"]) for row in rows], 3),
        "oracle": [f"{row['oracle']:.3f}" for row in rows],
        "cache\nbytes/token": [f"{row['cache_bytes_per_token']:,.0f}" for row in rows],
    }
    columns = {name: cells for name, cells in columns.items() if any(cells)}
    caption = "shares of answers; partial: how near they are, mean of 1 - edits / length"
    if any(row.get("free_running") is not None for row in rows):
        caption += "; free running: of those that were decoded token by token"
    shown = table(("task",), tuple(columns), caption=caption)
    for row, cells in zip(rows, zip(*columns.values(), strict=True), strict=True):
        shown.add_row(row["task"], *cells)
    Console().print(shown)
    if out is not None:
        Console().say(f"answers and picture: {out}")
