"""Documents are up to date: their links, files and command lines are valid.

Nothing is executed: a command line is given to the parser of the real command.
"""

from __future__ import annotations

import re
import shlex
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer

from mukv.cli import app

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    [
        *ROOT.glob("*.md"),
        *(path for folder in ("docs", "reproductions") for path in (ROOT / folder).rglob("*.md")),
        ROOT / "benchmarks" / "README.md",
    ]
)
COMMANDS: Any = typer.main.get_command(app)
UsageError: Any = typer.BadParameter.__base__
"""The exception of typer's click, which new versions of typer have under a private name."""
FENCE = re.compile(r"^(```+|~~~+).*?^\1[^\S\n]*$", re.MULTILINE | re.DOTALL)
INDENTED = re.compile(r"(?:(?<=\n\n)|\A)(?:(?: {4}|\t).*\n?)+")
LINK = re.compile(
    r"\]\(<?([^)<>\s]+)>?(?:\s+\"[^\"]*\")?\)|^\[[^\]]+\]:\s+(\S+)|(?:href|src)=\"([^\"]+)\"",
    re.MULTILINE,
)
FILE = re.compile(
    r"(?<![\w/.])(?:benchmarks|configs|docs|reproductions|src|tests)/[\w./-]*\.(?:py|md|yaml)\b"
)
SCRIPT = re.compile(r"\bpython3? (?!-)(\S+\.py)\b")
PRESET = re.compile(r"(?<![\w/.])configs/([a-z][\w.-]*\w)")
STARTS_FROM_PRESETS = {"train", "sweep", "transfer", "describe"}


def prose(text: str) -> str:
    """Return a page without its blocks of code."""
    return INDENTED.sub("\n", FENCE.sub("\n", text))


def blocks(text: str) -> list[str]:
    """Return the lines of all blocks of code; lines joined by a backslash are one."""
    found = [match.group().partition("\n")[2] for match in FENCE.finditer(text)]
    found += [match.group() for match in INDENTED.finditer(FENCE.sub("\n", text))]
    return [line.strip() for block in found for line in block.replace("\\\n", " ").splitlines()]


def typed(line: str) -> list[list[str]]:
    """Return the `mukv` commands in a line of shell, as lists of words."""
    lexer = shlex.shlex(line.removeprefix("$ "), posix=True, punctuation_chars="|&;")
    lexer.whitespace_split = True
    lexer.commenters = "#"
    commands: list[list[str]] = [[]]
    for word in lexer:
        if set(word) <= set("|&;"):
            commands.append([])
        elif commands[-1] or not re.fullmatch(r"[A-Z_]+=.*", word):
            commands[-1].append(word)
    return [words[1:] for words in commands if words and words[0].endswith("mukv")]


def parse(words: list[str]) -> list[str]:
    """Parse what follows `mukv`; return its arguments. Raises UsageError."""
    name, *rest = words or [""]
    if name.startswith("-"):
        COMMANDS.make_parser(typer.Context(COMMANDS)).parse_args(words)
        return []
    if name not in COMMANDS.commands:
        raise UsageError(f"no command {name!r}")
    command = COMMANDS.commands[name]
    given, left, _ = command.make_parser(typer.Context(command)).parse_args(rest)
    if left:
        raise UsageError(f"more than {name} takes: {left}")
    arguments = [
        given.get(each.name) for each in command.params if each.param_type_name == "argument"
    ]
    return [
        word
        for each in arguments
        for word in (each if isinstance(each, (list, tuple)) else [each])
        if isinstance(word, str)
    ]


@cache
def anchors(page: Path) -> set[str]:
    """Return the names that GitHub gives to the headings of a page."""
    found: set[str] = set()
    for heading in re.findall(
        r"^#+\s+(.*?)\s*#*$", FENCE.sub("\n", page.read_text()), re.MULTILINE
    ):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        name = re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")
        number = 0
        while (unique := f"{name}-{number}" if number else name) in found:
            number += 1
        found.add(unique)
    return found | set(re.findall(r"<a (?:id|name)=\"([^\"]+)\"", page.read_text()))


def dead_links(page: Path) -> list[str]:
    """Return the relative links of a page whose target is missing."""
    dead = []
    for groups in LINK.findall(prose(page.read_text())):
        target = next(filter(None, groups))
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        there = page.parent / path if path else page
        if not there.exists() or (
            anchor and there.suffix == ".md" and anchor not in anchors(there)
        ):
            dead.append(target)
    return dead


def wrong_commands(page: Path) -> list[str]:
    """Return the command lines of a page that the parser refuses."""
    text, wrong = page.read_text(), []
    lines = [(line, True) for line in blocks(text) if re.search(r"\bmukv\b", line)]
    lines += [(line, False) for line in re.findall(r"`(mukv [a-z][^`]*)`", prose(text))]
    for line, whole in lines:
        try:
            commands = typed(" ".join(line.split()))
        except ValueError:
            continue  # not a shell command
        for words in commands:
            try:
                arguments = parse(words)
            except UsageError as error:
                # In a sentence an option may be named without its value.
                if whole or type(error).__name__ != "BadOptionUsage":
                    wrong.append(f"{line}: {error.format_message()}")
                continue
            name = arguments[0] if arguments and words[0] in STARTS_FROM_PRESETS else ""
            if re.fullmatch(r"[a-z][\w.-]*", name) and not preset(name):
                wrong.append(f"{line}: no preset {name!r}")
    return wrong


def preset(name: str) -> bool:
    return (ROOT / "configs" / f"{name.removesuffix('.yaml')}.yaml").exists()


def missing_files(page: Path) -> list[str]:
    """Return the scripts, pages and presets that a page names but that do not exist."""
    text = page.read_text()
    files = {*FILE.findall(text), *SCRIPT.findall(text)}
    missing = [f for f in files if not any((root / f).exists() for root in (ROOT, page.parent))]
    return missing + [f"configs/{name}" for name in PRESET.findall(text) if not preset(name)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
@pytest.mark.parametrize("look", [dead_links, wrong_commands, missing_files])
def test_links_commands_and_files_of_a_page_exist(page, look):
    assert look(page) == []


WRONG = """# A title: of `code`

[a](#a-title-of-code) [b](#no) [c](other.md) ![d](there.md "e")

```sh
mukv train tiny && mukv trian tiny   # comment
$ mukv train tiny --outt x
X=1 mukv eval runs/NAME --text a.txt | tee log
mukv eval runs/NAME --text
```

    mukv describe no-such-preset \\
        train.steps=3

Say `mukv demo --fast` or `mukv demo --slow`, `mukv eval --text`, run
`python benchmarks/nothing.py`;
see configs/tiny and configs/none.
"""


def test_wrong_pages_are_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(WRONG)
    (tmp_path / "there.md").touch()
    assert dead_links(page) == ["#no", "other.md"]
    found = wrong_commands(page)
    assert [line.split(": ")[0].split(" #")[0].strip() for line in found] == [
        "mukv train tiny && mukv trian tiny",
        "$ mukv train tiny --outt x",
        "mukv eval runs/NAME --text",
        "mukv describe no-such-preset          train.steps=3",
        "mukv demo --slow",
    ]
    assert missing_files(page) == ["benchmarks/nothing.py", "configs/none"]
