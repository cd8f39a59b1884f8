"""Arrays as samples and labels: where the channels are, what the values mean, what names the classes."""

from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np

from rlfusion.common.errors import ConfigError
from rlfusion.data.rows import caption_text, class_text, room

RANGES = {"-1..1": (-1, 1), "0..1": (0, 1), "0..255": (0, 255), "0..65535": (0, 65535)}
AXES = {"NHW": (0, 3, 1, 2), "NHWC": (0, 3, 1, 2), "NCHW": (0, 1, 2, 3)}
MOST_CLASSES = 100_000
Layout = Literal["auto", "NHW", "NHWC", "NCHW"]
Range = Literal["auto", "-1..1", "0..1", "0..255", "0..65535"]


class Pixels(NamedTuple):
    """x (N, C, H, W) float32 in [-1, 1]; ``levels``: the even steps that the values lie on (None: continuous); the
    layout, the range, the type and the least and the greatest value that they had.
    """

    x: np.ndarray
    levels: int | None
    layout: str
    span: str
    dtype: str
    low: float
    high: float


def pixels(images: np.ndarray, layout: str, span: str, what: str) -> Pixels:
    """Images of any layout and range.

    Raises:
        ConfigError: neither is known, or a value lies outside of its range (the first such sample is named).
    """
    about = f"{what} is {images.dtype} {images.shape}"
    expected = "expected uint8 (N, H, W[, C]) or (N, C, H, W), or float in [-1, 1] or [0, 1]"
    if images.dtype.kind not in "buif" or images.ndim not in (3, 4) or 0 in images.shape:
        raise ConfigError(f"{about}: {expected}")
    layout = layout_of(images.shape, images.dtype.kind == "f", layout, about)
    axes = AXES[layout]
    if images.ndim == 3:
        images = images[..., None]
    span = range_of(images, span, about, expected)
    low, high = RANGES[span]
    images = images.transpose(axes)
    _require_within(images, low, high, what, span)
    x = room(*images.shape)
    if (low, high) == (0, 255):
        x[...] = images
        x /= np.float32(127.5)
        x -= np.float32(1)
    else:
        x[...] = images if low == -1 else images.astype(np.float64) * (2 / high) - 1
    levels = None if images.dtype.kind == "f" else high - low + 1
    return Pixels(x, levels, layout, span, str(images.dtype), float(images.min()), float(images.max()))


def layout_of(shape: tuple[int, ...], continuous: bool, layout: str, about: str) -> str:
    """The layout of images of this shape, by the first rule that has one answer. Whole numbers have 1 or 3 channels:
    two or four may hold transparency.

    Raises:
        ConfigError: there is none, or the one that is set does not suit.
    """
    if layout != "auto":
        if len(layout) != len(shape):
            raise ConfigError(f"{about}: expected {len(layout)} axes for layout = {layout!r}")
        return layout
    if len(shape) == 3:
        if shape[2] in (1, 3):
            raise ConfigError(f"{about}, which may be one image: expected (N, H, W), or layout='NHW'")
        return "NHW"
    _, first, middle, last = shape
    counts = ((1, 3), (2, 4)) if continuous else ((1, 3),)
    fits = next((fits for fits in ([first in c, last in c] for c in counts) if any(fits)), None)
    if fits is None:  # latents of 16 channels, say: the sides are equal
        fits = [continuous and middle == last, continuous and first == middle]
    found = [name for name, fit in zip(("NCHW", "NHWC"), fits) if fit]
    if len(found) != 1:
        raise ConfigError(
            f"{about}, and which axis holds 1 or 3 channels is open: expected layout='NCHW' or layout='NHWC'"
        )
    return found[0]


def range_of(images: np.ndarray, span: str, about: str, expected: str) -> str:
    """The values of black and white in ``images``.

    Raises:
        ConfigError: their type and values leave that open.
    """
    if span != "auto":
        return span
    low, high = images.min(), images.max()
    if images.dtype == np.bool_:
        return "0..1"
    if images.dtype == np.uint8 and high != 1:
        return "0..255"
    if images.dtype.kind == "f" and low >= -1 and high <= 1:
        return "-1..1" if low < 0 else "0..1"
    ranges = " or ".join(f"range='{name}'" for name in RANGES)
    raise ConfigError(f"{about} with values {low}..{high}: {expected}, or {ranges}")


def _require_within(images: np.ndarray, low: int, high: int, what: str, span: str) -> None:
    if images.min() >= low and images.max() <= high:  # false of NaN
        return
    bad = ~((images >= low) & (images <= high)).reshape(len(images), -1).all(1)
    first = int(bad.argmax())
    value = images[first][~((images[first] >= low) & (images[first] <= high))][0]
    raise ConfigError(f"{what}: {int(bad.sum())} samples leave {span}, the first is {first} with {value}")


def _column(given: np.ndarray, count: int, what: str, expected: str) -> np.ndarray:
    """(N,) or (N, 1) as (N,), texts of bytes decoded."""
    if given.shape == (count, 1):
        given = given[:, 0]
    if given.shape != (count,) or given.dtype.kind not in "biuUS":
        raise ConfigError(f"{what} is {given.dtype} {given.shape}: expected {expected} ({count},)")
    if given.dtype.kind != "S":
        return given
    try:
        return np.array([text.decode() for text in given.tolist()])
    except UnicodeDecodeError as error:
        raise ConfigError(f"{what} is not UTF-8: {error}") from error


def _checked(given: np.ndarray, check: Callable[[object, str], str], what: str) -> np.ndarray:
    try:
        held = given.tolist()
    except ValueError as error:  # a code point beyond Unicode
        raise ConfigError(f"{what} is no text: {error}") from error
    return np.array([check(value, f"item {i} of {what}") for i, value in enumerate(held)])


def captions_of(given: np.ndarray, count: int, what: str) -> np.ndarray:
    """Captions of an array ``given`` of texts, (count,) of dtype "U", each without blanks around it.

    Raises:
        ConfigError: other than ``count`` texts, or one that is no caption; ``what`` names the array.
    """
    given = _column(given, count, what, "texts")
    if given.dtype.kind != "U":
        raise ConfigError(f"{what} is {given.dtype}: expected texts ({count},)")
    return _checked(given, caption_text, what)


def labels_of(given: np.ndarray, count: int, what: str) -> np.ndarray:
    """Labels of an array ``given``: (count,) of int64 in 0..99,999 or of names, from such, from (count, 1), or from
    one-hot rows (count, classes).

    Raises:
        ConfigError: anything else; ``what`` names the array, and the message its first wrong item.
    """
    if given.ndim == 2 and given.shape[0] == count and given.shape[1] > 1 and given.dtype.kind in "biuf":
        if not (((given == 0) | (given == 1)).all() and (given.sum(1) == 1).all()):
            raise ConfigError(f"{what} is {given.dtype} {given.shape} and not one-hot: expected one label a sample")
        return given.argmax(1)
    given = _column(given, count, what, "integers or names")
    if given.dtype.kind == "U":
        return _checked(given, class_text, what)
    low, high = int(given.min()), int(given.max())
    if low < 0 or high >= MOST_CLASSES:
        wrong = int((given < 0).argmax() if low < 0 else (given >= MOST_CLASSES).argmax())
        raise ConfigError(
            f"{what}: item {wrong} is {int(given[wrong])}: expected labels in 0..{MOST_CLASSES - 1} "
            "(number the classes from 0)"
        )
    return given.astype(np.int64)
