"""Where the threads of processes stood when they were given up, kept in the run's folder."""

import time
from collections.abc import Mapping
from itertools import count
from pathlib import Path

from rlfusion.common import storage

FOLDER = "stacks"


def write_stacks(folder: Path, who: str, stacks: Mapping[int, str]) -> Path:
    """Write what each process of ``who`` said of its threads, by number, to a new file of the run in ``folder``.

    Raises:
        StorageError: it cannot be written.
    """
    held = storage.make_folder(folder / FOLDER)
    file = next(path for n in count(1) if not (path := held / f"{who}-{n}.txt").exists())
    parts = [f"{who} {number}\n{text}" for number, text in sorted(stacks.items())]
    storage.write(file, time.strftime("%Y-%m-%d %H:%M:%S\n\n") + "\n".join(parts))
    return file
