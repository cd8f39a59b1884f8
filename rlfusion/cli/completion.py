"""``rlfusion completion bash | zsh | fish``: a script by which a shell completes commands, options and names.

It is made of the pages of ``help_pages`` and of what is built in (``jobs.doors``), and runs without Python.
"""

import re

from rlfusion.cli import help_pages
from rlfusion.common.errors import ConfigError, shorten, unknown
from rlfusion.jobs.doors import DOORS

OPTION = re.compile(r"^ +(--[a-z][\w.-]*)", re.MULTILINE)

BASH = """\
_rlfusion() {{
  local cur="${{COMP_WORDS[COMP_CWORD]}}" prev="${{COMP_WORDS[COMP_CWORD-1]}}"
  COMPREPLY=()
  if [ "$COMP_CWORD" = 1 ]; then
    COMPREPLY=($(compgen -W "{commands}" -- "$cur"))
    return
  fi
  case "$prev" in
{values}
  esac
  case "$cur" in -*) ;; *) return ;; esac
  case "${{COMP_WORDS[1]}}" in
{options}
  esac
}}
complete -o default -F _rlfusion rlfusion
"""
ZSH = "autoload -U +X compinit && compinit\nautoload -U +X bashcompinit && bashcompinit\n"


def show(arguments: list[str]) -> None:
    """Print the script of a shell.

    Raises:
        ConfigError: no shell, more than one, or another.
    """
    if len(arguments) != 1:
        told = f"rlfusion completion {shorten(' '.join(arguments))}".rstrip()
        raise ConfigError(f"{told}: expected one of {', '.join(SHELLS)}")
    if arguments[0] not in SHELLS:
        raise unknown("shell", arguments[0], SHELLS)
    print(SHELLS[arguments[0]](), end="")


def options() -> dict[str, list[str]]:
    """The options of each command, in the order of its page."""
    pages = sorted(help_pages.FOLDER.glob("*.txt"))
    found = {page.stem: OPTION.findall(page.read_text(encoding="utf-8")) for page in pages if page.stem != "rlfusion"}
    found["doctor"] = found["finetune"]
    return {command: list(dict.fromkeys(["--help", *told])) for command, told in found.items()}


def values() -> dict[str, list[str]]:
    """The names that an option takes, of what is built in or installed."""
    return {option.split()[-1]: registry.names() for registry, option in DOORS.values()}


def _bash() -> str:
    lines = [
        f'    {option}) COMPREPLY=($(compgen -W "{" ".join(names)}" -- "$cur")); return ;;'
        for option, names in values().items()
    ]
    cases = [
        f'    {command}) COMPREPLY=($(compgen -W "{" ".join(told)}" -- "$cur")) ;;'
        for command, told in options().items()
    ]
    return BASH.format(commands=" ".join(options()), values="\n".join(lines), options="\n".join(cases))


def _fish() -> str:
    lines = ["complete -c rlfusion -n __fish_use_subcommand -f -a '" + " ".join(options()) + "'"]
    names = values()
    for command, told in options().items():
        for option in told:
            taken = f" -x -a '{' '.join(names[option])}'" if option in names else ""
            lines.append(f"complete -c rlfusion -n '__fish_seen_subcommand_from {command}' -l {option[2:]}{taken}")
    return "\n".join(lines) + "\n"


SHELLS = {"bash": _bash, "zsh": lambda: ZSH + _bash(), "fish": _fish}
