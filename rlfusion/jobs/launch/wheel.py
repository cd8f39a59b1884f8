"""The files of the wheel of this very rlfusion, however it is installed: from a wheel, or editable from a checkout.

They travel unpacked, in the working directory of a job, which is on Python's path there: nothing is built or installed.
"""

import base64
import hashlib
import importlib.util
from collections.abc import Iterator
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from rlfusion.common.errors import ConfigError

NAME = "rlfusion"
APART = ("envs", "rewards", "agents")
"""Packages whose folders lie beside that of the package in a checkout."""
HELD = (".py", ".txt", ".html")
"""Suffixes of what it holds: the code, the pages of --help, and the template of a report."""
WHEEL = f"Wheel-Version: 1.0\nGenerator: {NAME}\nRoot-Is-Purelib: true\nTag: py3-none-any\n"


def files() -> dict[str, bytes]:
    """What each file of the wheel holds, by its path in the wheel."""
    found: dict[str, bytes] = {}
    for package in (NAME, *(f"{NAME}.{name}" for name in APART)):
        for path, held in _sources(package):
            found[path] = held
    made = installed()
    about = f"{NAME}-{made.version}.dist-info"
    points = made.read_text("entry_points.txt")
    found |= {f"{about}/METADATA": metadata(made).encode(), f"{about}/WHEEL": WHEEL.encode()}
    found |= {f"{about}/entry_points.txt": points.encode()} if points else {}
    lines = [f"{path},sha256={_hash(held)},{len(held)}" for path, held in found.items()]
    return found | {f"{about}/RECORD": "\n".join([*lines, f"{about}/RECORD,,", ""]).encode()}


def installed() -> Distribution:
    """The installed rlfusion.

    Raises:
        ConfigError: it is imported from a folder that nobody installed.
    """
    try:
        return distribution(NAME)
    except PackageNotFoundError as error:
        raise ConfigError(f"{NAME} is not installed here, only found: expected pip install {NAME}, or -e .") from error


def metadata(made: Distribution) -> str:
    """The METADATA of a distribution; a checkout has it under another name."""
    return made.read_text("METADATA") or made.read_text("PKG-INFO") or ""


def _sources(package: str) -> Iterator[tuple[str, bytes]]:
    """(path in the wheel, bytes) of each file of a package."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(f"no package {package!r} here: expected {NAME} installed whole")
    folder = Path(spec.submodule_search_locations[0])
    for file in sorted(folder.rglob("*")):
        if file.is_file() and (file.suffix in HELD or file.name == "py.typed"):
            yield "/".join((*package.split("."), *file.relative_to(folder).parts)), file.read_bytes()


def _hash(held: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(held).digest()).rstrip(b"=").decode()
