"""Environments of the kits of rewards: made once in a cache folder, and started from there.

    FOLDER/NAME                 the environment; FOLDER/NAME/kit.json is written last, when it is whole
    FOLDER/NAME/rlfusion-*.whl  this very rlfusion, which is installed in it

``FOLDER`` is that of ``place``. An environment that was cut short, or is of other requirements or another rlfusion, is
not used, and made anew.
"""

import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rlfusion.common import storage
from rlfusion.common.errors import ConfigError, UnavailableError
from rlfusion.jobs.launch import wheel
from rlfusion.rewards.kit import KITS, Kit, find

STAMP, MARK = "kit.json", ".rlfusion-kit"
"""What a whole environment says of itself; and what says, from its first moment on, that a folder is one."""
PYTHON = "3.11"
"""The version that the pinned packages have wheels for; uv finds or fetches it, venv takes the one that runs."""
VARIABLE = "RLFUSION_REWARD_ENVS"
SHOWN = 600
"""Characters of what an installer says that an error tells."""


class KitUnavailable(UnavailableError):
    """An environment cannot be made: no installer, no network, or packages that do not fit."""


def place() -> Path:
    """The folder of all environments: that of the environment variable, else in the user's cache."""
    told = os.environ.get(VARIABLE)
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return (Path(told).expanduser() if told else Path(cache) / "rlfusion" / "reward-envs").absolute()


@dataclass(frozen=True)
class Environment:
    """That of a kit."""

    kit: Kit
    folder: Path

    @classmethod
    def of(cls, name: str) -> "Environment":
        """The one of the kit of that name.

        Raises:
            ConfigError: there is no such kit.
        """
        return cls(find(name), place() / name)

    @property
    def python(self) -> Path:
        """Its interpreter."""
        return self.folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")

    @property
    def stamp(self) -> dict[str, str]:
        """What a whole environment of today's requirements says of itself."""
        made = _wheel()
        held = {"requirements": self.kit.requirements, "rlfusion": hashlib.sha256(made).hexdigest()}
        return {name: value if name == "rlfusion" else _sha(value) for name, value in held.items()}

    @property
    def state(self) -> str:
        """``installed``, ``outdated`` or ``not installed``."""
        try:
            held = json.loads((self.folder / STAMP).read_text())
        except (OSError, ValueError):
            return "not installed"
        return "installed" if held == self.stamp and self.python.exists() else "outdated"

    def commands(self) -> list[list[str]]:
        """What makes it: uv, where that is installed, else venv and pip."""
        reqs, made = self.folder / "requirements.txt", f"{self.folder / _wheel_name()}[serve]"
        if uv := shutil.which("uv"):
            install = [uv, "pip", "install", "--python", str(self.python), "-r", str(reqs), made]
            return [[uv, "venv", "--allow-existing", "--python", PYTHON, str(self.folder)], install]
        if find_spec("ensurepip") is None:
            raise KitUnavailable("neither uv nor ensurepip is here: expected pip install uv")
        return [
            [sys.executable, "-m", "venv", str(self.folder)],
            [str(self.python), "-m", "pip", "install", "-r", str(reqs), made],
        ]


def _sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _wheel_name() -> str:
    return f"{wheel.NAME}-{wheel.installed().version}-py3-none-any.whl"


def _wheel() -> bytes:
    """This rlfusion as a wheel, of the same bytes each time."""
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w", zipfile.ZIP_DEFLATED) as made:
        for path, content in wheel.files().items():
            made.writestr(zipfile.ZipInfo(path), content)
    return held.getvalue()


def install(name: str, dry: bool, say: Callable[[str], None], anew: bool = False) -> Environment:
    """Make the environment of a kit, unless it is there; ``dry`` only says how.

    Raises:
        ConfigError: no such kit.
        KitUnavailable: an installer fails.
    """
    made = Environment.of(name)
    if made.state == "installed" and not anew:
        say(f"{name} is installed in {made.folder}")
        return made
    commands = made.commands()
    for line in (f"{name}: {made.kit.gives}", f"licence: {made.kit.licence}", f"into {made.folder}:"):
        say(line)
    for command in commands:
        say("  " + " ".join(command))
    say(f"weights: {made.kit.weights or 'none'}, downloaded when it is first served")
    if dry:
        return made
    if made.folder.exists():
        if not (made.folder / MARK).is_file() and any(made.folder.iterdir()):
            raise ConfigError(f"{made.folder} holds other things than an environment of a kit: expected it empty")
        shutil.rmtree(made.folder)
    storage.make_folder(made.folder)
    storage.write(made.folder / MARK, name)
    storage.write(made.folder / "requirements.txt", made.kit.requirements)
    storage.write(made.folder / _wheel_name(), _wheel())
    for command in commands:
        _run(command, name, made.folder)
    storage.write(made.folder / STAMP, json.dumps(made.stamp))
    say(f"{name} is installed; rlfusion rewards serve {name} starts it")
    return made


def _run(command: Sequence[str], name: str, folder: Path) -> None:
    """Installers read settings of the folder that they run in: there are none in that of the environment."""
    how: dict[str, Any] = {"capture_output": True, "text": True, "stdin": subprocess.DEVNULL, "check": False}
    try:
        done = subprocess.run(command, cwd=folder, **how)
    except OSError as error:
        raise KitUnavailable(f"the kit {name!r} cannot be installed: {command[0]}: {error}") from error
    if done.returncode:
        said = " ".join((done.stderr or done.stdout).split())[-SHOWN:]
        raise KitUnavailable(f"the kit {name!r} cannot be installed: {command[0]} ended with {done.returncode}: {said}")


def serving(name: str, words: Sequence[str]) -> list[str]:
    """The command that serves a kit, with further ``words`` of ``serve-reward``; on the loopback, unless they say
    otherwise, which takes a token.

    Raises:
        ConfigError: no such kit, or one whose environment is not there.
    """
    made = Environment.of(name)
    if (state := made.state) != "installed":
        raise ConfigError(f"the kit {name!r} is {state}: expected rlfusion rewards install {name} before")
    return [str(made.python), "-I", "-m", "rlfusion", "serve-reward", made.kit.reward, *words]


def listed() -> list[tuple[Kit, str]]:
    """All kits, each with the state of its environment."""
    return [(kit, Environment.of(name).state) for name, kit in KITS.items()]
