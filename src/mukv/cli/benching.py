"""The command `mukv bench`: test the long-context memory of a model on synthetic tasks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from mukv.cli import launch
from mukv.cli.app import Json, Overrides, StoredAs, app, beside, hold
from mukv.core.errors import BadInput, unknown_name
from mukv.core.names import even
from mukv.show import output
from mukv.show.terminal import Console, table

TEXT_LENGTH = 1024
"""Default of the shortest text length in tokens, for a model that was not trained on a task. Each
task with its default sizes fits in as many bytes."""


@app.command()
def bench(
    context: typer.Context,
    source: Annotated[
        str | None,
        typer.Argument(
            metavar="[MODEL or CONFIG]", help="A model to test, or a configuration to train."
        ),
    ] = None,
    overrides: Overrides = None,
    oracle: Annotated[
        bool, typer.Option("--oracle", help="Score a solver and a guesser instead of a model.")
    ] = False,
    tasks: Annotated[
        str | None, typer.Option(help="Task names, separated by commas; default: all.")
    ] = None,
    lengths: Annotated[
        str | None,
        typer.Option(
            help="Text lengths in tokens, separated by commas; a CONFIG is trained at the first. "
            "Default: the training length, or what the tasks need (text: 1024), and 2 to 16 times "
            "that."
        ),
    ] = None,
    facts: Annotated[
        int | None, typer.Option(help="Facts to remember per text; default: the task's.")
    ] = None,
    growing: Annotated[
        bool, typer.Option("--growing", help="More facts in longer texts (CONFIG only).")
    ] = False,
    seeds: Annotated[int, typer.Option(help="Runs per learning rate (CONFIG only).")] = 3,
    learning_rates: Annotated[
        str | None,
        typer.Option(help="Separated by commas; default: the configured one, half and twice it."),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Training steps; default: configured.")] = None,
    cache: Annotated[
        str, typer.Option(help="Cache policy of decoded answers, such as snapkv:0.25+int8.")
    ] = "full",
    shots: Annotated[int, typer.Option(help="Solved examples before each text.")] = 0,
    samples: Annotated[int, typer.Option(help="Samples per task and length.")] = 200,
    free: Annotated[int, typer.Option(help="Samples that are also decoded token by token.")] = 16,
    seed: Annotated[int, typer.Option(help="Random seed of the samples.")] = 0,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            help="Folder of results; default: `bench` in the run directory, or runs/bench-NAME.",
        ),
    ] = None,
    weights: StoredAs = None,
    as_json: Json = False,
) -> None:
    """Measure how well a model recalls facts of a long text, by task and length.

    A MODEL is tested as it is. A CONFIG is trained on each task at one length, for each learning
    rate and seed, and tested at longer ones; a command that was interrupted can be repeated to
    continue.

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
    from mukv.train import footprint

    policy = Policy.parse(cache, where="--cache")
    settings = ExamineSettings(samples, seed, free, shots, policy)
    names = chosen(tasks, list(TASKS))
    if lengths is not None:
        longest = max(whole_numbers("--lengths", lengths))
        footprint.require_bytes("their texts", 16 * samples * longest, "--lengths", longest)
    asked = with_facts({name: TASKS[name] for name in names}, facts)
    if (source is None) != oracle:
        raise BadInput("bench", source or "no model", "MODEL, CONFIG or --oracle: one of them")
    if source is None:
        sizes = whole_numbers("--lengths", lengths or "512")
        show(without_model.check(asked, sizes, samples, seed), None, as_json)
        return
    if weights is not None and (source is None or not is_model(source)):
        allowed = "a MODEL that is tested as it is: a CONFIG is trained, in float32"
        raise BadInput("--weights", weights, allowed)
    folder = (
        beside(source, "bench") if is_model(source) else Path("runs") / f"bench-{Path(source).stem}"
    )
    folder = out or folder
    hold(context, folder)
    tell = Console(stderr=True).say
    if is_model(source):
        model = loaded.load(source, weights=weights)
        trained = model.run.data.task
        if trained is not None and tasks is None:
            asked = with_facts({trained.kind: trained}, facts)
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


def is_model(source: str) -> bool:
    """Whether this is a folder or a hub id, rather than a preset or YAML file."""
    return Path(source).is_dir() or ("/" in source and not source.endswith((".yaml", ".yml")))


def sizes_of(given: str | None, first: int, context: int | None) -> list[int]:
    """Parse text lengths; without them return 1, 2, 4, 8 and 16 times the first, up to the model's
    context. Raises BadInput."""
    if given is not None:
        return whole_numbers("--lengths", given)
    sizes = [first * times for times in (1, 2, 4, 8, 16)]
    return [size for size in sizes if context is None or size <= context] or [context or first]


def rates_of(text: str) -> tuple[float, ...]:
    """Parse learning rates from "1e-3,3e-3"; returns them sorted. Raises BadInput."""
    try:
        found = tuple(sorted({float(part) for part in text.split(",")}))
    except ValueError:
        raise BadInput("--learning-rates", text, "numbers with commas, such as 1e-3,3e-3") from None
    if not 0 < found[0] <= found[-1] < 1e9:
        raise BadInput("--learning-rates", text, "numbers greater than 0")
    return found


def chosen(text: str | None, names: Sequence[str]) -> list[str]:
    """Parse names from "a,b"; None for all. Raises BadInput for names that are not in `names`."""
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
    """Parse whole numbers from "1,2,3"; returns each once, sorted. Raises BadInput below 1."""
    try:
        found = sorted({int(part) for part in text.split(",")})
    except ValueError:
        raise BadInput(option, text, "whole numbers with commas between, such as 64,128") from None
    if found[0] < 1:
        raise BadInput(option, text, "numbers of at least 1")
    return found


def show(rows: Sequence[dict[str, Any]], out: Path | None, as_json: bool) -> None:
    """Print the rows as one JSON object or as a table."""
    if as_json:
        output.print_json({"rows": rows, **({} if out is None else {"out": str(out)})})
        return
    columns = {
        "length\ntokens": [f"{row['length']:,}" for row in rows],
        "exact\nmatch": [f"{row['exact_match']:.3f}" for row in rows],
        "95 %\ninterval": ["{:.3f}-{:.3f}".format(*row["interval"]) for row in rows],
        "free\nrunning": even([row.get("free_running") for row in rows], 3),
        "calibr.\nerror": even([row.get("calibration_error") for row in rows], 3),
        "chance": even([float(row["chance"]) for row in rows], 3),
        "oracle": [f"{row['oracle']:.3f}" for row in rows],
        "cache\nbytes/token": [f"{row['cache_bytes_per_token']:,.0f}" for row in rows],
    }
    columns = {name: cells for name, cells in columns.items() if any(cells)}
    caption = "shares of correct answers; free running: of the answers decoded token by token"
    shown = table(("task",), tuple(columns), caption=caption)
    for row, cells in zip(rows, zip(*columns.values(), strict=True), strict=True):
        shown.add_row(row["task"], *cells)
    Console().print(shown)
    if out is not None:
        Console().say(f"answers and picture are in {out}")
