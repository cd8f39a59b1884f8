"""Tables of commands fit a terminal of 80 columns, and lose nothing there."""

import io

import pytest
from rich.cells import cell_len
from rich.console import Console

from rlfusion.cli import shown
from rlfusion.cli.main import main
from rlfusion.jobs.doors import DOORS

LONG = "a name of a reward [with brackets] that is longer than any column would be " * 2
SEVERAL = [
    *("list", "rewards", "doctor", "list --help", "runs --help", "rewards --help", "jobs --help"),
    *(f"list {kind}" for kind in DOORS),
]
"""Commands that print a table, or words beside one, at once."""


def drawn(table, width: int, head: list[str], rows: list[list[str]], title: str = "") -> list[str]:
    console = Console(file=(text := io.StringIO()), width=width, force_terminal=True, color_system=None)
    table(console, title, head, rows)
    return text.getvalue().splitlines()


def whole(lines: list[str]) -> str:
    """What the lines say, without the frame and the blanks."""
    return "".join("".join(c for c in line if c.isalnum() or c in "[].+-") for line in lines)


@pytest.mark.parametrize("width", [40, 60, 80, 200])
@pytest.mark.parametrize("columns", [1, 3, 12])
def test_figures_fit_and_no_number_is_cut(columns, width):
    head = ["", *(f"figure number {i} of it" for i in range(columns))]
    rows = [[LONG, *(f"{i}.2345678" for i in range(columns))], ["short", *["-1.5e+10"] * columns]]
    lines = drawn(shown.figures, width, head, rows)
    assert max(map(cell_len, lines)) <= width
    page = "\n".join(lines)
    for i in range(columns):
        assert f"{i}.2345678" in page
    assert page.count("-1.5e+10") == columns
    if width == 200 and columns < 12:
        assert page.count("┏") == 1, "one table where there is room"


@pytest.mark.parametrize("width", [20, 60])
def test_a_table_without_rows_shows_its_heads_and_a_narrow_one_its_numbers(width):
    head = ["", *(f"a long head, number {i}" for i in range(9))]
    assert drawn(shown.figures, width, head, [])
    assert whole(drawn(shown.figures, width, head, [["row", *["Z"] * 9]])).count("Z") == 9


def test_figures_that_find_no_room_stand_below_with_their_names():
    lines = drawn(shown.figures, 60, ["", *"abcdefgh"], [["row", *["123456789"] * 8]])
    assert sum("row" in line for line in lines) == sum(line.startswith("┏") for line in lines) > 1


@pytest.mark.parametrize("width", [40, 80])
def test_words_go_on_in_the_next_line(width):
    rows = [("check", "ok", LONG), ("other", "FAILS", "x" * 200)]
    lines = drawn(shown.texts, width, ["check", "", "what was seen"], rows)
    assert max(map(cell_len, lines)) <= width
    assert whole([LONG])[-30:] in whole(lines)
    assert whole(lines).count("x") == 200


def test_a_title_is_one_line_with_what_it_says():
    title = "reward '/a/[b]/c.py' " * 6
    assert drawn(shown.figures, 40, ["", "v"], [["a", "1"]], title)[0].rstrip() == title.rstrip()
    assert drawn(shown.texts, 40, ["", ""], [["a", "1"]])[0].startswith(("┌", "┏"))


@pytest.mark.parametrize("words", SEVERAL)
def test_commands_fit_80_columns(words, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    assert main(words.split()) == 0
    told = capsys.readouterr().out
    assert max(map(cell_len, told.splitlines())) <= 80, told
    assert "…" not in told


@pytest.mark.parametrize("words", ["runs {}", "runs size {}", "runs best {}", "runs status {}/first"])
def test_runs_fit_80_columns(words, tiny_root, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    assert main(words.format(tiny_root).split()) == 0
    told = capsys.readouterr().out.splitlines()
    assert max(cell_len(line) for line in told if str(tiny_root) not in line) <= 80
