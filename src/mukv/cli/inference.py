"""The commands `mukv eval`, `mukv generate` and `mukv describe`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from mukv.cli import launch
from mukv.cli.app import (
    AllowNonfinite,
    ComputeType,
    Json,
    ModelName,
    Overrides,
    StoredAs,
    app,
    exactly_one,
    note_unused_budget,
    tell,
)
from mukv.core.errors import BadInput
from mukv.show import output
from mukv.show.terminal import LINES, Console, styled


@app.command("eval")
def evaluate(
    model: ModelName,
    text: Annotated[Path | None, typer.Option(help="A UTF-8 text file.")] = None,
    tokens: Annotated[
        Path | None, typer.Option(help="Token ids: .npy, [token] or [row token].")
    ] = None,
    length: Annotated[
        int | None, typer.Option(help="Window in tokens; default: as in training.")
    ] = None,
    stride: Annotated[
        int | None, typer.Option(help="Tokens from window to window; default: the window.")
    ] = None,
    weights: StoredAs = None,
    compute: ComputeType = None,
    allow_nonfinite: AllowNonfinite = False,
    as_json: Json = False,
) -> None:
    """Measure loss, perplexity and bits per byte of a model on a text.

    Example: `mukv eval runs/demo/tiny-mha-120 --text README.md`
    """
    launch.prepare()
    from mukv.runs import inputs, loaded, notes

    exactly_one("eval", text=text, tokens=tokens)
    speaker = loaded.load(model, allow_nonfinite=allow_nonfinite, weights=weights)
    speaker = speaker.computing(compute, "--compute")
    if text is not None:
        rows = inputs.rows_of_text(speaker, text)
    else:
        assert tokens is not None
        rows = inputs.rows_of_ids(tokens)
    if length is not None and length < 1:
        raise BadInput("--length", length, "at least 1 token")
    if length is not None:
        tell(notes.of_length(length, speaker.run, "--length"))
    found = speaker.evaluate(rows, length, stride)
    facts = {
        "tokens": found.tokens,
        "loss": found.loss,
        "perplexity": found.perplexity,
        "bits_per_byte": found.bits_per_byte,
    }
    if weights is not None:
        facts["weights_bytes"] = speaker.weights_bytes
    lines = {
        "tokens": f"{found.tokens:,}",
        "loss": f"{found.loss:.4f} nats per token",
        "perplexity": f"{found.perplexity:,.4f}",
    }
    if found.bits_per_byte is not None:
        lines["bits per byte"] = f"{found.bits_per_byte:.4f}"
    if weights is not None:
        lines["weights"] = f"{speaker.weights_bytes:,} bytes"
    output.print_summary(facts, lines, None, as_json)


@app.command()
def generate(
    model: ModelName,
    prompt: Annotated[
        list[str] | None,
        typer.Option(help="Text to continue; an empty one begins a new text; may be repeated."),
    ] = None,
    prompt_file: Annotated[
        list[Path] | None,
        typer.Option(help="A UTF-8 text file to continue, - for standard input; may be repeated."),
    ] = None,
    token_ids: Annotated[str | None, typer.Option(help="Token ids to continue: 1,2,3.")] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Put the prompt into the model's chat template.")
    ] = False,
    special: Annotated[
        bool,
        typer.Option("--special", help="Read special tokens written out in the prompt as such."),
    ] = False,
    max_tokens: Annotated[int, typer.Option(help="Maximum number of new tokens.")] = 128,
    temperature: Annotated[float, typer.Option(help="Sampling temperature; 0: greedy.")] = 0.0,
    top_k: Annotated[int | None, typer.Option(help="Sample from the k likeliest tokens.")] = None,
    top_p: Annotated[
        float | None,
        typer.Option(help="Sample from the likeliest tokens with this total probability."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Random seed of the sampling.")] = 0,
    stop: Annotated[
        str | None, typer.Option(help="Token ids that end the text: 1,2; default: the model's own.")
    ] = None,
    copies: Annotated[
        int, typer.Option(help="Number of continuations per prompt, in one batch.")
    ] = 1,
    cache: Annotated[
        str, typer.Option(metavar="POLICY", help="Cache policy, such as snapkv+int8.")
    ] = "full",
    budget: Annotated[
        float | None,
        typer.Option(
            help="Budget of the policy: a fraction (at most 1) of the tokens read so far, or a "
            "number of entries (above 1) per KV head; default: 0.25."
        ),
    ] = None,
    prefill_chunk: Annotated[
        int | None,
        typer.Option(
            help="Maximum number of prompt tokens that are read at once; the policy chooses "
            "entries after each such chunk; default: the whole prompt."
        ),
    ] = None,
    weights: StoredAs = None,
    compute: ComputeType = None,
    allow_nonfinite: AllowNonfinite = False,
    as_json: Json = False,
) -> None:
    """Continue a text, or several texts in one batch; reports speed and cache bytes.

    Example: `mukv generate runs/demo/tiny-mha-120 --prompt "def main(" --max-tokens 64`
    """
    launch.prepare()
    from mukv.cache import Policy
    from mukv.infer.sampling import Sampling
    from mukv.infer.stream import TokenStream
    from mukv.runs import inputs, loaded, notes
    from mukv.runs.located import locate

    texts_given = bool(prompt or prompt_file) or None
    exactly_one("generate", prompt=texts_given, token_ids=token_ids)
    policy = Policy.parse(cache, 0.25 if budget is None else budget, "--cache")
    if budget is not None:
        note_unused_budget(cache)
    if copies < 1:
        raise BadInput("--copies", copies, "at least 1")
    sampling = Sampling(temperature, top_k, top_p, seed)
    ends = inputs.ids(stop, "--stop") if stop else None
    for option, given in {"--chat": chat, "--special": special}.items():
        if given and token_ids is not None:
            raise BadInput(option, token_ids, "a text, with --prompt or --prompt-file")
    read = inputs.texts(prompt_file or (), "--prompt-file", empty=True)
    prompts = [*(prompt or ()), *read]
    found = locate(model)
    found.check_policy(policy)
    speaker = loaded.load(found, allow_nonfinite=allow_nonfinite, weights=weights)
    speaker = speaker.computing(compute, "--compute")
    if token_ids is not None:
        rows = [inputs.ids(token_ids, "--token-ids")]
    else:
        encode = speaker.encode_marked if special else speaker.encode
        rows = [*map(speaker.encode_chat if chat else encode, prompts)]
        options = [*(("--prompt", text) for text in prompt or ())]
        options += [("--prompt-file", str(path)) for path in prompt_file or ()]
        for (option, given), row in zip(options, rows, strict=True):
            if not row:
                raise BadInput(option, given, loaded.NOT_EMPTY)
        for path, text in zip(prompt_file or (), read, strict=True):
            if not text:
                output.warn(f"--prompt-file {path}: it is empty, so that a new text is begun")
    tell(notes.of_stop(ends or (), speaker.network.vocab_size))
    total = max(map(len, rows)) + max_tokens
    tell(notes.of_length(total, speaker.run, "the prompt and --max-tokens"))
    rows = [row for row in rows for _ in range(copies)]
    stream = None
    if not as_json and len(rows) == 1:
        shown = str(rows[0]) if token_ids is not None else prompts[0]
        opening = styled((f"{shown}\n---\n" if chat else shown, "dim"), keep=LINES)
        stream = TokenStream(speaker.tokenizer, sys.stdout, opening)
    show = stream.show if stream else None
    made = speaker.generate_ids(
        rows, max_tokens, sampling, ends, show, policy, prefill_chunk=prefill_chunk
    )
    texts = [speaker.tokenizer.decode_further(row) for row in made.tokens]
    if as_json:
        facts = {
            "token_ids": made.tokens[0],
            "text": texts[0],
            "texts": texts,
            "cache_bytes": made.cache_bytes,
            "compile_seconds": made.compile_seconds,
            "prefill_seconds": made.prefill_seconds,
            "tokens_per_second": made.tokens_per_second,
        }
        if weights is not None:
            facts["weights_bytes"] = speaker.weights_bytes
        if len(rows) > 1:
            facts["all_token_ids"] = made.tokens
        output.print_json(facts)
        return
    if stream:
        stream.end()
    for number, text in enumerate(() if stream else texts):
        Console().print(f"--- {number}", style="bold")
        if len(prompts) > 1 or chat:
            shown = prompts[number // copies] + ("\n---\n" if chat else "")
            Console().print(styled((shown, "dim"), keep=LINES), end="", soft_wrap=True)
        sys.stdout.write(text + "\n")
    Console(stderr=True).print(
        f"{made.tokens_per_second:,.0f} tokens/s, first token after "
        f"{made.prefill_seconds:.3f} s (and {made.compile_seconds:.1f} s of compilation), "
        f"cache {made.cache_bytes:,} bytes",
        style="dim",
        soft_wrap=True,
    )


@app.command()
def describe(
    source: Annotated[
        str, typer.Argument(metavar="CONFIG", help="A preset, a YAML file or a run directory.")
    ],
    overrides: Overrides = None,
    device: Annotated[
        str | None,
        typer.Option(help="Estimate a training step on this kind of device, such as h100 or v5p."),
    ] = None,
    length: Annotated[
        int | None, typer.Option(help="Tokens per row; default: train.length.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show parameters, FLOPs, cache bytes and shardings of a configuration; allocates no weights.

    With --device, also the memory, FLOPs, collectives and largest MFU of a training step on a mesh
    of such devices, what does not fit, and the nearest mesh on which it does; with train.stages,
    of a step of the last stage.

    Example: `mukv describe llama-3.1-70b mesh.data=64 mesh.tensor=8 --device h100 --length 8192`
    """
    launch.prepare()
    from mukv.core.device import device as device_named
    from mukv.runs.describe import describe as facts_of
    from mukv.runs.describe import show, show_step
    from mukv.runs.estimate import estimate
    from mukv.runs.resolve import resolve

    kind = None if device is None else device_named(device)
    changes = [*(overrides or []), *([] if length is None else [f"train.length={length}"])]
    if kind is not None:
        changes.append(f"train.compute.platform={kind.platform}")
    run, _ = resolve(source, changes, None)
    facts = facts_of(run)
    if kind is not None and device is not None:
        step, rows = estimate(run, kind, device), run.train.sizes[-1][0]
        if step["batch"] != rows:
            output.warn(
                f"{run.mesh} can't divide {rows} rows (train.batch), so that mukv train refuses "
                f"them; the estimate is of {step['batch']}"
            )
        facts |= {"step": step, "bytes_per_device": step["bytes_per_device"]}
    if as_json:
        output.print_json(facts)
        return
    if kind is not None:
        show_step(facts["step"], Console())
    show(facts, run, Console())
