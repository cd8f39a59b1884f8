"""The words of a command line: options and their values, before anybody knows what they mean.

Every setting takes one value, ``--name value`` or ``--name=value``. What is neither is named for what it is.
"""

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_args, get_origin

from rlfusion.common.errors import ConfigError, near, shorten
from rlfusion.common.manner import Manner

DASHES = "\u2010\u2011\u2012\u2013\u2014\u2015\u2212\ufe58\ufe63\uff0d"
"""What word processors make of "-"."""
QUOTES = "\u2018\u2019\u201a\u201c\u201d\u201e\u00ab\u00bb"
"""And of quotes."""
Kinds = Mapping[str, Any]
NO_KINDS: Kinds = {}
MANNER = ("--quiet", "--json")
"""Flags of the commands of ``RESUMABLE``, which are no settings."""
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


def mannered(arguments: Sequence[str]) -> tuple[list[str], Manner]:
    """The arguments without ``MANNER``, and what these say.

    Raises:
        ConfigError: a value for one of them.
    """
    for word in arguments:
        flag, equals, value = word.partition("=")
        if flag in MANNER and equals:
            raise ConfigError(f"{flag} = {shorten(value)}: expected {flag} alone, which takes no value")
    told = Manner(*(flag in arguments for flag in MANNER))
    return [word for word in arguments if word not in MANNER], told


def read(command: str, arguments: Sequence[str], names: Sequence[str] = (), kinds: Kinds = NO_KINDS) -> list[Word]:
    """The options of ``arguments`` in their order; ``names`` are settings, and ``kinds`` what they may be, for what is
    likely meant.

    Raises:
        ConfigError: a word that is no option.
    """
    return list(_words(command, arguments, names, kinds))


def _words(command: str, arguments: Sequence[str], names: Sequence[str], kinds: Kinds) -> Iterator[Word]:
    before: Word | None = None
    rest = iter(range(len(arguments)))
    for i in rest:
        word = arguments[i]
        if word in FLAGS or word.startswith("--print_config="):
            yield Word(word, None)
            continue
        if not word.startswith("--") or word == "--" or re.search(r"\s", word.partition("=")[0]):
            raise _no_option(command, word, names) or _alone(command, arguments[i:], before, kinds)
        option, equals, value = word.partition("=")
        if not equals:
            following = arguments[i + 1] if i + 1 < len(arguments) else None
            if following is None or re.match(r"--?[A-Za-z]|--$", following):
                before = Word(option[2:], None)
                yield before
                continue
            value = arguments[next(rest)]
        before = Word(option[2:], value)
        yield before


def _no_option(command: str, word: str, names: Sequence[str]) -> ConfigError | None:
    """The error about a word that was to be an option; None for a value that stands alone."""
    shown = shorten(repr(word))
    if not word.strip():
        return ConfigError(f"{shown} is an empty word: expected --option VALUE")
    if word.startswith("--") and word != "--":
        apart = " ".join(filter(None, re.split(r"[\s=]+", word)))
        return ConfigError(
            f"{shown} is one word with a space in it: expected {shorten(apart)}, without quotes around it"
        )
    if word[0] in QUOTES:
        meant = word.strip(QUOTES)
        return ConfigError(f"{shown} begins with a quote of a word processor: expected {shorten(meant)}, or '...'")
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
    return None


def _alone(command: str, rest: Sequence[str], before: Word | None, kinds: Kinds) -> ConfigError:
    """The error about a value without an option, ``rest[0]``, that stands after the option ``before``."""
    shown = f"{shorten(repr(rest[0]))} stands without an option"
    kind = kinds.get(before.key) if before else None
    following = list(itertools.takewhile(lambda word: not word.startswith("--"), rest))
    if before is not None and before.text == "":
        return ConfigError(f"{shown}: expected --{before.key} {shorten(rest[0])}, or --{before.key}={shorten(rest[0])}")
    if before is not None and before.text is not None and get_origin(kind) in (list, tuple):
        return ConfigError(f"{shown}: expected a list, --{before.key} {shorten(','.join([before.text, *following]))}")
    if meant := _meant(command, rest[0]):
        return ConfigError(f"{shown}: expected {shorten(meant, 200)}")
    if before is None or before.text is None:
        return ConfigError(f"{shown}: expected --option VALUE")
    told = f"--{before.key} takes one value, and has {shorten(repr(before.text))}"
    if kind is not None and str not in get_args(kind) and kind is not str:
        return ConfigError(f"{shown}: {told}; expected --option VALUE")
    together = shorten(" ".join([before.text, *following]))
    return ConfigError(
        f"{shown}: {told}; expected --option VALUE, or quotes around a value with spaces, --{before.key} {together!r}"
    )


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
