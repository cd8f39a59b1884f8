"""Whether a reward's runtime environment can be made on this machine: asked before Ray tries, minutes and retries long.

``pip`` and ``uv`` environments are made by Ray with virtualenv, which it does not install; where this process runs in a
virtual environment Ray clones that whole and calls its pip. A ``py_executable`` is an environment that exists already;
its Python and Ray must be ours, as Ray's processes speak to none of another version.
"""

import importlib.util
import json
import shlex
import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

from rlfusion.common.errors import ConfigError

INSTALLERS = ("pip", "uv")
PATIENCE_S = 60.0
ASK = (
    "import json, sys, importlib.metadata as m, rlfusion; "
    "print(json.dumps({'Python': '.'.join(map(str, sys.version_info[:2])), 'Ray': m.version('ray')}))"
)
"""What a Python is asked to print of itself."""


def require_possible(name: str, env: Mapping[str, Any]) -> None:
    """Refuse the runtime environment of the reward ``name`` where this machine cannot make it.

    Raises:
        ConfigError: says what is missing.
    """
    where = f"ray.reward_envs[{name!r}]"
    _require_installer(where, env)
    if "py_executable" in env:
        _require_ours(where, str(env["py_executable"]))


def _require_installer(where: str, env: Mapping[str, Any]) -> None:
    for key in INSTALLERS:
        needed = ["virtualenv", "pip"] if sys.prefix != sys.base_prefix else ["virtualenv"]
        missing = [module for module in needed if importlib.util.find_spec(module) is None]
        if key in env and missing:
            raise ConfigError(
                f"{where}: {key} needs {' and '.join(missing)}, which {sys.executable} has not: expected "
                "pip install 'rlfusion[envs]', or py_executable, the Python of an environment of your own"
            )


def _require_ours(where: str, executable: str) -> None:
    message = f"{where}: py_executable = {executable!r}"
    try:
        ran = subprocess.run([*shlex.split(executable), "-c", ASK], capture_output=True, text=True, timeout=PATIENCE_S)
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        raise ConfigError(f"{message} cannot be run ({error})") from error
    try:
        theirs = json.loads(ran.stdout)
    except ValueError:
        reason = (ran.stderr.strip().splitlines() or [f"exit code {ran.returncode}"])[-1]
        raise ConfigError(f"{message} has not what a reward needs ({reason}): expected rlfusion in it") from None
    ours = {"Python": ".".join(map(str, sys.version_info[:2])), "Ray": version("ray")}
    for key, wanted in ours.items():
        if theirs[key] != wanted:
            raise ConfigError(f"{message} has {key} {theirs[key]}: expected {wanted}, as here")
