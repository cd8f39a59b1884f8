"""A run of a comparison in a process of its own: ``python -m rlfusion.cli.member FOLDER``.

Its settings are those of FOLDER/config.yaml, and it ends as ``rlfusion finetune`` does, with the same exit codes. Its
standard input is a pipe of the comparison's process: where that is gone, it ends, too, as by a SIGTERM: with its work
saved.
"""

import os
import signal
import sys
import threading
from pathlib import Path

from rlfusion.cli.main import guarded
from rlfusion.common.stops import Entry


def main(arguments: list[str]) -> int:
    """Do the run of the folder that is the one argument; the exit code."""
    entry = Entry()
    entry.install()
    threading.Thread(target=_with_parent, daemon=True).start()
    return guarded(_run, arguments, entry)


def _with_parent() -> None:
    while os.read(0, 1024):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


def _run(arguments: list[str]) -> int:
    from dataclasses import asdict

    from rlfusion.cli.arguments import settings_of
    from rlfusion.common.code_files import pinned
    from rlfusion.common.progress import Progress
    from rlfusion.common.stops import Signals
    from rlfusion.jobs import finetune
    from rlfusion.training.folders import locked

    folder = Path(arguments[0])
    settings = settings_of("finetune", ["--config", str(folder / "config.yaml")])
    progress = Progress()
    with Signals() as signals, locked(folder, signals, progress.say), pinned(asdict(settings)):
        finetune.finetune(settings, folder, signals, progress)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
