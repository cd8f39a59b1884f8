"""Real pictures in colour with captions: emoji of a package of npm, as an .npz for ``rlfusion pretrain --data``.

    npm pack emoji-datasource-twitter@16.0.0
    python examples/emoji/pictures.py emoji-datasource-twitter-16.0.0.tgz --out emoji.npz

``CAPTIONS`` says which pictures have which caption, by the package's own short names: four each, few enough for a small
network. Every caption has ``copies`` images, its pictures in turns.

The package is MIT; its pictures are Twemoji, (c) Twitter, Inc. and other contributors, under CC BY 4.0
(https://creativecommons.org/licenses/by/4.0/). Pictures made from them name that source.
"""

import argparse
import io
import json
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

TABLE, FOLDER = "package/emoji.json", "package/img/twitter/64/"
CAPTIONS = {
    "yellow face": ("grinning", "wink", "heart_eyes", "sunglasses"),
    "yellow cat": ("smiley_cat", "smile_cat", "heart_eyes_cat", "smirk_cat"),
    "red heart": ("heart", "broken_heart", "sparkling_heart", "cupid"),
    "red fruit": ("apple", "strawberry", "cherries", "tomato"),
    "red car": ("car", "pickup_truck", "fire_engine", "motor_scooter"),
    "blue car": ("blue_car", "oncoming_automobile", "oncoming_police_car", "oncoming_bus"),
    "blue fish": ("whale", "dolphin", "fish", "shark"),
    "green fruit": ("green_apple", "pear", "melon", "lime"),
    "green plant": ("evergreen_tree", "deciduous_tree", "palm_tree", "cactus"),
    "pink flower": ("cherry_blossom", "lotus", "hibiscus", "tulip"),
    "brown animal": ("bear", "horse", "hedgehog", "camel"),
    "white bird": ("chicken", "swan", "dove_of_peace", "goose"),
}


def read(package: Path, size: int) -> dict[str, list[np.ndarray]]:
    """The pictures of each caption of ``CAPTIONS``, (size, size, 3) uint8 over white.

    Raises:
        SystemExit: the package lacks one of them.
    """
    with tarfile.open(package) as archive:  # in the archive's own order, because it is unpacked from its beginning
        held = {file.name: archive.extractfile(file).read() for file in archive if wanted(file.name)}  # type: ignore[union-attr]
    files = {entry["short_name"]: FOLDER + entry["image"] for entry in json.loads(held.get(TABLE, b"[]"))}
    names = [name for own in CAPTIONS.values() for name in own]
    if missing := [name for name in names if files.get(name) not in held]:
        raise SystemExit(f"{package} has no picture {', '.join(missing)}: is it emoji-datasource-twitter?")
    return {caption: [over_white(held[files[name]], size) for name in own] for caption, own in CAPTIONS.items()}


def wanted(name: str) -> bool:
    """Whether we read this file of the package."""
    return name == TABLE or name.startswith(FOLDER)


def over_white(png: bytes, size: int) -> np.ndarray:
    """(size, size, 3) uint8 of a picture with transparency."""
    with Image.open(io.BytesIO(png)) as file:
        picture = file.convert("RGBA")
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
    count = sum(map(len, pictures.values()))
    print(f"{asked.out}: {len(images)} images, of {count} pictures with {len(pictures)} captions")


if __name__ == "__main__":
    main()
