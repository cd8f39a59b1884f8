"""``.npz`` files: a layout, range and naming that has one meaning is read; whatever is damaged or open is refused, in
one line, quickly, and before memory is taken.
"""

import io
import struct
import time
import zipfile
from collections.abc import Callable

import numpy as np
import pytest

from rlfusion import data
from rlfusion.cli.main import main
from rlfusion.common.errors import ConfigError

DRAW = np.random.default_rng(1)
BYTES = DRAW.integers(2, 256, (6, 8, 10, 3), np.uint8)
EXPECTED = BYTES.transpose(0, 3, 1, 2) / 127.5 - 1
LABELS = np.array([0, 1, 2, 0, 1, 2])


def npz(tmp_path, settings="", **arrays) -> data.Dataset:
    np.savez(tmp_path / "a.npz", **arrays)
    return data.load(f"npz(path={str(tmp_path / 'a.npz')!r}{settings})" if settings else str(tmp_path / "a.npz"))


@pytest.mark.parametrize(
    ("images", "settings"),
    [
        (BYTES, ""),
        (BYTES.transpose(0, 3, 1, 2), ""),
        (np.asfortranarray(BYTES), ""),
        (EXPECTED, ""),
        (EXPECTED.transpose(0, 2, 3, 1), ""),
        (EXPECTED.astype(">f4"), ""),
        (BYTES / 255, ""),
        (BYTES / 255, ", range='0..1'"),
        (BYTES.astype(np.float32), ", range='0..255'"),
        (BYTES.astype(np.int64), ", range='0..255'"),
        (BYTES.astype(">u2") * 257, ", range='0..65535'"),
        (BYTES, ", layout='NHWC'"),
        (BYTES.transpose(0, 3, 1, 2), ", layout='NCHW'"),
    ],
)
def test_layouts_and_ranges_give_the_same_samples(images, settings, tmp_path):
    found = npz(tmp_path, settings, images=images, labels=LABELS)
    assert found.shape == (3, 8, 10)
    np.testing.assert_allclose(found.x.numpy(), EXPECTED, atol=1e-6)
    assert found.levels == {"f": None, "u": 256, "i": 256}[images.dtype.kind] or "65535" in settings


@pytest.mark.parametrize("layout", ["NHW", "NHWC", "NCHW"])
def test_grey_images(layout, tmp_path):
    grey = BYTES[..., 0]
    images = {"NHW": grey, "NHWC": grey[..., None], "NCHW": grey[:, None]}[layout]
    for settings in ("", f", layout='{layout}'"):
        found = npz(tmp_path, settings, images=images)
        np.testing.assert_allclose(found.x[:, 0].numpy(), grey / 127.5 - 1, atol=1e-6)
    bits = npz(tmp_path, images=images > 99)
    assert (bits.levels, set(bits.x.unique().tolist())) == (2, {-1.0, 1.0})


def test_latents_of_many_channels_are_channels_first_where_the_sides_say_so(tmp_path):
    latents = DRAW.uniform(-1, 1, (2, 16, 8, 8))
    assert npz(tmp_path, images=latents).shape == (16, 8, 8)
    assert npz(tmp_path, images=latents[:, :4]).shape == (4, 8, 8)
    assert npz(tmp_path, images=latents.transpose(0, 2, 3, 1)).shape == (16, 8, 8)


@pytest.mark.parametrize(
    ("labels", "names", "label"),
    [
        (np.array([2, 0, 1, 2, 0, 1], np.uint8), ("0", "1", "2"), [2, 0, 1, 2, 0, 1]),
        (np.array([[2], [0], [1], [2], [0], [1]]), ("0", "1", "2"), [2, 0, 1, 2, 0, 1]),
        (np.eye(3)[[2, 0, 1, 2, 0, 1]], ("0", "1", "2"), [2, 0, 1, 2, 0, 1]),
        (np.array(["b", "a", "é", "b", "a", "é"]), ("a", "b", "é"), [1, 0, 2, 1, 0, 2]),
        (np.array([b"b", b"a", b"b", b"b", b"a", b"a"]), ("a", "b"), [1, 0, 1, 1, 0, 0]),
        (np.array([True, False] * 3), ("0", "1"), [1, 0] * 3),
        (np.array([5, 0, 0, 0, 0, 0]), ("0", "1", "2", "3", "4", "5"), [5, 0, 0, 0, 0, 0]),
    ],
)
def test_labels_of_every_kind(labels, names, label, tmp_path):
    found = npz(tmp_path, images=BYTES, labels=labels)
    assert (found.names, found.label.tolist(), found.captioned) == (names, label, False)


def test_published_namings(tmp_path):
    """Keras' mnist.npz, MedMNIST, and the arrays of a plain ``np.savez(images, labels)``."""
    grey = BYTES[..., 0]
    keras = npz(tmp_path, x_train=grey[:4], y_train=LABELS[:4], x_test=grey[4:], y_test=LABELS[1:3])
    train, held = keras.split(0.5)
    assert (len(train), len(held), held.label.tolist()) == (4, 2, [1, 2])
    np.testing.assert_allclose(held.x[:, 0].numpy(), grey[4:] / 127.5 - 1, atol=1e-6)
    assert "4 of 'train' to train on, 2 of 'test' held out" in keras.summary
    parts = {f"{part}_images": BYTES[2 * i : 2 * i + 2] for i, part in enumerate(("train", "val", "test"))}
    labels = {f"{part}_labels": np.array([[0], [1]], np.uint8) for part in ("train", "val", "test")}
    medical = npz(tmp_path, **parts, **labels)
    np.testing.assert_allclose(medical.split(0.1)[1].x.numpy(), EXPECTED[2:4], atol=1e-6)  # val, and test is left
    assert "arrays not read: test_images, test_labels" in medical.summary
    alone = npz(tmp_path, ", split='test'", **parts, **labels)
    assert (len(alone), alone.held) == (2, None)
    both = npz(tmp_path, ", split='val', held='train'", **parts, **labels)
    np.testing.assert_allclose(both.split(0.1)[0].x.numpy(), EXPECTED[2:4], atol=1e-6)
    np.savez(tmp_path / "a.npz", BYTES, LABELS)
    assert data.load(str(tmp_path / "a.npz")).label.tolist() == LABELS.tolist()
    named = npz(tmp_path, ", images='pictures', labels='kinds'", pictures=BYTES, kinds=LABELS, other=LABELS)
    assert (len(named), named.classes) == (6, 3)
    assert "arrays not read: other" in named.summary


def test_the_second_part_is_read_as_the_first(tmp_path):
    """A held-out part that happens to have no value below 0 is not taken for another range."""
    found = npz(tmp_path, x_train=np.linspace(-1, 1, 96).reshape(2, 3, 4, 4), x_test=np.full((1, 3, 4, 4), 0.5))
    assert found.split(0.5)[1].x.unique().tolist() == [0.5]


def test_captions_come_before_labels_unless_settings_say_otherwise(tmp_path):
    said = np.array(["b", "a", "b", "b", "a", "c"])
    both = {"images": BYTES, "labels": LABELS, "captions": said}
    assert npz(tmp_path, **both).names == ("a", "b", "c")
    assert "arrays not read: labels" in npz(tmp_path, **both).summary
    assert npz(tmp_path, ", captions='none'", **both).names == ("0", "1", "2")
    assert npz(tmp_path, ", captions='none', labels='none'", **both).names == ("0",)


SMALL = np.zeros((2, 4, 4), np.uint8)
FLOATS = np.linspace(-1, 1, 96).reshape(2, 3, 4, 4)


def hole(value) -> np.ndarray:
    images = FLOATS.copy()
    images[1, 2, 3, 3] = value
    return images


STRUCTURED = np.zeros((2, 4, 4), [("a", "u1"), ("b", "f4")])
WRONG: dict[str, dict] = {
    **{
        f"images of {d}": {"images": np.zeros((2, 4, 4), d)}
        for d in ("i1", "i4", "u2", "u8", "c8", "U3", "S3", "M8[s]")
    },
    **{f"{n} axes": {"images": np.zeros((2,) * n, np.uint8)} for n in (1, 2, 5, 6)},
    **{f"empty {s}": {"images": np.zeros(s, np.uint8)} for s in ((0, 4, 4), (2, 0, 4), (2, 4, 4, 0), (0,), ())},
    **{f"a hole of {v}": {"images": hole(v)} for v in (np.nan, np.inf, -np.inf, 1.001, -1.001, 255, 1e300)},
    "structured": {"images": STRUCTURED},
    "0 and 1 in bytes": {"images": np.eye(4, dtype=np.uint8)[None].repeat(2, 0)},
    "open layout 3": {"images": np.zeros((2, 3, 4, 3), np.uint8)},
    "open layout 1": {"images": np.zeros((2, 1, 5, 1), np.uint8)},
    "transparency last": {"images": np.zeros((2, 8, 8, 4), np.uint8)},
    "transparency first": {"images": np.zeros((2, 4, 8, 8), np.uint8)},
    "a cube": {"images": np.zeros((2, 8, 8, 8), np.float32)},
    "no channels": {"images": np.zeros((2, 7, 8, 9), np.float32)},
    "one image": {"images": np.zeros((9, 9, 3), np.uint8)},
    "two images arrays": {"images": SMALL, "x": SMALL},
    "only a test part": {"x_test": SMALL},
    "other shapes": {"x_train": SMALL, "x_test": np.zeros((2, 5, 5), np.uint8)},
    "labels of one part": {"x_train": SMALL, "x_test": SMALL, "y_train": np.array([0, 1])},
    "held-out classes": {"x_train": SMALL, "x_test": SMALL, "y_train": np.array([0, 0]), "y_test": np.array([0, 1])},
    **{
        f"labels {name}": {"images": SMALL, "labels": np.array(value)}
        for name, value in {
            "absurd": [0, 10**12],
            "large": [0, 100_000],
            "unsigned": np.array([0, 2**63 + 5], np.uint64),
            "negative": [0, -1],
            "nan": [0, np.nan],
            "whole floats": [0.0, 1.0],
            "complex": [0, 1j],
            "short": [0],
            "long": [0, 1, 2],
            "nested": [[[0]], [[1]]],
            "not one-hot": [[1, 1], [0, 1]],
            "soft": [[0.5, 0.5], [0.2, 0.8]],
            "scalar": 3,
            "empty names": ["a", ""],
            "blank names": ["a", "  "],
            "dates": np.array(["2020", "2021"], "M8[Y]"),
            "bad bytes": np.array([b"\xff\xfe\xfd", b"a"]),
            "surrogates": ["\ud800", "a"],
        }.items()
    },
    **{
        f"captions {name}": {"images": SMALL, "captions": np.array(value)}
        for name, value in {
            "numbers": [1, 2],
            "floats": [0.5, 1.5],
            "empty": ["a cat", ""],
            "short": ["a cat"],
            "pairs": [["a", "b"], ["c", "d"]],
            "surrogates": ["\udfff", "a"],
            "scalar": "a cat",
        }.items()
    },
    "no arrays": {},
    "unknown names": {"pictures": SMALL},
}


def refused(path, settings="") -> str:
    begin = time.process_time()
    with pytest.raises(ConfigError) as caught:
        data.load(f"npz(path={str(path)!r}{settings})" if settings else str(path))
    assert time.process_time() - begin < 2
    said = str(caught.value)
    assert path.name in said
    assert "\n" not in said
    assert len(said) < 700
    return said


@pytest.mark.parametrize("name", WRONG)
def test_arrays_that_mean_nothing_or_two_things_are_refused(name, tmp_path):
    np.savez(tmp_path / "a.npz", **WRONG[name])
    refused(tmp_path / "a.npz")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (", images='image'", "did you mean 'images'"),
        (", labels='label'", "did you mean 'labels'"),
        (", layout='NCHW'", "expected 4 axes"),
        (", layout='CHWN'", "NHWC"),
        (", range='0-1'", r"0\.\.1"),
        (", range='0..1'", r"leave 0\.\.1, the first is 0"),
        (", split='train'", "train"),
        (", images=3", "images = 3 of data source .npz.: expected text"),
        (", pictures='a'", "'pictures'"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, said, tmp_path):
    np.savez(tmp_path / "a.npz", images=BYTES[..., 0], labels=LABELS)
    with pytest.raises(ConfigError, match=said):
        data.load(f"npz(path={str(tmp_path / 'a.npz')!r}{settings})")


def objects(tmp_path) -> bytes:
    np.savez(tmp_path / "o.npz", images=np.array([{"a": 1}, None], object))
    return (tmp_path / "o.npz").read_bytes()


def header(text: str, content: bytes = b"", version: bytes = b"\x01\x00") -> bytes:
    """An .npz whose array has a header written by hand."""
    coded = text.encode("latin1") + b"\n"
    size = struct.pack("<H" if version[0] == 1 else "<I", len(coded))
    return packed({"images.npy": b"\x93NUMPY" + version + size + coded + content})


def packed(files: dict[str, bytes], how: int = zipfile.ZIP_DEFLATED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", how) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return file.getvalue()


def sound() -> bytes:
    file = io.BytesIO()
    np.savez(file, images=BYTES, labels=LABELS)
    return file.getvalue()


def encrypted() -> bytes:
    raw = bytearray(sound())
    raw[6] |= 1
    at = raw.find(b"PK\x01\x02")
    while at >= 0:
        raw[at + 8] |= 1
        at = raw.find(b"PK\x01\x02", at + 4)
    return bytes(raw)


def twice() -> bytes:
    """Two arrays of one name: the second's name is written over in both places."""
    return packed({"images.npy": saved(BYTES), "imagex.npy": saved(BYTES)}).replace(b"imagex", b"images")


def saved(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def bomb() -> bytes:
    """An archive whose directory tells of 3 GB of zeros in 3 kB."""
    text = "{'descr': '|u1', 'fortran_order': False, 'shape': (3000000, 32, 32), }"
    raw = header(text, bytes(3 << 20))
    size = zipfile.ZipFile(io.BytesIO(raw)).infolist()[0].file_size
    return raw.replace(struct.pack("<I", size), struct.pack("<I", 3_072_000_000 + size - (3 << 20)))


SHAPES = [
    "(10**12, 4, 4)",
    "(-2, 4, 4)",
    "(1000000000, 1000000, 3)",
    "(2, 4, 4.0)",
    "(2, 'a')",
    "2",
    "[2, 4, 4]",
    "(True, 4, 4)",
]
HEADERS = {
    **{
        f"shape {s}": f"{{'descr': '|u1', 'fortran_order': False, 'shape': {s}, }}"
        for s in (*SHAPES, "(999999999999, 4, 4)")
    },
    **{
        f"type {d}": f"{{'descr': {d}, 'fortran_order': False, 'shape': (2, 4, 4), }}"
        for d in ("'|O'", "'<f9'", "'x'", "''", "7", "[('a', '<i4')]", "'<U99999999'", "None", "('|u1', (4,))")
    },
    "no shape": "{'descr': '|u1', 'fortran_order': False, }",
    "more keys": "{'descr': '|u1', 'fortran_order': False, 'shape': (2,), 'x': 1}",
    "fortran order": "{'descr': '|u1', 'fortran_order': 'yes', 'shape': (2, 4, 4), }",
    "no dictionary": "[1, 2]",
    "code": "__import__('os').system('true')",
    "open": "{'descr': ",
    "an open text": "{'descr': '''",
    "deep": "(" * 3000 + ")" * 3000,
    "nothing": "",
    "long": " " * 60_000,
}


@pytest.mark.parametrize("name", HEADERS)
@pytest.mark.parametrize("version", [b"\x01\x00", b"\x02\x00", b"\x03\x00"])
def test_headers_that_lie_are_refused_before_memory_is_taken(name, version, tmp_path):
    (tmp_path / "a.npz").write_bytes(header(HEADERS[name], bytes(32), version))
    said = refused(tmp_path / "a.npz")
    if name in ("shape (-2, 4, 4)", "shape (1000000000, 1000000, 3)", "shape (999999999999, 4, 4)"):
        assert "bytes: the file holds 32" in said  # by the header alone, not by an allocation that failed


@pytest.mark.parametrize(
    "make",
    [
        lambda t: b"",
        lambda t: b"not a zip",
        lambda t: bytes(1000),
        lambda t: sound() + b"tail" * 20_000,
        lambda t: packed({}),
        lambda t: packed({"images.txt": b"a"}),
        lambda t: packed({"images.npy": b""}),
        lambda t: packed({"images.npy": b"\x93NUMPY"}),
        lambda t: packed({"images.npy": b"\x93NUMPY\x09\x09" + bytes(90)}),
        lambda t: packed({"images.npy": b"\x80\x04K\x01."}),
        objects,
        lambda t: encrypted(),
        lambda t: twice(),
        lambda t: bomb(),
        lambda t: np.load.__doc__.encode(),
    ],
)
def test_archives_that_are_none(make: Callable[..., bytes], tmp_path):
    (tmp_path / "a.npz").write_bytes(make(tmp_path))
    refused(tmp_path / "a.npz")


def test_pickles_are_never_run(tmp_path):
    (tmp_path / "o").mkdir()
    (tmp_path / "a.npz").write_bytes(objects(tmp_path / "o"))
    assert "pickled objects" in refused(tmp_path / "a.npz")


@pytest.mark.parametrize("how", ["cut", "flip", "zero"])
def test_damaged_archives_give_the_same_samples_or_are_refused(how, tmp_path):
    """60 damages of each kind at keyed places: never other samples (each array has its CRC)."""
    whole, draw, path = sound(), np.random.default_rng(len(how)), tmp_path / "a.npz"
    for _ in range(60):
        raw, at = bytearray(whole), int(draw.integers(len(whole)))
        if how == "cut":
            raw = raw[:at]
        elif how == "flip":
            raw[at] ^= 1 << int(draw.integers(8))
        else:
            raw[at : at + 40] = bytes(len(raw[at : at + 40]))
        path.write_bytes(bytes(raw))
        try:
            found = data.load(str(path))
        except ConfigError as error:
            said = str(error)
        else:
            said = path.name
            np.testing.assert_allclose(found.x.numpy(), EXPECTED, atol=1e-6)
            assert found.label.tolist() in (LABELS.tolist(), [0] * 6)  # a damaged name is the name of another array
        assert path.name in said
        assert "\n" not in said


def test_places_that_are_no_file(tmp_path):
    import os

    (tmp_path / "folder.npz").mkdir()
    os.mkfifo(tmp_path / "pipe.npz")
    for name in ("none.npz", "pipe.npz", "NONE.NPZ"):
        assert "does not exist" in refused(tmp_path / name)
    with pytest.raises(ConfigError, match="holds no image"):
        data.load(str(tmp_path / "folder.npz"))


@pytest.mark.parametrize("command", ["pretrain", "train-clip", "pretrain-autoencoder"])
def test_commands_refuse_in_one_line_and_leave_no_run(command, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.savez("absurd.npz", images=SMALL, labels=np.array([0, 10**12]))
    (tmp_path / "broken.npz").write_bytes(sound()[:900])
    for source, said in (("absurd.npz", "1000000000000"), ("broken.npz", "cannot be read"), ("digts", "'digits'")):
        assert main([command, "--data", source]) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1
        assert said in lines[0]
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("images", "said"),
    [
        (np.full((4, 6, 5, 3), 9, np.uint8), "uint8 6x5 of 3 channels (NHWC); no classes; values 9..9 of 0..255"),
        (
            np.arange(120, dtype=np.uint8).reshape(4, 6, 5),
            "uint8 6x5 of 1 channel (NHW); no classes; values 0..119 of 0..255",
        ),
        (np.full((4, 3, 6, 6), 0.5, "f4"), "float32 6x6 of 3 channels (NCHW); no classes; values 0.5..0.5 of 0..1"),
        (np.full((4, 3, 6, 6), -0.5), "float64 6x6 of 3 channels (NCHW); no classes; values -0.5..-0.5 of -1..1"),
    ],
)
def test_what_was_read_is_told_as_it_lies_in_the_file(images, said, tmp_path):
    np.savez(tmp_path / "x.npz", images=images)
    lines = []
    data.load(str(tmp_path / "x.npz"), say=lines.append)
    assert lines == [f"data {str(tmp_path / 'x.npz')!r}: 4 images; {said}"]
