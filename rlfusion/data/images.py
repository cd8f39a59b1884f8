"""One image: opened, turned upright, brought to 8-bit RGB, cropped to its square. Or refused by its name.

What is done on the way beyond decoding is counted, so that the data set can say it in its line.
"""

import struct
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlfusion.common.errors import ConfigError
from rlfusion.common.notices import say_once

NO_PICTURES = {"EPS", "WMF", "MPEG", "BUFR", "GRIB", "HDF5", "IPTC", "FITS", "FLI", "DCX"}
"""Formats that Pillow names and that are no still images, or are drawn by another program (EPS by Ghostscript)."""

ONE_PICTURE = {"MPO", "ICO", "ICNS", "CUR", "PSD"}
"""Formats whose further frames are previews, other sizes or layers of the one picture."""

MOST_PIXELS = 89_478_485
"""Pillow's own limit (a quarter of a gigabyte of RGB): beyond it a small file may be a bomb."""

ALPHA = {"LA": "LA", "La": "LA", "PA": "RGBA", "RGBA": "RGBA", "RGBa": "RGBA"}
PLAIN = {"1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "HSV", "LAB"}
DEEP = {"I;16", "I;16L", "I;16B", "I;16N"}
ORIENTATION, BITS_PER_SAMPLE, PHOTOMETRIC = 274, 258, 262
TURNS = {
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}
"""What brings an image of an EXIF orientation upright."""
BROKEN_EXIF = (SyntaxError, ValueError, TypeError, KeyError, IndexError, OverflowError, OSError, struct.error)
"""What Pillow's reader of EXIF blocks raises."""


@dataclass
class Reader:
    """How images become samples; ``notes`` counts what was done to how many of them.

    Attributes:
        background: the colour that shows through transparent parts: a name ("white") or "#rrggbb".
        frames: "one" refuses animations and files of several pages, "first" takes their first picture.
    """

    background: str = "white"
    frames: str = "one"
    notes: Counter[str] = field(default_factory=Counter)

    def fitted(self, file: Path | bytes, where: str, size: int) -> np.ndarray:
        """The image in ``file``, named ``where``, as (3, size, size) float32 in [-1, 1].

        Raises:
            ConfigError: it cannot be read, or what it means is not known.
        """
        with opened(file, where) as image:
            return square(self.rgb(image, where), size)

    def rgb(self, image: Any, where: str) -> Any:
        """A PIL image upright in 8-bit sRGB, transparency over the background.

        Raises:
            ConfigError: it has several pictures, no known white, or too many pixels.
        """
        require_size(image, where)
        self._require_one(image, where)
        image.load()
        turn = self._turn(image)
        plain, alpha = self._eight_bits(image, where)
        coloured = self._srgb(plain, image.info.get("icc_profile"))
        shown = self._over_background(coloured, alpha)
        return shown if turn is None else shown.transpose(turn)

    def _require_one(self, image: Any, where: str) -> None:
        frames = getattr(image, "n_frames", 1)
        if frames == 1 or image.format in ONE_PICTURE:
            return
        if self.frames == "one":
            raise ConfigError(f"{where} holds {frames} pictures: expected one, or frames='first' to take its first")
        image.seek(0)
        self.notes["of several pictures (the first is taken)"] += 1

    def _turn(self, image: Any) -> Any | None:
        """What brings the pixels of an image upright, of PIL's Transpose; None for nothing."""
        from PIL import Image

        orientation, whole = exif_orientation(image)
        upright = "turned as far as they say" if orientation in TURNS else "taken as upright"
        if not whole:
            self.notes[f"with damaged EXIF data ({upright})"] += 1
        elif orientation not in (None, 1, *TURNS):
            self.notes[f"with an EXIF orientation outside of 1..8 ({upright})"] += 1
        if orientation not in TURNS:
            return None
        if whole:
            self.notes["turned upright (EXIF)"] += 1
        return Image.Transpose[TURNS[orientation]]

    def _eight_bits(self, image: Any, where: str) -> tuple[Any, Any | None]:
        """The image without transparency in a mode of 8 bits, and its opacity (mode L) if it is not all opaque."""
        key = image.info.get("transparency")
        if image.mode in DEEP or (image.mode == "I" and image.format in ("PNG", "PPM")):
            return self._sixteen_bits(image, key, where)
        if image.mode not in PLAIN and image.mode not in ALPHA:
            raise ConfigError(
                f"{where} has mode {image.mode!r}, whose white is not known: expected 1, 8 or 16 bits a channel, or "
                "the values in an .npz with its range"
            )
        if isinstance(key, tuple) and max(key) > 255:
            raise ConfigError(f"{where} marks a transparent colour of 16 bits: expected an alpha channel")
        if image.mode not in ALPHA and key is None:
            return image.convert("RGB") if image.mode in ("1", "P", "RGBX", "YCbCr", "HSV") else image, None
        if image.mode == "La":
            image = image.convert("LA")
        alpha = image.convert("RGBA").getchannel("A")
        plain = image.convert("L" if image.mode == "LA" else "RGBA")
        return (plain if plain.mode == "L" else plain.convert("RGB")), alpha

    def _sixteen_bits(self, image: Any, key: int | None, where: str) -> tuple[Any, Any | None]:
        from PIL import Image

        tags = getattr(image, "tag_v2", {})
        if set(np.atleast_1d(tags.get(BITS_PER_SAMPLE, 16))) != {16}:
            raise ConfigError(f"{where} has {tags[BITS_PER_SAMPLE]} bits a channel: expected 1, 8 or 16")
        deep = np.asarray(image).astype(np.uint32)
        if tags.get(PHOTOMETRIC) == 0:  # white is zero; Pillow turns only 8 bits round
            deep = 65535 - deep
        self.notes["of 16 bits brought to 8"] += 1
        alpha = None if key is None else Image.fromarray(np.where(deep == key, 0, 255).astype(np.uint8))
        return Image.fromarray(((deep + 128) // 257).astype(np.uint8)), alpha

    def _srgb(self, image: Any, profile: bytes | None) -> Any:
        """An image of mode L, RGB, CMYK or LAB in sRGB."""
        from PIL import ImageCms

        if image.mode == "LAB":
            return ImageCms.profileToProfile(
                image, ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB"), outputMode="RGB"
            )
        if profile is None:
            return image.convert("RGB")
        try:
            held = ImageCms.ImageCmsProfile(BytesIO(profile))
            if "srgb" in ImageCms.getProfileDescription(held).lower():
                return image.convert("RGB")
            converted = ImageCms.profileToProfile(image, held, ImageCms.createProfile("sRGB"), outputMode="RGB")
        except (ImageCms.PyCMSError, OSError):
            self.notes["with a colour profile that cannot be applied (read as sRGB)"] += 1
            return image.convert("RGB")
        self.notes["brought to sRGB from their colour profile"] += 1
        return converted

    def _over_background(self, image: Any, alpha: Any | None) -> Any:
        from PIL import Image

        if alpha is None or alpha.getextrema() == (255, 255):
            return image
        self.notes[f"with transparency, over {self.background}"] += 1
        return Image.composite(image, Image.new("RGB", image.size, colour(self.background)), alpha)


def exif_orientation(image: Any) -> tuple[Any, bool]:
    """The orientation that the EXIF data of a PIL image say (None for none), and whether they could be read whole."""
    from PIL import Image

    orientation = None
    with warnings.catch_warnings(record=True) as told:  # Pillow warns of a block that is cut, and reads what it can
        warnings.simplefilter("always")
        try:
            orientation = image.getexif().get(ORIENTATION)
            Image.Exif().load(image.info.get("exif") or b"")  # again: some were read, and warned of, while opening
        except BROKEN_EXIF:
            return orientation, False
    return orientation, not told


def colour(name: str) -> tuple[int, int, int]:
    """
    Raises:
        ConfigError: no opaque colour of this name.
    """
    from PIL import ImageColor

    try:
        found = ImageColor.getrgb(name)
    except (ValueError, AttributeError, TypeError) as error:
        raise ConfigError(f"background = {name!r}: expected a colour such as 'white' or '#808080'") from error
    if len(found) != 3:
        raise ConfigError(f"background = {name!r}: expected a colour without transparency")
    return found


def square(image: Any, size: int) -> np.ndarray:
    """An RGB image as (3, size, size) in [-1, 1]: resized (bicubic, shorter side), its middle cropped."""
    from PIL import Image, ImageOps

    cropped = ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
    return np.asarray(cropped, dtype=np.float32).transpose(2, 0, 1) / 127.5 - 1


def read_image(file: Path) -> Tensor:
    """The image in a file, (3, H, W) float32 in [0, 1], read as those of a data set are.

    Raises:
        ConfigError: no image there that can be read.
    """
    where, reader = f"image {str(file)!r}", Reader()
    with opened(file, where) as image:
        pixels = np.array(reader.rgb(image, where), dtype=np.float32)
    if reader.notes:
        say_once(f"{where}: {', '.join(sorted(reader.notes))}")
    return torch.from_numpy(pixels).permute(2, 0, 1) / 255


@contextmanager
def opened(file: Path | bytes, where: str) -> Iterator[Any]:
    """The PIL image in a file or in bytes.

    Raises:
        ConfigError: none there, or it breaks within the context; says ``where``.
    """
    from PIL import Image

    if isinstance(file, Path) and not file.is_file():
        raise ConfigError(f"{where} is no file: expected an image")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(BytesIO(file) if isinstance(file, bytes) else file, formats=list(formats())) as image:
                yield image
    except ConfigError:
        raise
    except Image.DecompressionBombError as error:
        raise ConfigError(f"{where} claims more than {2 * MOST_PIXELS:,} pixels: {_limit()}") from error
    except Exception as error:  # whatever the decoder of an image raises
        message = " ".join(str(error).split()) or "no message"
        raise ConfigError(f"{where} cannot be read as an image ({type(error).__name__}: {message[:200]})") from error


def require_size(image: Any, where: str) -> None:
    """
    Raises:
        ConfigError: more pixels than ``MOST_PIXELS``, or none.
    """
    width, height = image.size
    if not 0 < width * height <= MOST_PIXELS:
        raise ConfigError(f"{where} has {width} x {height} pixels: {_limit()}")


def _limit() -> str:
    return f"expected {MOST_PIXELS:,} at most (larger ones may be decompression bombs)"


@cache
def formats() -> dict[str, tuple[str, ...]]:
    """Pillow's formats of still images that can be read here, with their suffixes."""
    from PIL import Image

    Image.init()
    found: dict[str, tuple[str, ...]] = {name: () for name in Image.OPEN if name not in NO_PICTURES}
    for suffix, name in Image.registered_extensions().items():
        if name in found:
            found[name] = (*found[name], suffix)
    return found


@cache
def suffixes() -> frozenset[str]:
    """The suffixes of images, lower case: all that Pillow can read here."""
    return frozenset(suffix for some in formats().values() for suffix in some)
