"""The pages of --help: what the parser says, read without it."""

import re
import subprocess
import sys

import pytest

from rlfusion.cli import help_pages, help_writer
from rlfusion.cli.main import COMMANDS


def options(text: str) -> dict[str, str]:
    """The options of a page, each with its meaning and default; without the types and the line breaks, in which
    versions of Python and of jsonargparse differ.
    """
    entries = re.split(r"\n  (?=--)", text)[1:]
    named = {entry.split()[0]: " ".join(entry.split()) for entry in entries}
    named.pop("--print_config", None)
    return {
        name: re.sub(r"\(type: .*?(?=(, default:[^)]*)?\)|, required)", "(", entry) for name, entry in named.items()
    }


@pytest.mark.parametrize("command", sorted(set(COMMANDS) - set(help_pages.BY_HAND)))
def test_a_page_is_what_the_parser_says(command):
    page = help_pages.page([command, "--help"])
    assert page, "make help writes the pages"
    said = help_writer.made(command)
    assert options(page) == options(said), "settings have changed: make help writes the pages again"
    assert bool(options(page)) == (command not in ("list", "jobs", "runs", "rewards"))
    if not options(page):
        assert page == said


def test_pages_are_of_commands():
    assert {file.stem for file in help_pages.FOLDER.iterdir()} == {*COMMANDS, "rlfusion"}


def test_a_page_is_printed_without_torch():
    code = (
        "import sys; from rlfusion.cli.main import main\n"
        "codes = main(['finetune', '--help']), main(['help', 'distill'])\n"
        "print(codes, *{'torch', 'numpy', 'jsonargparse'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "(0, 0)"
    assert "--chain.steps" in done.stdout


@pytest.mark.parametrize(
    "line", ["finetune", "finetune --agent grpo --help", "finetune --help --seed 1", "fintune --help", "finetune help"]
)
def test_all_else_is_asked_of_the_parser(line):
    assert help_pages.page(line.split()) is None


def test_a_page_fits_its_width():
    for command in COMMANDS:
        assert all(len(line) <= 126 for line in (help_pages.page([command, "-h"]) or "").splitlines()), command
