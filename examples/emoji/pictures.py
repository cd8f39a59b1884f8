"""Real pictures in colour with captions: emoji of a package of npm, as an .npz for ``rlfusion pretrain --data``.

    npm pack emoji-datasource-twitter@16.0.0
    python examples/emoji/pictures.py emoji-datasource-twitter-16.0.0.tgz --out emoji.npz

A caption is a colour and a kind, "red fruit": the kind is the package's own subcategory, the colour that of most of the
picture's pixels (Eq. 1). Twelve such captions are kept, each with its first pictures, ``MOST`` of them: few enough for
a small network. Every caption has ``copies`` images, its pictures in turns.

    (1)  colour = the word that most of the opaque pixels have, by hue, saturation and value

The package is MIT; its pictures are Twemoji, (c) Twitter, Inc. and other contributors, under CC BY 4.0
(https://creativecommons.org/licenses/by/4.0/). Pictures made from them name that source.
"""

import argparse
import io
import json
import tarfile
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
from PIL import Image

TABLE, FOLDER = "package/emoji.json", "package/img/twitter/64/"
MOST = 4
KINDS = {
    "animal-bird": "bird",
    "animal-mammal": "animal",
    "animal-marine": "fish",
    "cat-face": "cat",
    "food-fruit": "fruit",
    "food-vegetable": "vegetable",
    "heart": "heart",
    "plant-flower": "flower",
    "plant-other": "plant",
    "transport-ground": "car",
}
CAPTIONS = (
    *("yellow face", "red heart", "brown animal", "white bird", "blue fish", "green plant"),
    *("red fruit", "green vegetable", "red car", "blue car", "pink flower", "yellow cat"),
)
HUES = ((14, "red"), (40, "orange"), (65, "yellow"), (165, "green"), (250, "blue"), (300, "purple"), (340, "pink"))
"""Below so many degrees the hue has that word; from the last on it is red again."""


def kind(entry: dict) -> str:
    """The last word of the caption of an entry of the package's ``emoji.json``; empty for none of ours."""
    return "face" if entry["subcategory"].startswith("face-") else KINDS.get(entry["subcategory"], "")


def colour(rgba: np.ndarray) -> str:
    """Eq. (1) of a picture (H, W, 4) uint8.

    Raises:
        ValueError: no pixel of it is opaque.
    """
    opaque = rgba[rgba[..., 3] > 127][:, :3]
    if not len(opaque):
        raise ValueError("a picture without an opaque pixel has no colour")
    hsv = np.asarray(Image.fromarray(opaque[None]).convert("HSV"))[0] / 255.0
    words = Counter(_word(360 * h, s, v) for h, s, v in hsv)
    return max(sorted(words), key=words.__getitem__)


def _word(hue: float, saturation: float, value: float) -> str:
    if value < 0.25:
        return "black"
    if saturation < 0.18:
        return "white" if value > 0.8 else "grey"
    if hue < 40 and value < 0.8 and saturation < 0.75:
        return "brown"
    if saturation < 0.5 and (hue < 14 or hue >= 340):
        return "pink"
    return next((word for below, word in HUES if hue < below), "red")


def read(package: Path, size: int) -> dict[str, list[np.ndarray]]:
    """The pictures of each caption of ``CAPTIONS``, in the package's order, (size, size, 3) uint8 over white.

    Raises:
        SystemExit: the package has fewer than two pictures of a caption.
    """
    with tarfile.open(package) as archive:  # in the archive's own order, because it is unpacked from its beginning
        held = {file.name: archive.extractfile(file).read() for file in archive if wanted(file.name)}  # type: ignore[union-attr]
    found: dict[str, list[np.ndarray]] = defaultdict(list)
    for entry in sorted(filter(kind, json.loads(held[TABLE])), key=lambda entry: entry["sort_order"]):
        with Image.open(io.BytesIO(held[FOLDER + entry["image"]])) as file:
            picture = file.convert("RGBA")
        caption = f"{colour(np.asarray(picture))} {kind(entry)}"
        if caption in CAPTIONS and len(found[caption]) < MOST:
            found[caption].append(over_white(picture, size))
    if few := [caption for caption in CAPTIONS if len(found[caption]) < 2]:
        raise SystemExit(f"{package} has fewer than two pictures of {', '.join(few)}: is it emoji-datasource-twitter?")
    return {caption: found[caption] for caption in CAPTIONS}


def wanted(name: str) -> bool:
    """Whether we read this file of the package."""
    return name == TABLE or name.startswith(FOLDER)


def over_white(picture: Image.Image, size: int) -> np.ndarray:
    """(size, size, 3) uint8 of a picture with transparency."""
    whole = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return np.asarray(whole.convert("RGB").resize((size, size), Image.Resampling.LANCZOS))


def arrays(pictures: dict[str, list[np.ndarray]], copies: int) -> tuple[np.ndarray, np.ndarray]:
    """(images (N, size, size, 3) uint8, captions (N,)), ``copies`` of every caption."""
    images = [own[i % len(own)] for own in pictures.values() for i in range(copies)]
    return np.stack(images), np.repeat(list(pictures), copies)


def main() -> None:
    """The whole file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", type=Path, help="the .tgz that npm pack wrote")
    parser.add_argument("--out", type=Path, required=True, help="an .npz")
    parser.add_argument("--size", type=int, default=32, help="pixels of a side")
    parser.add_argument("--copies", type=int, default=128, help="images of a caption")
    asked = parser.parse_args()
    pictures = read(asked.package, asked.size)
    images, captions = arrays(pictures, asked.copies)
    np.savez_compressed(asked.out, images=images, captions=captions)
    print(f"{asked.out}: {len(images)} images, of so many pictures:")
    print(", ".join(f"{len(own)} {caption}" for caption, own in pictures.items()))


if __name__ == "__main__":
    main()
