"""The command `mukv bench`: measure long-context recall of a model on synthetic tasks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from mukv.cli import launch
from mukv.cli.app import Json, Overrides, StoredAs, app, beside, hold
from mukv.core.errors import BadInput, unknown_name
from mukv.core.names import even
from mukv.show import output
from mukv.show.terminal import Console, table

if TYPE_CHECKING:
    from mukv.bench.examine import ExamineSettings
    from mukv.tasks import AnyTask

SAMPLES, PROMPT_SAMPLES = 200, 20
"""Default number of samples of each task and length: with teacher forcing, and with prompts."""
TEXT_LENGTH = 1024
"""Default of the shortest text length in tokens, for a model that was not trained on a task. A text
of so many bytes holds every task with its default sizes."""


@app.command()
def bench(
    context: typer.Context,
    source: Annotated[
        str | None,
        typer.Argument(
            metavar="[MODEL or CONFIG]",
            help="A model to test (a run directory, a Hugging Face folder, a GGUF file or a hub "
            "id), or a configuration to train (a preset or a YAML file).",
        ),
    ] = None,
    overrides: Overrides = None,
    oracle: Annotated[
        bool, typer.Option("--oracle", help="Score a solver and a guesser instead of a model.")
    ] = False,
    tasks: Annotated[
        str | None,
        typer.Option(help="Task names, separated by commas; default: all that can be asked."),
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
        int | None, typer.Option(help="Number of facts to remember per text; default: the task's.")
    ] = None,
    growing: Annotated[
        bool, typer.Option("--growing", help="More facts in longer texts (CONFIG only).")
    ] = False,
    seeds: Annotated[int, typer.Option(help="Number of runs per learning rate (CONFIG only).")] = 3,
    learning_rates: Annotated[
        str | None,
        typer.Option(
            help="Learning rates, separated by commas; default: the configured one, half and "
            "twice it."
        ),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="Number of training steps; default: configured.")
    ] = None,
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
            help="How a MODEL is asked: chat (a prompt in its chat template), plain (a prompt "
            "without the template) or text (the task's own text); default: chat, or plain for a "
            "model without a template."
        ),
    ] = None,
    haystack: Annotated[
        Path | None,
        typer.Option(help="Text whose sentences fill up prompts; default: RULER's sentences."),
    ] = None,
    aware: Annotated[
        bool,
        typer.Option(
            "--aware", help="Let the cache policy choose after the question of a prompt was read."
        ),
    ] = False,
    shots: Annotated[int, typer.Option(help="Number of solved examples before each text.")] = 0,
    samples: Annotated[
        int | None,
        typer.Option(
            help="Number of samples per task and length; default: 200, and 20 for prompts."
        ),
    ] = None,
    free: Annotated[
        int, typer.Option(help="Number of samples of a task's own text that are also decoded.")
    ] = 16,
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

    A MODEL that was not trained on a task is asked in words, through its chat template if it has
    one; a sample prompt is printed first.

    Example: `mukv bench tiny --tasks mqar,needle --lengths 128,256,512 --steps 300 --seeds 1`
    """
    launch.prepare()
    from mukv.bench import oracle as without_model
    from mukv.bench.examine import ExamineSettings
    from mukv.cache import Policy
    from mukv.tasks import TASKS
    from mukv.train import footprint

    if (source is None) != oracle:
        raise BadInput("bench", source or "no model", "MODEL, CONFIG or --oracle: one of them")
    policy = Policy.parse(cache, where="--cache")
    words = {"form": form, "haystack": sentences(haystack), "aware": aware}
    many = SAMPLES if samples is None else samples
    settings = ExamineSettings(many, seed, free, shots, policy, **words)
    wanted = Wanted(None if tasks is None else chosen(tasks, list(TASKS)), facts, lengths)
    if lengths is not None:
        longest = max(whole_numbers("--lengths", lengths))
        footprint.require_bytes("their texts", 16 * many * longest, "--lengths", longest)
    if source is None:
        asked = wanted.tasks(None)
        rows = without_model.check(asked, whole_numbers("--lengths", lengths or "512"), many, seed)
        show(rows, None, as_json)
        return
    model = is_model(source)
    if weights is not None and not model:
        allowed = "a MODEL that is tested as it is: a CONFIG is trained, in float32"
        raise BadInput("--weights", weights, allowed)
    folder = out or (beside(source, "bench") if model else Path("runs/bench-" + Path(source).stem))
    hold(context, folder)
    if model:
        few = replace(settings, samples=PROMPT_SAMPLES) if samples is None else settings
        rows = of_model(source, wanted, settings, few, folder, weights)
    else:
        given = [*(overrides or []), *([] if steps is None else [f"train.steps={steps}"])]
        plan = TrainingPlan(learning_rates, seeds, growing)
        rows = of_configuration(source, given, wanted, plan, settings, folder)
    show(rows, folder, as_json)


class Wanted(NamedTuple):
    """The tasks to test, and their sizes.

    names: names of tasks. None for the task that the model is trained on; if there is none, for all
        tasks
    facts: number of facts per text; None for the default of each task
    lengths: text lengths as the user typed them
    """

    names: Sequence[str] | None
    facts: int | None
    lengths: str | None

    def tasks(self, trained: AnyTask | None, in_words: bool = False) -> dict[str, AnyTask]:
        """Return the tasks by name. Raises BadInput for a task that can't have so many facts.

        trained: the task that the model was or will be trained on
        in_words: whether the tasks are asked with prompts, in which numbers have more digits
        """
        from mukv.bench.run import with_facts
        from mukv.tasks import TASKS
        from mukv.tasks.prompts import PROMPTED

        if self.names is None and trained is not None:
            return with_facts({trained.kind: trained}, self.facts)
        known = {**TASKS, **PROMPTED} if in_words else TASKS
        names = self.names or (PROMPTED if in_words else TASKS)
        return with_facts({name: known[name] for name in names}, self.facts)


def of_model(
    source: str,
    wanted: Wanted,
    settings: ExamineSettings,
    of_prompts: ExamineSettings,
    folder: Path,
    weights: str | None,
) -> list[dict[str, Any]]:
    """Test a model; return the rows of the table.

    of_prompts: settings if the model is asked with prompts
    weights: format that the weights are converted to; None keeps their dtype
    """
    from mukv.bench.run import test_model
    from mukv.runs import loaded
    from mukv.runs.located import locate

    found = locate(source)
    found.check_policy(settings.policy)
    model = loaded.load(found, weights=weights)
    trained = model.run.data.task
    in_words = trained is None and settings.form != "text"
    asked = wanted.tasks(trained, in_words)
    first = TEXT_LENGTH if trained is None else model.run.train.length
    sizes = sizes_of(wanted.lengths, first, model.network.context)
    settings = of_prompts if in_words else settings
    return test_model(model, asked, sizes, settings, folder, Console(stderr=True).say)


class TrainingPlan(NamedTuple):
    """Settings of the training of a configuration.

    rates: learning rates as the user typed them
    seeds: number of runs per learning rate
    growing: whether longer texts have more facts
    """

    rates: str | None
    seeds: int
    growing: bool


def of_configuration(
    source: str,
    overrides: Sequence[str],
    wanted: Wanted,
    plan: TrainingPlan,
    settings: ExamineSettings,
    folder: Path,
) -> list[dict[str, Any]]:
    """Train and test a configuration; return the rows of the table."""
    from mukv.bench.run import try_configuration
    from mukv.bench.trial import Trial
    from mukv.runs.resolve import resolve

    run, _ = resolve(source, overrides, None)
    asked = wanted.tasks(run.data.task)
    first = max(run.train.length, *(task.smallest for task in asked.values()))
    sizes = sizes_of(wanted.lengths, first, run.model.context)
    rate = run.train.learning_rate
    rates = rates_of(plan.rates) if plan.rates else (rate / 2, rate, 2 * rate)
    trial = Trial(run, tuple(sizes), rates, plan.seeds, folder, settings, plan.growing)
    return try_configuration(trial, asked, folder, Console(stderr=True).say)


def sentences(path: Path | None) -> tuple[str, ...]:
    """Return the sentences of a text file, or RULER's filler if `path` is None. Raises BadInput for
    a text without sentences."""
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
    """Whether this is a folder, a GGUF file or a hub id, rather than a preset or YAML file."""
    path = Path(source)
    named = "/" in source and not source.endswith((".yaml", ".yml"))
    return path.is_dir() or path.suffix == ".gguf" or named


def sizes_of(given: str | None, first: int, context: int | None) -> list[int]:
    """Parse text lengths; if `given` is None, return 1, 2, 4, 8 and 16 times `first`, up to the
    model's context. Raises BadInput for lengths that can't be parsed."""
    if given is not None:
        return whole_numbers("--lengths", given)
    sizes = [first * times for times in (1, 2, 4, 8, 16)]
    return [size for size in sizes if context is None or size <= context] or [context or first]


def rates_of(text: str) -> tuple[float, ...]:
    """Parse learning rates from a text such as "1e-3,3e-3"; return them sorted. Raises BadInput for
    other texts, and for rates that are not greater than 0."""
    try:
        found = tuple(sorted({float(part) for part in text.split(",")}))
    except ValueError:
        raise BadInput("--learning-rates", text, "numbers with commas, such as 1e-3,3e-3") from None
    if not 0 < found[0] <= found[-1] < 1e9:
        raise BadInput("--learning-rates", text, "numbers greater than 0")
    return found


def chosen(text: str | None, names: Sequence[str]) -> list[str]:
    """Parse names from a text such as "a,b"; return all names if it is None. Raises BadInput for
    names that are not in `names`."""
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
    """Parse whole numbers from a text such as "1,2,3"; return them sorted, without repetition.
    Raises BadInput for numbers below 1."""
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
        "partial": even([row.get("partial") for row in rows], 3),
        "free\nrunning": even([row.get("free_running") for row in rows], 3),
        "calibr.\nerror": even([row.get("calibration_error") for row in rows], 3),
        "chance": even([float(row["chance"]) for row in rows], 3),
        "oracle": [f"{row['oracle']:.3f}" for row in rows],
        "cache\nbytes/token": [f"{row['cache_bytes_per_token']:,.0f}" for row in rows],
    }
    columns = {name: cells for name, cells in columns.items() if any(cells)}
    caption = "fractions of correct answers"
    if "partial" in columns:
        caption += "; partial: mean nearness, 1 - edits / length"
    if any(row.get("free_running") is not None for row in rows):
        caption += "; free running: of the answers decoded token by token"
    shown = table(("task",), tuple(columns), caption=caption)
    for row, cells in zip(rows, zip(*columns.values(), strict=True), strict=True):
        shown.add_row(row["task"], *cells)
    Console().print(shown)
    if out is not None:
        Console().say(f"answers and picture are in {out}")
