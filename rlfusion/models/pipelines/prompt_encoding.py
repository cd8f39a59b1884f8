"""The text of a file of prompts: its encoding, by its first bytes or as told."""

import codecs
import re
from pathlib import Path

from rlfusion.common.errors import ConfigError

BOMS = {
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
"""What the first bytes of a file say; those of UTF-32 begin as those of UTF-16."""


def decoded(path: Path, where: str, encoding: str) -> str:
    """The text of a file, without the mark at its beginning.

    Raises:
        ConfigError: no such encoding, or bytes that are not of it.
    """
    data = path.read_bytes()
    bom = next((bom for bom in BOMS if data.startswith(bom)), b"")
    told = BOMS.get(bom, "utf-8")
    if encoding:
        told = _codec(encoding)
        if bom and not told.startswith(BOMS[bom]):
            raise ConfigError(f"encoding = {encoding!r}: {where} begins with the mark of {BOMS[bom]}, expected that")
    try:
        return data.decode(told).removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = len(re.findall(rb"\r\n|\r|\n", data[: error.start])) + 1
        raise ConfigError(
            f"{where}, line {line}: byte 0x{data[error.start]:02X} at {error.start} is no {told} ({error.reason}): "
            "expected UTF-8, or the file's own pipeline.encoding, such as latin-1 or cp1252"
        ) from error


def _codec(encoding: str) -> str:
    try:
        "".encode(encoding)  # also refuses codecs that are of no text
        return codecs.lookup(encoding).name
    except (LookupError, ValueError) as error:
        raise ConfigError(f"encoding = {encoding!r}: expected one such as utf-8, utf-16, latin-1, cp1252") from error
