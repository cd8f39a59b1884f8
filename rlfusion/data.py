"""Data: samples in [-1, 1] as (N, C, H, W) float32, with integer labels (N,).

``digits`` is scikit-learn's copy of the UCI handwritten digits: 1,797 real 8x8 images of 10 classes, 0..16 grey levels.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlfusion import spec
from rlfusion.errors import ConfigError
from rlfusion.hub import HF
from rlfusion.seeding import Key, stream
from rlfusion.tensors import to_pixels as to_pixels

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")


@dataclass(frozen=True)
class Dataset:
    """Samples x (N, C, H, W) in [-1, 1], labels (N,) int64 in 0..classes-1, and the names of the classes.

    ``captioned``: the names are captions, distinct ones, and the model is to read them. ``levels``: the values lie on
    so many even steps from -1 to 1 (256: 8 bits); None for continuous values.
    """

    x: Tensor
    label: Tensor
    names: tuple[str, ...]
    levels: int | None = None
    captioned: bool = False

    def __post_init__(self) -> None:
        if self.x.ndim != 4 or self.label.shape != self.x.shape[:1]:
            raise ConfigError(
                f"samples are (N, C, H, W), labels (N,): got {tuple(self.x.shape)}, {tuple(self.label.shape)}"
            )
        if len(self.label) and not 0 <= int(self.label.min()) <= int(self.label.max()) < len(self.names):
            raise ConfigError(f"labels lie in 0..{len(self.names) - 1}: got {self.label.min()}..{self.label.max()}")

    def __len__(self) -> int:
        return len(self.x)

    @property
    def classes(self) -> int:
        return len(self.names)

    @property
    def grouped(self) -> bool:
        """The samples fall into two or more classes, of which a judge can learn: captions only if each has a second."""
        counts = self.label.bincount(minlength=self.classes)
        return self.classes > 1 and (not self.captioned or int(counts.min()) > 1)

    @property
    def shape(self) -> tuple[int, ...]:
        """(C, H, W)."""
        return tuple(self.x.shape[1:])

    def split(self, held_out: float, seed: int = 0) -> tuple["Dataset", "Dataset"]:
        """(training, held-out) parts, stratified by class: ``held_out`` is the second's share of each class."""
        rest, out = [], []
        for c in range(self.classes):
            index = stream(seed, "split", c).permutation((self.label == c).nonzero().flatten().numpy())
            cut = round(held_out * len(index))
            out.append(index[:cut])
            rest.append(index[cut:])
        return self._take(np.sort(np.concatenate(rest))), self._take(np.sort(np.concatenate(out)))

    def require_parts(self, held_out: float) -> None:
        """
        Raises:
            ConfigError: ``split(held_out)`` leaves nothing in one part.
        """
        parts = [len(part) for part in self.split(held_out)]
        if not all(parts):
            raise ConfigError(f"held_out = {held_out} splits {len(self)} samples into {parts}: expected some in both")

    def _take(self, index: np.ndarray) -> "Dataset":
        at = torch.from_numpy(index)
        return Dataset(self.x[at], self.label[at], self.names, self.levels, self.captioned)


def digits() -> Dataset:
    """The 1,797 handwritten digits, 1x8x8."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    x = torch.from_numpy(bunch.images.astype(np.float32))[:, None] / 8 - 1
    return Dataset(x, torch.from_numpy(bunch.target.astype(np.int64)), tuple(str(i) for i in range(10)), levels=17)


def folder(path: Path, size: int) -> Dataset:
    """Images below ``path``, resized (bicubic, shorter side) and centre-cropped to size x size RGB.

    Each sub-folder is a class named by the folder; images lying directly in ``path`` are one class. With a file
    ``metadata.jsonl`` of lines {"file_name": ..., "text": ...} the texts are captions.

    Raises:
        ConfigError: no folder, no image in it, an image that cannot be read, or one without a caption (named).
    """
    if not path.is_dir():
        raise ConfigError(f"data folder {str(path)!r} does not exist")
    files = sorted(f for f in path.rglob("*") if f.suffix.lower() in IMAGE_SUFFIXES)
    if not files:
        raise ConfigError(f"data folder {str(path)!r} holds no image ({', '.join(IMAGE_SUFFIXES)})")
    x = torch.from_numpy(np.stack([_read_image(f, size) for f in files]))
    if (path / "metadata.jsonl").is_file():
        return captioned(x, _captions(path, files), levels=256)
    owners = [f.relative_to(path).parts[0] if f.parent != path else "" for f in files]
    names = tuple(sorted(set(owners)))
    return Dataset(x, torch.tensor([names.index(o) for o in owners]), tuple(n or "all" for n in names), levels=256)


def _captions(path: Path, files: list[Path]) -> list[str]:
    """The text of each file in ``metadata.jsonl``."""
    try:
        lines = [json.loads(line) for line in (path / "metadata.jsonl").read_text().splitlines() if line.strip()]
        texts = {line["file_name"]: line["text"] for line in lines}
        return [texts[str(f.relative_to(path))] for f in files]
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError(
            f"{str(path / 'metadata.jsonl')!r}: expected a line with file_name and text for every image ({error})"
        ) from error


def captioned(x: Tensor, captions: list[str], levels: int | None) -> Dataset:
    """Samples with a caption each; equal captions are one prompt."""
    names = tuple(sorted(set(captions)))
    place = {name: i for i, name in enumerate(names)}
    return Dataset(x, torch.tensor([place[c] for c in captions]), names, levels, captioned=True)


def _read_image(file: Path, size: int) -> np.ndarray:
    with _opened(file) as image:
        return _fitted(image, size)


def read_image(file: Path) -> Tensor:
    """The image in a file, (3, H, W) float32 in [0, 1].

    Raises:
        ConfigError: no image there that can be read.
    """
    with _opened(file) as image:
        return torch.from_numpy(np.array(image.convert("RGB"), dtype=np.float32)).permute(2, 0, 1) / 255


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(file) as image:
            yield image
    except (UnidentifiedImageError, OSError) as error:
        raise ConfigError(f"image {str(file)!r} cannot be read: {error}") from error


def _fitted(image: Any, size: int) -> np.ndarray:
    """A PIL image as (3, size, size) in [-1, 1]."""
    from PIL import Image, ImageOps

    fitted = ImageOps.fit(image.convert("RGB"), (size, size), Image.Resampling.BICUBIC)
    return np.asarray(fitted, dtype=np.float32).transpose(2, 0, 1) / 127.5 - 1


def hf(source: HF, size: int) -> Dataset:
    """Rows of a Hugging Face data set, their images fitted to size x size RGB.

    Raises:
        ConfigError: nothing there, no such column, a row that is no image, or labels that are no classes.
    """
    images, given, names = source.rows()
    for i, image in enumerate(images):
        if not callable(getattr(image, "convert", None)):
            held = type(image).__name__
            raise ConfigError(f"row {i} of {source.path!r}: column {source.image!r} holds {held}, expected an image")
    x = torch.from_numpy(np.stack([_fitted(image, size) for image in images]))
    if given is None:
        return Dataset(x, torch.zeros(len(x), dtype=torch.int64), ("all",), levels=256)
    if source.caption:
        return captioned(x, [str(text) for text in given], levels=256)
    if names:  # the column holds their indices
        return Dataset(x, torch.tensor(given), tuple(names), levels=256)
    names = sorted({str(value) for value in given})
    return Dataset(x, torch.tensor([names.index(str(value)) for value in given]), tuple(names), levels=256)


def npz(path: Path) -> Dataset:
    """An ``.npz`` with ``images``, uint8 (N, H, W[, C]) or (N, C, H, W) float in [-1, 1], and optional ``labels`` or
    ``captions`` (N,).

    Raises:
        ConfigError: no file, no ``images``, or another dtype, shape or range.
    """
    if not path.is_file():
        raise ConfigError(f"data file {str(path)!r} does not exist")
    try:
        with np.load(path, allow_pickle=False) as file:
            held = dict(file)
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"data file {str(path)!r} cannot be read as .npz: {error}") from error
    if "images" not in held:
        raise ConfigError(f"{str(path)!r} holds {sorted(held)}: expected an array 'images' (and optional 'labels')")
    images = held["images"]
    labels = held["labels"] if "labels" in held else np.zeros(len(images), np.int64)
    if images.dtype == np.uint8 and images.ndim in (3, 4):
        x = (images if images.ndim == 4 else images[..., None]).transpose(0, 3, 1, 2).astype(np.float32) / 127.5 - 1
    elif np.issubdtype(images.dtype, np.floating) and images.ndim == 4 and np.abs(images).max() <= 1:
        x = images.astype(np.float32)
    else:
        raise ConfigError(
            f"'images' in {str(path)!r} is {images.dtype} {images.shape}: "
            "expected uint8 (N, H, W[, C]) or float (N, C, H, W) in [-1, 1]"
        )
    if not np.issubdtype(labels.dtype, np.integer) or labels.shape != (len(images),):
        raise ConfigError(
            f"'labels' in {str(path)!r} is {labels.dtype} {labels.shape}: expected integers ({len(images)},)"
        )
    levels = 256 if images.dtype == np.uint8 else None
    if "captions" in held:
        if held["captions"].dtype.kind != "U" or held["captions"].shape != (len(images),):
            kind = held["captions"].dtype
            raise ConfigError(f"'captions' in {str(path)!r} is {kind}: expected texts ({len(images)},)")
        return captioned(torch.from_numpy(np.ascontiguousarray(x)), held["captions"].tolist(), levels)
    names = tuple(str(i) for i in range(int(labels.max(initial=0)) + 1))
    return Dataset(torch.from_numpy(np.ascontiguousarray(x)), torch.from_numpy(labels.astype(np.int64)), names, levels)


def load(data: str, size: int = 32) -> Dataset:
    """A data set by name or path: "digits", an ``.npz`` file, a folder of images (brought to ``size``), or the settings
    of a Hugging Face one, ``hf(path='...', ...)``.
    """
    if data == "digits":
        return digits()
    if data.startswith("hf("):
        return hf(spec.parse(data, {"hf": HF}, "data source"), size)
    return npz(Path(data)) if data.endswith(".npz") else folder(Path(data), size)


def batch_indices(total: int, batch: int, step: int, *key: Key) -> np.ndarray:
    """The indices (batch,) of one training step: epoch by epoch in a keyed random order, pure in ``step``."""
    first = step * batch
    epochs = range(first // total, (first + batch - 1) // total + 1)
    order = np.concatenate([stream(*key, "epoch", e).permutation(total) for e in epochs])
    return order[first - epochs[0] * total :][:batch]
