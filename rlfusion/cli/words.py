"""The words of a command line: options and their values, before anybody knows what they mean.

Every setting takes one value, ``--name value`` or ``--name=value``. What is neither is named for what it is.
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from rlfusion.common.errors import ConfigError, near, shorten

DASHES = "\u2010\u2011\u2012\u2013\u2014\u2015\u2212\ufe58\ufe63\uff0d"
"""What word processors make of "-"."""
FLAGS = ("-h", "--help", "--print_config")
MODEL_OPTION = {
    **dict.fromkeys(("finetune", "compare"), "--base"),
    **dict.fromkeys(("sample", "evaluate"), "--checkpoint"),
    "distill": "--teacher",
    "check-model": "--model",
}
"""The option of each command that takes a model."""
RESUMABLE = ("finetune", "compare", "pretrain", "pretrain-autoencoder", "distill", "train-clip")
"""The commands that take --resume."""


class Word(NamedTuple):
    """An option without its dashes, and its value: None where there is none. A flag is whole, with its dashes."""

    key: str
    text: str | None

    @property
    def flag(self) -> bool:
        """Whether it is an option that takes no value: --help, --print_config."""
        return self.key.startswith("-")


def read(command: str, arguments: Sequence[str], names: Sequence[str] = ()) -> list[Word]:
    """The options of ``arguments`` in their order; ``names`` are settings, for what is likely meant.

    Raises:
        ConfigError: a word that is no option.
    """
    return list(_words(command, arguments, names))


def _words(command: str, arguments: Sequence[str], names: Sequence[str]) -> Iterator[Word]:
    rest = iter(range(len(arguments)))
    for i in rest:
        word = arguments[i]
        if word in FLAGS or word.startswith("--print_config="):
            yield Word(word, None)
            continue
        if not word.startswith("--") or word == "--":
            raise _no_option(command, word, names, arguments[i - 1] if i else "")
        option, equals, value = word.partition("=")
        if not equals:
            following = arguments[i + 1] if i + 1 < len(arguments) else None
            if following is None or re.match(r"--?[A-Za-z]|--$", following):
                yield Word(option[2:], None)
                continue
            value = arguments[next(rest)]
        yield Word(option[2:], value)


def _no_option(command: str, word: str, names: Sequence[str], before: str) -> ConfigError:
    """The error about a word that stands where an option is expected."""
    shown = shorten(repr(word))
    if not word.strip():
        return ConfigError(f"{shown} is an empty word: expected --option VALUE")
    if word[0] in DASHES:
        meant = "--" + word.lstrip(DASHES + "-")
        return ConfigError(f"{shown} begins with a dash that is not the sign -: expected {shorten(meant)}")
    if word[0] == "-":
        key = word.strip("-").partition("=")[0]
        found = [key] if key in names else near(key, names)
        hint = f"; did you mean --{found[0]}?" if found else ""
        return ConfigError(f"{shown} is no option: expected --option VALUE, with two signs -{hint}")
    key, equals, value = word.partition("=")
    if equals and re.fullmatch(r"[\w.-]+", key):
        found = near(key, names)
        hint = f", such as --{found[0] if found and key not in names else key} {value or 'VALUE'}"
        return ConfigError(f"{shown} is no option: expected --option VALUE{shorten(hint)}")
    meant = _meant(command, word)
    advice = meant or "--option VALUE" + (", or quotes around a value with spaces" if before else "")
    return ConfigError(f"{shown} stands without an option: expected {shorten(advice, 200)}")


def _meant(command: str, word: str) -> str:
    """The option that a word which stands alone belongs to; "" for none that is known."""
    path = Path(word.strip())
    model = MODEL_OPTION.get(command, "")
    try:
        if path.is_file() and path.suffix in (".yaml", ".yml"):
            return f"--config {word}"
        run = (path / "config.yaml").is_file() or (path / "checkpoints").is_dir()
    except (OSError, ValueError):
        return ""
    like_run = run or re.match(r"(\./)?runs/", word)
    found = []
    if like_run and command in RESUMABLE:
        found.append(f"--resume {word} to go on with a run")
    if model and (like_run or path.exists() or re.fullmatch(r"[\w.-]+/[\w.-]+", word)):
        found.append(f"{model} {word} for the model" + (" to start from" if model == "--base" else ""))
    return ", or ".join(found) or _named(command, word)


def _named(command: str, word: str) -> str:
    """The option that takes a word which is the name of an agent, a reward, a method or a recipe."""
    from rlfusion.agents import AGENTS
    from rlfusion.distill import METHODS
    from rlfusion.pretrain import PRESETS
    from rlfusion.rewards import REWARDS

    tables = {
        "finetune": {"--agent": AGENTS, "--reward": REWARDS},
        "compare": {"--agents": AGENTS, "--rewards": REWARDS},
        "distill": {"--method": METHODS},
        "pretrain": {"--objective": PRESETS},
        "evaluate": {"--reward": REWARDS},
    }
    for option, table in tables.get(command, {}).items():
        if word.lower() in table or near(word, table):
            return f"{option} {word.lower() if word.lower() in table else near(word, table)[0]}"
    return ""
