"""Adapters that lie on the hub, by ``OWNER/NAME[:FILE][@REVISION]``: which file is meant, and that it is here.

Without a file it is diffusers' own name, peft's, or the only ``.safetensors`` of the repository. Where the hub cannot
be reached its cache on this machine answers (``common.hub``).
"""

import re
from pathlib import Path, PurePosixPath
from typing import Any

from rlfusion.common import hub
from rlfusion.common.errors import LONGEST_PATH, ConfigError, shorten

NAMED = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(:(?P<file>[^:@]+\.safetensors))?(@(?P<revision>[^:@]+))?")
SUFFIX = ".safetensors"
SHOWN = 5
"""Files of a repository that an error names."""


def is_named(text: str) -> bool:
    """Whether a text, where nothing lies here, may be a name on the hub: ``runs/NAME`` never is one."""
    held = NAMED.fullmatch(text)
    return held is not None and not held["repo"].endswith(SUFFIX) and not text.startswith((".", "runs/"))


def fetched(text: str, usual: tuple[str, ...], settings: str) -> Path:
    """The file of adapters that ``text`` names, from the hub or from its cache here.

    Args:
        usual: the names that are taken where the text has no file; beside the last of them lie its ``settings``.

    Raises:
        ConfigError: there is none, or which of several is meant is open.
    """
    import huggingface_hub

    held = NAMED.fullmatch(text)
    assert held  # ``is_named`` comes first
    about = {"repo_id": held["repo"], "revision": held["revision"]}
    try:
        with hub.fetching():
            name = held["file"] or _meant(text, _files(huggingface_hub, about), usual)
            place = Path(huggingface_hub.hf_hub_download(filename=name, **about))
            if PurePosixPath(name).name == usual[-1]:
                huggingface_hub.hf_hub_download(filename=str(PurePosixPath(name).with_name(settings)), **about)
    except ConfigError:
        raise
    except Exception as error:  # the hub's client has dozens of errors of its own, and those of the network beside them
        raise ConfigError(
            f"adapters = {shorten(repr(text), LONGEST_PATH)}: no file or folder here, and not to be had from the hub "
            f"({shorten(hub.failed(error), 200)}): expected a {SUFFIX} file, or OWNER/NAME[:FILE][@REVISION]"
        ) from error
    return place


def _files(library: Any, about: dict[str, Any]) -> list[str]:
    """The names of the files of weights in a repository; of those in the cache alone, where it cannot be reached."""
    if not hub.unreachable():
        names = library.HfApi().list_repo_files(**about)
    else:
        folder = Path(library.snapshot_download(local_files_only=True, **about))
        names = [file.relative_to(folder).as_posix() for file in folder.rglob("*")]
    return sorted(name for name in names if name.endswith(SUFFIX))


def _meant(text: str, names: list[str], usual: tuple[str, ...]) -> str:
    found = next((name for name in usual if name in names), names[0] if len(names) == 1 else "")
    if not found:
        some = ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
        held = f"it holds {some}" if names else f"it holds no {SUFFIX}"
        raise ConfigError(f"adapters = {shorten(repr(text), LONGEST_PATH)}: {held}: expected OWNER/NAME:FILE")
    return found
