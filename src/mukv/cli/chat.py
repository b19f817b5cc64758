"""The command `mukv chat`: read messages from a terminal or a pipe, and print streamed answers."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mukv.cli import launch
from mukv.cli.app import AllowNonfinite, Json, ModelName, StoredAs, app
from mukv.core.errors import BadInput, nearest_name
from mukv.show import output
from mukv.show.heartbeat import Heartbeat
from mukv.show.terminal import Console
from mukv.storage.json_text import is_text

if TYPE_CHECKING:
    from mukv.runs.talk import Chat, Reply

COMMANDS = {
    "/help": "show these commands",
    "/reset": "delete all messages; the system prompt stays",
    "/system": "TEXT: set another system prompt and delete all messages; without TEXT: remove it",
    "/stats": "show turns, tokens and bytes of the cache, and speed",
    "/quit": "end the chat, like the end of the input",
}
PROMPT = "> "


@app.command()
def chat(
    model: ModelName,
    system: Annotated[str | None, typer.Option(help="The system prompt.")] = None,
    policy: Annotated[
        str, typer.Option(metavar="POLICY", help="Cache policy, such as snapkv:0.25+int8.")
    ] = "full",
    temperature: Annotated[float, typer.Option(help="Sampling temperature; 0: greedy.")] = 0.0,
    top_k: Annotated[int | None, typer.Option(help="Sample from the k likeliest tokens.")] = None,
    top_p: Annotated[
        float | None,
        typer.Option(help="Sample from the likeliest tokens with this total probability."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Random seed of the sampling.")] = 0,
    max_tokens: Annotated[int, typer.Option(help="Maximum number of tokens of an answer.")] = 512,
    stop: Annotated[
        list[str] | None,
        typer.Option(metavar="TEXT", help="End an answer before this text; may be repeated."),
    ] = None,
    length: Annotated[
        int | None,
        typer.Option(
            help="Maximum number of tokens of the whole conversation; default: the model's "
            "context, but at most 4096."
        ),
    ] = None,
    weights: StoredAs = None,
    allow_nonfinite: AllowNonfinite = False,
    as_json: Json = False,
) -> None:
    """Chat with a model that has a chat template, one message per line; `/help` lists commands.

    Example: `mukv chat HuggingFaceTB/SmolLM2-135M-Instruct --system "Answer briefly."`
    """
    launch.prepare()
    from mukv.cache import Policy
    from mukv.infer.sampling import Sampling
    from mukv.runs import loaded, talk
    from mukv.runs.located import locate

    rule = Policy.parse(policy, 0.25, "--policy")
    sampling = Sampling(temperature, top_k, top_p, seed)
    if stop and "" in stop:
        raise BadInput("--stop", "", "a text of at least one character")
    with Heartbeat("mukv chat"):
        found = locate(model)
        tokens = talk.room(found, length)
        talk.check(found, system, rule, tokens)
        speaker = loaded.load(found, allow_nonfinite=allow_nonfinite, weights=weights)
        asked = system, sampling, rule, max_tokens, stop or ()
        session = _Session(talk.Chat(speaker, tokens, *asked), as_json)
    terminal = sys.stdin.isatty()
    if terminal:
        Console(stderr=True).say(f"{model}: /help lists commands, /quit ends", style="dim")
        with suppress(ImportError):
            import readline  # noqa: F401  (lines of `input` can be edited)
    for line in _lines(terminal):
        if not session.take(line):
            return


class _Session:
    """Handle the lines of a chat, which are commands and messages.

    as_json: whether each answer is printed as one JSON object
    """

    def __init__(self, talker: Chat, as_json: bool):
        self.talker, self.as_json = talker, as_json
        self.last: Reply | None = None

    def take(self, line: str) -> bool:
        """Run a command or answer a message; return False if the chat ends. Raises BadInput for
        text that is not UTF-8."""
        if not line.strip():
            return True
        if not is_text(line):
            raise BadInput("standard input", line[:40], "UTF-8 text")
        if not line.startswith("/") or line.startswith("//"):
            self._say(line.removeprefix("/") if line.startswith("//") else line)
            return True
        name, _, rest = line.strip().partition(" ")
        if name == "/quit":
            return False
        if name == "/help":
            for command, meaning in COMMANDS.items():
                self._note(f"{command}: {meaning}")
            self._note("//TEXT: a message that begins with /")
        elif name == "/reset":
            self.talker.reset()
            self._note("all messages are deleted")
        elif name == "/stats":
            self._stats()
        elif name == "/system":
            try:
                self.talker.set_system(rest.strip() or None)
                self._note("the chat starts again with this system prompt")
            except BadInput as error:
                output.warn(str(error))
        else:
            output.warn(str(_unknown(name)))
        return True

    def _say(self, message: str) -> None:
        out = None if self.as_json else sys.stdout
        try:
            with interruptible() as interrupted, Heartbeat("mukv chat"):
                if out is not None:
                    out = sys.stdout  # the heartbeat has replaced sys.stdout to watch it
                reply = self.talker.say(message, out, lambda: bool(interrupted))
        except BadInput as error:
            output.warn(f"{error}; /reset starts a new chat")
            return
        self.last = reply
        if reply.restarted:
            output.warn(
                "the template changed earlier messages, so that the whole conversation was "
                f"prefilled again ({reply.read:,} tokens)"
            )
        if reply.cache_tokens + 1 >= self.talker.conversation.length:
            output.warn("the conversation is as long as --length; /reset starts a new chat")
        if self.as_json:
            output.print_json(_facts(reply))

    def _stats(self) -> None:
        """Print statistics. With --json they go to standard error, since each line of standard
        output is the object of an answer."""
        talker, last = self.talker, self.last
        facts: dict[str, Any] = {
            "turns": len(talker.messages) // 2,
            "cache_tokens": len(talker.conversation.ids),
            "cache_bytes": talker.conversation.cache_bytes,
        }
        if last is not None:
            facts |= {
                "tokens_per_second": round(last.tokens_per_second, 1),
                "first_token_seconds": round(last.first_token_seconds, 3),
                "prefill_seconds": round(last.prefill_seconds, 3),
                "compile_seconds": round(last.compile_seconds, 3),
            }
        for name, value in facts.items():
            shown = f"{value:,}" if isinstance(value, int) else value
            Console(stderr=self.as_json).say(f"{name}: {shown}")

    def _note(self, text: str) -> None:
        Console(stderr=True).say(text, style="dim")


def _facts(reply: Reply) -> dict[str, Any]:
    return {
        "role": "assistant",
        "text": reply.text,
        "tokens": reply.tokens,
        "cache_tokens": reply.cache_tokens,
        "cache_bytes": reply.cache_bytes,
        "prefill_tokens": reply.read,
        "prefill_seconds": reply.prefill_seconds,
        "compile_seconds": reply.compile_seconds,
        "first_token_seconds": reply.first_token_seconds,
        "tokens_per_second": reply.tokens_per_second,
        "restarted": reply.restarted,
    }


def _unknown(name: str) -> BadInput:
    return BadInput("command", name, f"one of {', '.join(COMMANDS)}", nearest_name(name, COMMANDS))


def _lines(terminal: bool) -> Iterator[str]:
    """Yield the lines of standard input without line ends. Ctrl-C at the prompt discards the line.
    Raises BadInput for input that is not UTF-8."""
    while True:
        try:
            line = _typed() if terminal else sys.stdin.readline()
        except EOFError:
            sys.stdout.write("\n")  # Ctrl-D leaves the cursor behind the prompt
            return
        except KeyboardInterrupt:
            if not terminal:
                raise
            sys.stdout.write("\n")
            continue
        except UnicodeDecodeError as error:
            raise BadInput("standard input", f"byte {error.start}", "UTF-8 text") from None
        if not terminal and not line:
            return
        yield line.rstrip("\r\n")


def _typed() -> str:
    """Read a line from the terminal. Ctrl-C raises KeyboardInterrupt, where the handler of the
    command line would end the command."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return input(PROMPT)
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def interruptible() -> Iterator[list[int]]:
    """Catch the first Ctrl-C in this block and append its signal number to the list that the block
    receives. A second Ctrl-C raises KeyboardInterrupt, since the running compiled program may take
    long."""
    pressed: list[int] = []

    def press(number: int, _: Any) -> None:
        if pressed:
            raise KeyboardInterrupt
        pressed.append(number)

    before = signal.signal(signal.SIGINT, press)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)
