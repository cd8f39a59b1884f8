"""Adapters that lie on the hub, by ``OWNER/NAME[:FILE][@REVISION]``: which file is meant, and that it is here.

Without a file it is diffusers' own name, peft's, or the only ``.safetensors`` of the repository. Where the hub cannot
be reached its cache on this machine answers (``common.hub``). It does not say what else the repository holds, so that
without a file it is then diffusers' own name, or a refusal.
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
            name = held["file"] or _meant(huggingface_hub, text, about, usual)
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


def _meant(library: Any, text: str, about: dict[str, Any], usual: tuple[str, ...]) -> str:
    """The file of weights that a repository's name alone means: of the cache, where the hub cannot be reached, the one
    that would be the first choice whatever else there is.

    Raises:
        ConfigError: it is open which.
    """
    what = f"adapters = {shorten(repr(text), LONGEST_PATH)}"
    if hub.unreachable():
        if isinstance(library.try_to_load_from_cache(filename=usual[0], **about), str):
            return usual[0]
        raise ConfigError(
            f"{what}: the hub cannot be reached, and its cache here does not say which files there are: expected "
            "OWNER/NAME:FILE, of a file that is in the cache"
        )
    names = sorted(name for name in library.HfApi().list_repo_files(**about) if name.endswith(SUFFIX))
    found = next((name for name in usual if name in names), names[0] if len(names) == 1 else "")
    if not found:
        some = ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
        held = f"it holds {some}" if names else f"it holds no {SUFFIX}"
        raise ConfigError(f"{what}: {held}: expected OWNER/NAME:FILE")
    return found
