"""The terminal shows names literally, even if they look like markup of the rich library."""

from __future__ import annotations

import ast
import io

import pytest
from rich.table import Table

from mukv.show import output
from mukv.show.progress import Bar
from mukv.show.terminal import LINES, Console, column, styled, table
from tests.test_structure import FILES, SOURCE

NAMES = ("[/b]x", "[red]x[/red]", "[bold", ":smile:", "[link=x]y[/link]", "$x$", "\\[x]", "{0}%s")


def shown(*printed: object) -> str:
    out = io.StringIO()
    Console(file=out, width=200).print(*printed)
    return out.getvalue()


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_shown_as_it_is(name):
    table = Table(name, title=f"title {name}", caption=f"caption {name}")
    table.add_row(f"cell {name}")
    for printed in (name, styled(("run: ", "bold"), name), styled((name, "dim"))):
        assert shown(printed).strip() == name or f"run: {name}" in shown(printed)
    for words in (f"title {name}", f"caption {name}", f"cell {name}"):
        assert words in shown(table)


def test_control_sequences_are_escaped():
    assert shown("a\x1b[2Jb\udcff") == "a\\x1b[2Jb\\udcff\n"
    assert shown("a\nb") == "a\nb\n"
    assert shown(styled("a\nb", keep=LINES)) == "a\nb\n"


def test_a_name_with_line_breaks_tabs_or_two_spaces_stays_on_its_line(capsys):
    name, one_line = "a\nb\tc  d ", "a\\nb\\tc  d"
    console = Console(file=io.StringIO(), width=200)
    console.say(f"run: {name}")
    console.print(styled("run: ", name))
    rows = table(("run",), ())
    rows.add_row(name)
    console.print(rows)
    lines = [line.strip() for line in console.file.getvalue().splitlines()]
    assert lines == [f"run: {one_line}", f"run: {one_line}", "run", one_line]
    output.warn(f"{name}.")
    with pytest.raises(SystemExit):
        output.complain(f"{name}: it is gone", 2)
    assert capsys.readouterr().err == f"note: {one_line} .\nerror: {one_line} : it is gone\n"


@pytest.mark.parametrize("name", [*NAMES, "\udcff\x1b[2J"])
@pytest.mark.parametrize("live", [True, False])
def test_progress_shows_names(monkeypatch, name, live):
    out = io.StringIO()
    with Bar(name, 2) as bar:
        bar.console = Console(file=out, width=200, force_terminal=live)
        if live:
            bar.__enter__()
        bar.show(2, {"policy": name})
        bar.say(f"said {name}")
        bar.__exit__(None, None, None)
    if "\x1b" not in name:
        assert f"said {name}" in out.getvalue()
        assert name in out.getvalue().replace(f"said {name}", "")
    out.getvalue().encode()


def test_a_column_shows_its_field():
    assert column("task.x").markup is False


def test_consoles_are_made_in_one_place():
    """Only show/terminal.py makes consoles, since others would read names as markup."""
    for path in FILES:
        if path != SOURCE / "show" / "terminal.py":
            names = {
                alias.name
                for node in ast.walk(ast.parse(path.read_text()))
                if isinstance(node, ast.ImportFrom) and str(node.module).startswith("rich")
                for alias in node.names
            }
            assert not names & {"Console", "TextColumn", "print", "track"}, path


@pytest.mark.product
def test_a_run_of_any_name_is_trained_and_named(mukv, token_file, tmp_path):
    from tests.conftest import MINUSCULE

    out = tmp_path / ":x:_$frac{x$ {0}%s"
    given = (*MINUSCULE, "train.steps=1", f"data.path={token_file}")
    done = mukv("train", "tiny", *given, "--out", out)
    assert done.returncode == 0, done.stderr
    assert f"run: {out}" in done.stdout


@pytest.mark.product
@pytest.mark.parametrize("name", ["[red]x", "[x", "a\\b"])
def test_a_run_whose_checkpoints_could_not_be_read_again_is_refused(
    mukv, token_file, tmp_path, name
):
    from tests.conftest import MINUSCULE

    done = mukv("train", "tiny", *MINUSCULE, f"data.path={token_file}", "--out", tmp_path / name)
    assert done.returncode == 2
    assert repr(str(tmp_path / name))[:-1] in done.stderr
    assert "checkpoints can't be kept there" in done.stderr
    assert not (tmp_path / name).exists()
