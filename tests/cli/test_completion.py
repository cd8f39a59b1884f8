"""The scripts of ``rlfusion completion``, run by the shells that are here."""

import re
import shutil
import subprocess

import pytest

from rlfusion.agents import NAMES
from rlfusion.cli import completion
from rlfusion.cli.main import COMMANDS, main


def completed(capsys, *words: str) -> list[str]:
    """What bash makes of a line whose last word is not whole."""
    assert main(["completion", "bash"]) == 0
    script = capsys.readouterr().out
    line = " ".join(f"'{word}'" for word in words)
    ask = f'COMP_WORDS=({line}); COMP_CWORD={len(words) - 1}; _rlfusion; printf "%s\\n" "${{COMPREPLY[@]}}"'
    done = subprocess.run(["bash", "-uc", script + ask], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return done.stdout.split()


def test_commands(capsys):
    assert set(completed(capsys, "rlfusion", "")) == set(COMMANDS)
    assert completed(capsys, "rlfusion", "pretrain-") == ["pretrain-autoencoder"]


def test_options_of_the_command(capsys):
    assert completed(capsys, "rlfusion", "finetune", "--rollout.samples") == ["--rollout.samples_per_prompt"]
    assert completed(capsys, "rlfusion", "doctor", "--rollout.samples") == ["--rollout.samples_per_prompt"]
    assert completed(capsys, "rlfusion", "sample", "--rollout") == []
    assert completed(capsys, "rlfusion", "list", "--") == ["--help"]


def test_names_of_what_is_built_in(capsys):
    assert set(completed(capsys, "rlfusion", "finetune", "--agent", "")) >= set(NAMES)
    assert completed(capsys, "rlfusion", "finetune", "--reward", "symm") == ["symmetry"]


def test_files_are_the_shells_own(capsys):
    assert completed(capsys, "rlfusion", "compare", "runs/") == []
    assert "complete -o default" in completion.SHELLS["bash"]()


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_another_shell_reads_its_script(shell, capsys):
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert all(command in script for command in COMMANDS)
    assert "{{" not in script
    if shutil.which(shell) is None:
        assert not re.search(r"[^\n]complete -c", script)  # one a line
        pytest.skip(f"no {shell} here")
    assert subprocess.run([shell, "-n"], input=script, capture_output=True, text=True).stderr == ""


@pytest.mark.parametrize(
    ("words", "told"), [([], "expected one of bash, zsh, fish"), (["bash", "zsh"], "expected one"), (["fsh"], "'fish'")]
)
def test_other_words_are_one_line(words, told, capsys):
    assert main(["completion", *words]) == 2
    error = capsys.readouterr().err
    assert told in error
    assert error.count("\n") == 1
