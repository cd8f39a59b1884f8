"""Images of every mode, depth and orientation: read as an oracle worked by hand says, or refused by their name."""

import io
import struct
import warnings
import zlib
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageDraw

from rlfusion import data
from rlfusion.common.errors import ConfigError
from rlfusion.data.images import MOST_PIXELS, formats, suffixes

SIDE = 8
DRAW = np.random.default_rng(0)
RGB = DRAW.integers(0, 256, (SIDE, SIDE, 3), np.uint8)
GREY = DRAW.integers(0, 256, (SIDE, SIDE), np.uint8)
ALPHA = DRAW.integers(0, 256, (SIDE, SIDE), np.uint8)


def read(folder, size=SIDE, **settings) -> np.ndarray:
    """(size, size, 3) in 0..255 of the one image in a folder."""
    return (data.Folder(str(folder), **settings).load(size).x[0].permute(1, 2, 0).numpy() + 1) * 127.5


def grey(values: np.ndarray) -> np.ndarray:
    return np.repeat(np.asarray(values, dtype=np.float64)[..., None], 3, 2)


def over(colour: np.ndarray, alpha: np.ndarray, background: int = 255) -> np.ndarray:
    a = alpha.astype(np.float64)[..., None] / 255
    return a * colour + (1 - a) * background


def palette() -> tuple[Image.Image, np.ndarray]:
    image = Image.frombytes("P", (SIDE, SIDE), (GREY % 4).tobytes())
    colours = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [9, 9, 9]])
    image.putpalette(colours.astype(np.uint8).tobytes())
    return image, colours[GREY % 4]


def deep(values: np.ndarray) -> np.ndarray:
    return np.round(values / 257)


WIDE = (GREY.astype(np.uint16) << 8) + 77


def cases() -> dict[str, tuple]:
    """name -> (image, how to save it, what is to be read, tolerance)."""
    pal, pal_rgb = palette()
    bits = Image.fromarray(GREY > 127)
    keyed = Image.fromarray(RGB // 255 * 255)
    return {
        "1.png": (bits, {}, grey((GREY > 127) * 255), 0),
        "L.png": (Image.fromarray(GREY), {}, grey(GREY), 0),
        "RGB.png": (Image.fromarray(RGB), {}, RGB, 0),
        "RGB.tif": (Image.fromarray(RGB), {}, RGB, 0),
        "RGB.bmp": (Image.fromarray(RGB), {}, RGB, 0),
        "RGB.TGA": (Image.fromarray(RGB), {}, RGB, 0),
        "RGB.ppm": (Image.fromarray(RGB), {}, RGB, 0),
        "RGB.qoi": (Image.fromarray(RGB), {}, RGB, 0),
        "L.pgm": (Image.fromarray(GREY), {}, grey(GREY), 0),
        "RGB.webp": (Image.fromarray(RGB), {"lossless": True}, RGB, 0),
        "L.GIF": (Image.fromarray(GREY), {}, grey(GREY), 0),
        "P.png": (pal, {}, pal_rgb, 0),
        "P.gif": (pal, {}, pal_rgb, 0),
        "P-int.png": (pal, {"transparency": 2}, over(pal_rgb, np.where(GREY % 4 == 2, 0, 255)), 0),
        "P-bytes.png": (
            pal,
            {"transparency": bytes([0, 100, 255, 255])},
            over(pal_rgb, np.array([0, 100, 255, 255])[GREY % 4]),
            1,
        ),
        "P.tif": (pal, {}, pal_rgb, 0),
        "LA.png": (Image.merge("LA", [Image.fromarray(GREY), Image.fromarray(ALPHA)]), {}, over(grey(GREY), ALPHA), 1),
        "RGBA.png": (Image.fromarray(np.dstack([RGB, ALPHA])), {}, over(RGB, ALPHA), 1),
        "RGBA.tif": (Image.fromarray(np.dstack([RGB, ALPHA])), {}, over(RGB, ALPHA), 1),
        "RGBA.webp": (Image.fromarray(np.dstack([RGB, ALPHA])), {"lossless": True, "exact": True}, over(RGB, ALPHA), 1),
        "L-key.png": (Image.fromarray(GREY), {"transparency": int(GREY[0, 0])}, None, 0),
        "RGB-key.png": (keyed, {"transparency": (0, 0, 0)}, None, 0),
        "I16.png": (Image.fromarray(WIDE), {}, grey(deep(WIDE)), 0),
        "I16.tif": (Image.fromarray(WIDE), {}, grey(deep(WIDE)), 0),
        "I16.pgm": (Image.fromarray(WIDE), {}, grey(deep(WIDE)), 0),
        "CMYK.tif": (Image.fromarray(RGB).convert("CMYK"), {}, RGB, 1),
        "YCbCr.tif": (Image.fromarray(RGB).convert("YCbCr"), {}, RGB, 3),
    }


@pytest.mark.parametrize("name", cases())
def test_a_mode_is_read_as_what_it_is(name, tmp_path):
    image, how, expected, tolerance = cases()[name]
    image.save(tmp_path / name, **how)
    if name == "L-key.png":
        expected = over(grey(GREY), np.where(GREY[0, 0] == GREY, 0, 255))
    if name == "RGB-key.png":
        pixels = RGB // 255 * 255
        expected = over(pixels, np.where((pixels == 0).all(2), 0, 255))
    assert np.abs(read(tmp_path) - expected).max() <= tolerance + 1e-4


def png(bits: int, colour: int, rows: bytes, *chunks: tuple[bytes, bytes], side: int = SIDE) -> bytes:
    """A PNG written by hand."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, bits, colour, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(chunk(*c) for c in chunks) + body + chunk(b"IEND", b"")


def rows_of(values: np.ndarray) -> bytes:
    big = values.astype(">u2").reshape(SIDE, -1)
    return b"".join(b"\0" + row.tobytes() for row in big)


def test_png_of_16_bits_written_by_hand(tmp_path):
    wide = (RGB.astype(np.uint16) << 8) + 99
    (tmp_path / "a.png").write_bytes(png(16, 2, rows_of(wide)))
    assert np.abs(read(tmp_path) - wide / 257).max() <= 1
    both = np.dstack([wide, ALPHA.astype(np.uint16) * 257])
    (tmp_path / "a.png").write_bytes(png(16, 6, rows_of(both)))
    assert np.abs(read(tmp_path) - over(wide / 257, ALPHA)).max() <= 2
    key = struct.pack(">H", int(WIDE[0, 0]))
    (tmp_path / "a.png").write_bytes(png(16, 0, rows_of(WIDE), (b"tRNS", key)))
    expected = over(grey(deep(WIDE)), np.where(WIDE[0, 0] == WIDE, 0, 255))
    assert np.abs(read(tmp_path) - expected).max() <= 1e-4
    (tmp_path / "a.png").write_bytes(png(16, 2, rows_of(wide), (b"tRNS", struct.pack(">HHH", 700, 800, 900))))
    with pytest.raises(ConfigError, match=r"a\.png.*16 bits: expected an alpha channel"):
        read(tmp_path)


def test_tiff_whose_white_is_zero(tmp_path):
    Image.fromarray(WIDE).save(tmp_path / "a.tif", tiffinfo={262: 0})
    assert np.abs(read(tmp_path) - grey(deep(65535 - WIDE.astype(int)))).max() <= 1e-4


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".tif"])
def test_exif_orientation_is_applied(orientation, suffix, tmp_path):
    upright = np.zeros((16, 16, 3), np.uint8)
    upright[:8, :8], upright[:8, 8:], upright[8:, :8] = (250, 0, 0), (0, 250, 0), (0, 0, 250)
    # what a camera stores so that the tag brings it upright: the inverse of each turn, by numpy
    stored = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: np.rot90(a, 2),
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, 1),
        7: lambda a: np.rot90(a, 2).transpose(1, 0, 2),
        8: lambda a: np.rot90(a, -1),
    }[orientation](upright)
    exif = Image.Exif()
    exif[274] = orientation
    how = {".jpg": {"quality": 100, "subsampling": 0}, ".webp": {"lossless": True}}.get(suffix, {})
    Image.fromarray(np.ascontiguousarray(stored)).save(tmp_path / f"a{suffix}", exif=exif, **how)
    assert np.abs(read(tmp_path, 16) - upright).max() <= 4


def with_exif(block: bytes, suffix: str) -> bytes:
    """The top half of a picture is red; ``block`` is its EXIF data."""
    held, out = np.zeros((SIDE, SIDE, 3), np.uint8), io.BytesIO()
    held[: SIDE // 2] = (250, 0, 0)
    kind = {".jpg": "JPEG", ".png": "PNG", ".webp": "WEBP"}[suffix]
    Image.fromarray(held).save(out, kind, exif=block, **({"lossless": True} if kind == "WEBP" else {}))
    return out.getvalue()


def exif_block(orientation: object) -> bytes:
    exif = Image.Exif()
    exif[274], exif[271], exif[306] = orientation, "maker" * 9, "2020:01:01 00:00:00"
    return exif.tobytes()


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp"])
def test_damaged_exif_data_are_counted_and_never_overlooked(suffix, tmp_path):
    whole, turned, upright = exif_block(3), 0, 0
    for cut in range(len(b"Exif\0\0"), len(whole)):
        (tmp_path / f"a{suffix}").write_bytes(with_exif(whole[:cut] or b"Exif\0\0", suffix))
        found = data.Folder(str(tmp_path)).load(SIDE)
        top = found.x[0, 0, 0, 0] > 0
        if cut == len(b"Exif\0\0"):  # nothing in the block
            continue
        assert "1 with damaged EXIF data" in found.summary, cut
        assert ("turned as far as they say" in found.summary) == (not top)
        turned, upright = turned + int(not top), upright + int(top)
    assert min(turned, upright) > 5


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp"])
@pytest.mark.parametrize("orientation", [0, 9, 77, 65535])
def test_an_orientation_that_is_none_is_counted(orientation, suffix, tmp_path):
    (tmp_path / f"a{suffix}").write_bytes(with_exif(exif_block(orientation), suffix))
    found = data.Folder(str(tmp_path)).load(SIDE)
    assert "1 with an EXIF orientation outside of 1..8 (taken as upright)" in found.summary
    assert found.x[0, 0, 0, 0] > 0


def test_a_turned_tiff_keeps_its_white_and_its_depth(tmp_path):
    Image.fromarray(WIDE).save(tmp_path / "a.tif", tiffinfo={262: 0, 274: 3})
    expected = grey(deep(65535 - WIDE.astype(int)))[::-1, ::-1]
    assert np.abs(read(tmp_path) - expected).max() <= 1e-4


def test_the_background_is_a_setting_and_is_said(tmp_path):
    Image.fromarray(np.dstack([RGB, ALPHA])).save(tmp_path / "a.png")
    assert np.abs(read(tmp_path, background="black") - over(RGB, ALPHA, 0)).max() <= 1
    assert np.abs(read(tmp_path, background="#808080") - over(RGB, ALPHA, 128)).max() <= 1
    assert "1 with transparency, over white" in data.load(str(tmp_path), SIDE).summary
    Image.fromarray(np.dstack([RGB, np.full((SIDE, SIDE), 255, np.uint8)])).save(tmp_path / "a.png")
    assert "transparency" not in data.load(str(tmp_path), SIDE).summary
    for bad in ("whitish", "#12345678", "#12", "hsl(bad)"):
        with pytest.raises(ConfigError, match="background"):
            data.Folder(str(tmp_path), background=bad)


def test_colour_profiles_are_brought_to_srgb(tmp_path):
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    Image.fromarray(RGB).save(tmp_path / "a.png", icc_profile=lab)
    np.testing.assert_allclose(read(tmp_path), RGB, atol=1e-4)
    Image.fromarray(RGB).save(tmp_path / "a.png", icc_profile=b"broken")
    np.testing.assert_allclose(read(tmp_path), RGB, atol=1e-4)
    assert "1 with a colour profile that cannot be applied" in data.load(str(tmp_path), SIDE).summary
    grey_lab = Image.merge("LAB", [Image.new("L", (SIDE, SIDE), level) for level in (137, 128, 128)])
    (tmp_path / "a.png").unlink()
    grey_lab.save(tmp_path / "a.tif")  # L* = 53.7 is the middle grey of sRGB, about 128
    assert np.abs(read(tmp_path) - 128).max() <= 2


def test_a_wide_profile_changes_the_colours(tmp_path):
    """A profile made of the sRGB one with red and green swapped: what is stored as red is green."""
    raw = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    tags = {}
    count = struct.unpack(">I", raw[128:132])[0]
    for i in range(count):
        tags[bytes(raw[132 + 12 * i : 136 + 12 * i])] = 132 + 12 * i
    red, green = tags[b"rXYZ"], tags[b"gXYZ"]
    raw[red : red + 4], raw[green : green + 4] = b"gXYZ", b"rXYZ"
    at, length = struct.unpack(">II", raw[tags[b"desc"] + 4 : tags[b"desc"] + 12])
    raw[at : at + length] = bytes(raw[at : at + length]).replace(b"\0s\0R\0G\0B", b"\0s\0w\0a\0p")
    Image.new("RGB", (SIDE, SIDE), (255, 0, 0)).save(tmp_path / "a.png", icc_profile=bytes(raw))
    assert np.abs(read(tmp_path) - np.array([0, 255, 0])).max() <= 4
    assert "brought to sRGB" in data.load(str(tmp_path), SIDE).summary


@pytest.mark.parametrize("mode", ["I", "F"])
def test_values_without_a_known_white_are_refused(mode, tmp_path):
    Image.new(mode, (SIDE, SIDE), 7).save(tmp_path / "a.tif")
    with pytest.raises(ConfigError, match=r"a\.tif.*white is not known"):
        read(tmp_path)


@pytest.mark.parametrize("name", ["a.gif", "a.png", "a.webp", "a.tif"])
def test_animations_and_pages_are_refused_or_their_first_is_taken(name, tmp_path):
    first, second = (Image.new("RGB", (SIDE, SIDE), colour) for colour in ((255, 0, 0), (0, 0, 255)))
    first.save(tmp_path / name, save_all=True, append_images=[second], **({"lossless": True} if "w" in name else {}))
    with pytest.raises(ConfigError, match=r"holds 2 pictures.*frames='first'"):
        read(tmp_path)
    assert np.abs(read(tmp_path, frames="first") - np.array([255, 0, 0])).max() <= 1
    assert "1 of several pictures" in data.Folder(str(tmp_path), frames="first").load(SIDE).summary


def test_bombs_are_refused_before_they_are_unpacked(tmp_path):
    side = int(MOST_PIXELS**0.5) + 100
    for scale in (1, 2, 20):
        (tmp_path / "a.png").write_bytes(png(8, 0, b"\0", side=scale * side))
        with pytest.raises(ConfigError, match=r"a\.png.*89,478,485|a\.png.*178,956,970"):
            read(tmp_path)
    text = zlib.compress(b"x" * 50_000_000)
    (tmp_path / "a.png").write_bytes(png(8, 0, b"\0" * (SIDE * SIDE + SIDE), (b"zTXt", b"a\0\0" + text)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        said = refusal(lambda: read(tmp_path))
    assert not said or "a.png" in said


def refusal(act: Callable[[], object]) -> str:
    """What a refusal says; "" where there is none."""
    try:
        act()
    except ConfigError as error:
        return str(error)
    return ""


def check(found: data.Dataset) -> None:
    assert found.x.shape == (1, 3, SIDE, SIDE)
    assert found.x.abs().max() <= 1


def sound(kind: str) -> bytes:
    file = io.BytesIO()
    image = Image.new("RGB", (40, 40), (10, 90, 200))
    ImageDraw.Draw(image).ellipse((5, 5, 30, 35), fill=(240, 200, 9))
    exif = Image.Exif()
    exif[274] = 6
    image.save(file, kind, **({"exif": exif} if kind in ("JPEG", "PNG", "WEBP") else {}))
    return file.getvalue()


@pytest.mark.parametrize(
    "kind", ["PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP", "PPM", "TGA", "ICO", "PCX", "QOI", "AVIF"]
)
def test_damaged_files_are_read_or_refused_in_one_line(kind, tmp_path):
    """Truncations and flipped bytes: 12 formats x 14 damages. A flip inside the pixels may still be an image."""
    if kind not in formats():
        pytest.skip(f"Pillow here has no {kind}")
    whole, draw = sound(kind), np.random.default_rng(len(kind))
    file = tmp_path / f"a{formats()[kind][0]}"
    damages = [b"", whole[:4], whole[: len(whole) // 2], b"not a picture", bytes(len(whole))]
    for _ in range(9):
        broken = bytearray(whole)
        for at in draw.integers(0, min(len(whole), 200), 3):
            broken[at] = draw.integers(256)
        damages.append(bytes(broken))
    refused = 0
    for damaged in damages:
        file.write_bytes(damaged)
        said = refusal(lambda: check(data.load(str(tmp_path), SIDE)))
        assert not said or (file.name in said and "\n" not in said)
        refused += bool(said)
    assert refused >= 4


def test_every_suffix_that_pillow_reads_is_one(tmp_path):
    assert {".png", ".jpg", ".jpeg", ".jfif", ".tif", ".tiff", ".gif", ".bmp", ".webp", ".ppm", ".avif"} <= suffixes()
    assert not suffixes() & {".eps", ".ps", ".pdf", ".mpg", ".h5", ".txt", ".npz"}
    Image.fromarray(RGB).save(tmp_path / "a.png")
    (tmp_path / "a.png").rename(tmp_path / "b.JPG")  # what is in it decides
    np.testing.assert_allclose(read(tmp_path), RGB, atol=1e-4)


def test_other_shapes_are_cropped_to_their_middle(tmp_path):
    wide = np.zeros((SIDE, 3 * SIDE, 3), np.uint8)
    wide[:, SIDE : 2 * SIDE] = RGB
    Image.fromarray(wide).save(tmp_path / "a.png")
    np.testing.assert_allclose(read(tmp_path), RGB, atol=1e-4)
    Image.new("RGB", (1, 500), (3, 4, 5)).save(tmp_path / "a.png")
    assert np.abs(read(tmp_path) - np.array([3, 4, 5])).max() <= 1e-4


def test_reading_one_image_follows_the_same_rules(tmp_path, caplog):
    exif = Image.Exif()
    exif[274] = 3
    Image.fromarray(np.ascontiguousarray(RGB[::-1, ::-1])).save(tmp_path / "a.png", exif=exif)
    found = data.read_image(tmp_path / "a.png").permute(1, 2, 0).numpy() * 255
    np.testing.assert_allclose(found, RGB, atol=1e-4)
    assert caplog.messages == [f"image {str(tmp_path / 'a.png')!r}: turned upright (EXIF)"]
    with pytest.raises(ConfigError, match="is no file"):
        data.read_image(tmp_path / "b.png")
