"""A sheet of models' samples from the same noise: a row a caption, a panel a model.

python examples/emoji/grid.py --out emoji.png "before=runs/emoji" "after=runs/emoji-clip"
"""

import argparse
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

import rlfusion as rlf

LABEL, HEAD, GAP = 110, 24, 14
"""Pixels of the column of captions, of the line of titles, and between two panels."""


def panel(samples: Tensor, scale: int) -> Image.Image:
    """samples (rows, columns, 3, H, W) in [0, 1] -> one picture, ``scale`` pixels for one."""
    rows, columns, _, height, width = samples.shape
    pixels = samples.permute(0, 3, 1, 4, 2).reshape(rows * height, columns * width, 3)
    picture = Image.fromarray((pixels.clamp(0, 1) * 255).round().byte().numpy().astype(np.uint8))
    return picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)


def sheet(panels: Mapping[str, Image.Image], captions: list[str]) -> Image.Image:
    """The panels side by side below their titles, right of the captions of their rows."""
    width = LABEL + sum(picture.width + GAP for picture in panels.values())
    height = next(iter(panels.values())).height
    whole = Image.new("RGB", (width, HEAD + height), "white")
    draw = ImageDraw.Draw(whole)
    for row, caption in enumerate(captions):
        draw.text((6, HEAD + (row + 0.5) * height / len(captions)), caption, fill="black", font_size=15, anchor="lm")
    left = LABEL
    for title, picture in panels.items():
        draw.text((left + picture.width / 2, HEAD / 2), title, fill="black", font_size=15, anchor="mm")
        whole.paste(picture, (left, HEAD))
        left += picture.width + GAP
    return whole


def drawn(model: rlf.Model, each: int, seed: int) -> Tensor:
    """``each`` samples of every caption of the model, (captions, each, C, H, W) in [0, 1]; the noise is the seed's."""
    labels = [name for name in model.names for _ in range(each)]
    return rlf.sample(model, labels, seed=seed).unflatten(0, (len(model.names), each))


def main() -> None:
    """The whole picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("panels", nargs="+", help="TITLE=RUN, from left to right")
    parser.add_argument("--out", type=Path, required=True, help="a .png")
    parser.add_argument("--each", type=int, default=6, help="samples of a caption")
    parser.add_argument("--scale", type=int, default=2, help="pixels of the picture for one of a sample")
    parser.add_argument("--seed", type=int, default=1, help="of the noise")
    asked = parser.parse_args()
    if wrong := [word for word in asked.panels if not all(word.partition("="))]:
        raise SystemExit(f"{wrong[0]!r}: expected TITLE=RUN")
    models = {title: rlf.load(run) for title, _, run in (word.partition("=") for word in asked.panels)}
    captions = list(next(iter(models.values())).names)
    if other := [title for title, model in models.items() if list(model.names) != captions]:
        raise SystemExit(f"{other[0]!r} has other captions than {asked.panels[0]!r}: expected models of the same ones")
    panels = {title: panel(drawn(model, asked.each, asked.seed), asked.scale) for title, model in models.items()}
    sheet(panels, captions).quantize(256, dither=Image.Dither.NONE).save(asked.out, optimize=True)


if __name__ == "__main__":
    main()
