"""What a job runs first, on the head node: ``python -m rlfusion.jobs.launch.arrival finetune /shared/runs/NAME``.

It reads the order that came along, puts the files of the run where its settings call them (``root/cache/inputs``), and
becomes ``rlfusion supervise`` of the run: a new one, or one to go on with. It needs neither torch nor Ray.
"""

import base64
import importlib.util
import io
import json
import os
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlfusion import __version__
from rlfusion.common import storage
from rlfusion.common.errors import ConfigError, RlfusionError, UnavailableError, foreseen

FILE = "order.json"
VARIABLE = "RLFUSION_ORDER"
SETTINGS = "config.yaml"


def prepare(place: Path) -> list[str]:
    """Take what came along in the folder ``place``; the rlfusion command that does what was ordered.

    Raises:
        ConfigError: another version of rlfusion, no Ray in this Python, or a folder that is another run's.
        StorageError: the run's root cannot be written to.
    """
    order: dict[str, Any] = json.loads((place / FILE).read_text())
    if order["version"] != __version__:
        raise ConfigError(
            f"rlfusion {__version__} is here, the job was launched by {order['version']}: expected the same version in "
            "the container's image"
        )
    if importlib.util.find_spec("ray") is None or importlib.util.find_spec("torch") is None:
        raise UnavailableError(
            f"{sys.executable} on the head node has no Ray, or no torch: expected --python PATH of the one that has "
            "them, or the head node started in its environment, or --env pip"
        )
    folder = Path(order["folder"])
    _keep(place / "inputs", folder.parent / "cache" / "inputs")
    return ["supervise", *_options(order["supervise"]), "--", *_command(order, folder, place)]


def _command(order: Mapping[str, Any], folder: Path, place: Path) -> list[str]:
    """The command of the run: to go on with it where it has begun, else a new one.

    Raises:
        ConfigError: there is a run of that name that is not to be gone on with, or none that is.
    """
    begun = any((folder / name).is_file() for name in ("config.yaml", "run.json"))
    kept = folder.parent / "cache" / "launched" / f"{folder.name}.yaml"
    if begun and order["attempt"] > 1:
        changes = [word for change in order["changes"] for word in ("--change", change)]
        return [order["command"], "--resume", str(folder), *changes]
    if begun:
        raise ConfigError(
            f"{folder} is there already: expected another --name, or --resume {folder} to go on with that run"
        )
    if order["attempt"] == 1:
        storage.make_folder(kept.parent)
        storage.write(kept, (place / SETTINGS).read_bytes())
    elif not kept.is_file():
        raise ConfigError(f"--resume {str(folder)!r}: no run is there on the head node, expected the folder of one")
    return [order["command"], "--config", str(kept)]


def _options(supervise: Mapping[str, Any]) -> list[str]:
    return [word for name, value in supervise.items() for word in (f"--{name}", str(value))]


def _keep(inputs: Path, kept: Path) -> None:
    """Copy each input below its SHA-256, whole or not at all; one that is there is the same."""
    for one in sorted(inputs.glob("*")):
        if (kept / one.name).exists():
            continue
        with storage.stored(kept / one.name):
            kept.mkdir(parents=True, exist_ok=True)
            part = Path(tempfile.mkdtemp(prefix=".part-", dir=kept))
            shutil.copytree(one, part / one.name)
            try:
                (part / one.name).rename(kept / one.name)
            except OSError:  # another job of the same file was faster
                if not (kept / one.name).exists():
                    raise
            shutil.rmtree(part, ignore_errors=True)


def _unpacked() -> Path:
    """The folder that holds what came along: the working directory, or what the variable holds."""
    if VARIABLE not in os.environ:
        return Path.cwd()
    place = Path(tempfile.mkdtemp(prefix="rlf-order-"))
    with zipfile.ZipFile(io.BytesIO(base64.b64decode(os.environ.pop(VARIABLE)))) as archive:
        archive.extractall(place)
    return place


def main(arguments: Sequence[str]) -> int:
    """Prepare, and become the run's supervisor."""
    try:
        command = prepare(_unpacked())
    except (RlfusionError, OSError) as error:
        known = foreseen(error) or error
        print(f"rlfusion: {known}", file=sys.stderr)
        return getattr(known, "exit_code", 1)
    print(f"rlfusion {' '.join(command)}", flush=True)
    os.execv(sys.executable, [sys.executable, "-P", "-m", "rlfusion", *command])
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
