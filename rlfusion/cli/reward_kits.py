"""``rlfusion rewards``: parse and print."""

import os
import sys
from collections.abc import Sequence

from rlfusion.common.errors import ConfigError, unknown

USAGE = """\
usage: rlfusion rewards [list]
           the kits of rewards, and which are installed
       rlfusion rewards show NAME
           what it is, its licence and its requirements
       rlfusion rewards install NAME [--dry_run] [--anew]
           make its environment; --dry_run says how, and makes nothing
       rlfusion rewards serve NAME [...]
           serve it from its environment; further words are of serve-reward

A kit is a reward whose packages want an environment of their own. These are in
~/.cache/rlfusion/reward-envs, or where the environment variable
RLFUSION_REWARD_ENVS says. A served reward is used by its address:
--reward http://127.0.0.1:8500."""

OPTIONS = {"list": (), "show": (), "install": ("--dry_run", "--anew")}


def rewards(arguments: Sequence[str]) -> int:
    """List, show, install or serve kits.

    Raises:
        ConfigError: another word or option, or no such kit.
        KitUnavailable: an installer fails.
    """
    from rlfusion.cli import shown
    from rlfusion.jobs import reward_kits
    from rlfusion.rewards.kit import find

    action, *rest = arguments or ["list"]
    if {"-h", "--help"} & set(arguments[:2]):
        print(USAGE)
        return 0
    if action not in ACTIONS:
        raise unknown("word after rlfusion rewards", action, ACTIONS)
    names = [word for word in rest[:1] if not word.startswith("-")]
    words = rest[len(names) :]
    if (action == "list") == bool(names):
        raise ConfigError(f"rlfusion rewards {action}: expected {'no name' if names else 'the name of a kit'}")
    if action in OPTIONS and (wrong := [word for word in words if word not in OPTIONS[action]]):
        raise unknown(f"option of rlfusion rewards {action}", wrong[0], OPTIONS[action])
    if action == "list":
        rows = [(kit.name, state, kit.gives) for kit, state in reward_kits.listed()]
        shown.texts(None, "", ("kit", "state", "what it gives"), rows)
    elif action == "show":
        kit = find(names[0])
        for what in ("gives", "interface", "licence", "weights", "device", "reward"):
            print(f"{what:10} {getattr(kit, what)}")
        print("requirements.txt:", *kit.requirements.split(), sep="\n  ")
    elif action == "install":
        reward_kits.install(names[0], "--dry_run" in words, print, "--anew" in words)
    else:
        command = reward_kits.serving(names[0], words)
        sys.stdout.flush()
        os.execv(command[0], command)
    return 0


ACTIONS = ("list", "show", "install", "serve")
