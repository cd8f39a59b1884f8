"""``rlfusion board``: TensorBoard on runs, at a page that shows how far they have come."""

import os
import threading
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote

from rlfusion.common.errors import ConfigError
from rlfusion.common.stops import Signals, StopRequested
from rlfusion.config.board import Board
from rlfusion.jobs.board_columns import plugins

EVENTS = "events.out.tfevents.*"
KEPT = "images=100,text=100"
"""Pictures and texts of a tag that TensorBoard keeps: its slider then plays a whole training."""
ONE_COLOUR = r"^(.*?)(?:-seed\d+.*)?$"
"""Runs have one colour that have this in common: all but their seeds. Every name has it: TensorBoard draws what has
none in one pale grey.
"""
AS_IS = "smoothing=0"
"""Lines go through the values: of a few evaluations TensorBoard's own smoothing shows less than half of a rise."""
LOOK_S = 0.2


def board(settings: Board, say: Callable[[str], None] = print) -> None:
    """Serve TensorBoard until a signal.

    Raises:
        ConfigError: no run in one of the folders, or an address that cannot be listened on.
    """
    logdirs = [_with_runs(Path(text)) for text in settings.runs]
    with Signals() as signals:
        try:
            say(f"TensorBoard of {', '.join(settings.runs)}: {_launched(settings, logdirs)} (Ctrl-C ends it)")
            while not signals.requested:
                threading.Event().wait(LOOK_S)
        except StopRequested as stop:
            stop.arrived()


def _with_runs(folder: Path) -> Path:
    if not folder.is_dir():
        raise ConfigError(f"run {str(folder)!r} does not exist: expected the folder of a run, or of runs")
    if next(folder.rglob(EVENTS), None) is None:
        raise ConfigError(f"{str(folder)!r} holds no run: expected TensorBoard's files ({EVENTS}) in it or below it")
    return folder


def _launched(settings: Board, logdirs: list[Path]) -> str:
    """Start TensorBoard in a thread; the address of its page."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # it says that TensorFlow is not installed
    from tensorboard import program

    one = len(logdirs) == 1
    spec = str(logdirs[0]) if one else ",".join(f"{folder.name}:{folder}" for folder in logdirs)
    server = program.TensorBoard(plugins())
    words = [f"--{'logdir' if one else 'logdir_spec'}", spec, "--host", settings.host, "--samples_per_plugin", KEPT]
    words += ["--load_fast", "false"]  # the other loader says on stderr that it is one
    server.configure(argv=["tensorboard", *words, *(["--port", str(settings.port)] if settings.port else [])])
    try:
        address = server.launch()
    except program.TensorBoardServerException as error:
        raise ConfigError(f"host, port = {settings.host!r}, {settings.port}: {' '.join(str(error).split())}") from error
    shown = f"tagFilter={quote(settings.filter)}&" if settings.filter else ""
    return f"{address}?{shown}{AS_IS}&runColorGroup={quote(f'regex:{ONE_COLOUR}')}#timeseries"
