"""The user's own code: what it raises becomes one line with its file and line, and its own frames of the traceback.

A frame is the user's where its file is neither of this package, of Python, nor of an installed library. Of a reward
that is itself installed as a library the frames are in that library: all count but those that rlfusion itself calls.
"""

import sysconfig
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rlfusion.common.errors import ConfigError, RlfusionError, UserCodeError

_PACKAGE = Path(__file__).resolve().parents[1]
_OURS = tuple(f"{folder}/" for folder in (_PACKAGE, *(_PACKAGE.parent / n for n in ("rewards", "agents", "envs"))))
_LIBRARIES = tuple(f"{Path(sysconfig.get_path(name)).resolve()}/" for name in ("purelib", "platlib"))
_PYTHON = tuple(f"{Path(sysconfig.get_path(name)).resolve()}/" for name in ("stdlib", "platstdlib"))
_USED = set(
    [
        "PIL",
        "accelerate",
        "diffusers",
        "huggingface_hub",
        "lpips",
        "numpy",
        "open_clip",
        "peft",
        "python",
        "ray",
        "safetensors",
        "sklearn",
        "tokenizers",
        "torch",
        "torchvision",
        "transformers",
        "urllib3",
    ]
)
"""Libraries that rlfusion itself calls."""


@contextmanager
def running(what: str) -> Iterator[None]:
    """Within the context the user's code ``what`` runs.

    Raises:
        UserCodeError: an error of its own, or of what it called. An error without a frame of the user's is not theirs,
            and passes with a note; so do the errors that rlfusion raises on purpose.
    """
    try:
        yield
    except RlfusionError:
        raise
    except (Exception, SystemExit) as error:
        frames = _frames(error)
        if not frames and not isinstance(error, SystemExit):
            error.add_note(f"raised by {what}")
            raise
        wrapped = UserCodeError(f"{what}: {described(error)}{_place(frames)}")
        wrapped.frames = _shown(frames, error)
        raise wrapped from error


@contextmanager
def called(what: str) -> Iterator[None]:
    """Within the context the user's code ``what`` is called, and nothing else is done.

    Raises:
        UserCodeError: an error without any frame below the call, as compiled code raises it (``functools.lru_cache``,
            an extension module); all others pass.
    """
    try:
        yield
    except RlfusionError:
        raise
    except Exception as error:
        caller = error.__traceback__ and error.__traceback__.tb_next  # the first is this frame
        if caller is None or caller.tb_next is None:
            raise UserCodeError(f"{what}: {described(error)} (in compiled code)") from error
        raise


@contextmanager
def loading(what: str) -> Iterator[None]:
    """Within the context a file of the user's code is read and made a module.

    Raises:
        ConfigError: it has a syntax error, needs what is not there, or raises; its line and the user's frames.
    """
    try:
        yield
    except RlfusionError:
        raise
    except (Exception, SystemExit) as error:
        frames = _frames(error)
        place = "" if isinstance(error, SyntaxError) else _place(frames)
        wrapped = ConfigError(f"{what} cannot be loaded: {described(error)}{place}")
        wrapped.frames = _shown(frames, error)
        raise wrapped from error


def blamed(error: Exception) -> UserCodeError | None:
    """What is said of an error that nobody foresaw and that passed through the user's own code; None for others."""
    frames = _frames(error)
    if not frames:
        return None
    wrapped = UserCodeError(f"{described(error)}{_place(frames)}")
    wrapped.frames = _shown(frames, error)
    return wrapped


def described(error: BaseException) -> str:
    """An error's type and message, in one line; of the user's own code, what is said of it."""
    if isinstance(error, UserCodeError):
        return str(error)
    if isinstance(error, SystemExit):
        return f"it calls sys.exit({error.code!r})"
    return f"{type(error).__name__}: {' '.join(str(error).split())}".removesuffix(": ")


def _frames(error: BaseException) -> list[traceback.FrameSummary]:
    """The user's frames of a traceback, the outermost first."""
    frames = [(Path(f.filename).resolve(), f) for f in traceback.extract_tb(error.__traceback__)]
    foreign = [(_library(path), f) for path, f in frames if path.is_file() and not str(path).startswith(_OURS)]
    own = [f for library, f in foreign if not library]
    return own or [f for library, f in foreign if library not in _USED]


def _library(path: Path) -> str:
    """The installed library that a file is of, "python" for Python itself, "" for none."""
    for folder in _LIBRARIES:
        if str(path).startswith(folder):
            return str(path).removeprefix(folder).partition("/")[0]
    return "python" if str(path).startswith(_PYTHON) else ""


def _place(frames: list[traceback.FrameSummary]) -> str:
    if not frames:
        return ""
    last = frames[-1]
    inside = f", in {last.name}" if last.name != "<module>" else ""
    return f" ({_short(last.filename)}, line {last.lineno}{inside})"


def _short(filename: str) -> str:
    """A path from the working directory on, where it lies below."""
    path, here = Path(filename), Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else filename


def _shown(frames: list[traceback.FrameSummary], error: BaseException) -> str:
    """The frames as a traceback has them, and of a syntax error the line of the file."""
    lines = traceback.format_list(frames)
    if isinstance(error, SyntaxError):
        lines += traceback.format_exception_only(error)[:-1]
    return "".join(lines).rstrip("\n")
