"""The runtime environment of a job: how rlfusion, its libraries, the settings and their files come to the nodes.

pip, uv      the working directory (rlfusion itself, the order, the files), and the libraries that Ray installs
none         the working directory alone
container    an image that has rlfusion; Ray gives it no working directory, so the order goes in a variable
"""

import base64
import io
import json
import re
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rlfusion.common.errors import ConfigError, unknown
from rlfusion.config.launch import Launch
from rlfusion.jobs.launch import wheel
from rlfusion.jobs.launch.arrival import FILE, VARIABLE

MOST_IN_VARIABLE = 64 * 2**10
THE_PAST = (1980, 1, 1, 0, 0, 0)
NOT_INSTALLED = ("ray",)
"""What the nodes have, and Ray refuses to see replaced."""


def packed(files: Mapping[str, bytes]) -> bytes:
    """A zip of files, by path; the same files give the same bytes."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(files):
            info = zipfile.ZipInfo(path, THE_PAST)
            info.external_attr, info.compress_type = 0o644 << 16, zipfile.ZIP_DEFLATED
            archive.writestr(info, files[path])
    return stream.getvalue()


def requirements(extras: Iterable[str]) -> list[str]:
    """What rlfusion, with these extras, needs beside Ray.

    Raises:
        ConfigError: no such extra.
    """
    from packaging.requirements import Requirement

    made = wheel.installed()
    known, extras = made.metadata.get_all("Provides-Extra") or [], list(extras)
    for extra in extras:
        if extra not in known:
            raise unknown("extra", extra, known)
    needed = []
    for requirement in map(Requirement, made.requires or []):
        marker = str(requirement.marker or "")
        wanted = "extra ==" not in marker or any(requirement.marker.evaluate({"extra": extra}) for extra in extras)
        if wanted and requirement.name not in (*NOT_INSTALLED, wheel.NAME):
            requirement.marker = None if "extra ==" in marker else requirement.marker
            needed.append(str(requirement))
    return list(dict.fromkeys(needed))


def runtime_env(settings: Launch, order: Mapping[str, Any], files: Mapping[str, bytes], place: Path) -> dict[str, Any]:
    """What Ray calls runtime_env. ``order`` is what ``arrival`` reads, ``files`` are the run's inputs, and in ``place``
    the working directory is packed.

    Raises:
        ConfigError: files that are too large for a container's variable, or an extra that rlfusion has not.
    """
    variables = {"RAY_JOB_STOP_WAIT_TIME_S": str(settings.patience_s)}
    text = json.dumps(order, sort_keys=True)
    if settings.env == "container":
        parcel = base64.b64encode(packed({FILE: text.encode(), **files})).decode()
        if len(parcel) > MOST_IN_VARIABLE:
            raise ConfigError(
                f"{len(parcel) >> 10} KiB of files would have to travel into a container, at most "
                f"{MOST_IN_VARIABLE >> 10} can: expected them on storage that the nodes share, below --shared FOLDER"
            )
        mounted = [option for folder in _mounted(settings, order) for option in ("-v", f"{folder}:{folder}")]
        image = {"image": settings.image, "run_options": mounted}
        return {"container": image, "env_vars": {**variables, VARIABLE: parcel}}
    archive = place / "rlfusion-job.zip"
    archive.write_bytes(packed({**wheel.files(), FILE: text.encode(), **files}))
    made: dict[str, Any] = {"working_dir": str(archive), "env_vars": variables}
    if settings.env in ("pip", "uv"):
        packages = [*requirements(settings.extras), *settings.packages]
        made[settings.env] = {"packages": packages} | ({"uv_pip_install_options": []} if settings.env == "uv" else {})
    return made


def _mounted(settings: Launch, order: Mapping[str, Any]) -> list[str]:
    """The folders of the node that a container sees."""
    found = [str(Path(order["folder"]).parent), *(str(Path(folder).absolute()) for folder in settings.shared)]
    for folder in found:
        if not re.fullmatch(r"[\w./+@-]+", folder):
            raise ConfigError(f"folder {folder!r}: expected a name without spaces and signs, as it goes to podman")
    return list(dict.fromkeys(found))
