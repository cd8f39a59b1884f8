"""Data sets: what is loaded, how it is split and ordered, what is refused."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from rlfusion import data
from rlfusion.common.errors import ConfigError


def test_digits_are_those_of_scikit_learn():
    digits, raw = data.digits(), load_digits()
    assert digits.x.shape == (1797, 1, 8, 8)
    assert digits.x.dtype == torch.float32
    assert (digits.x.min(), digits.x.max()) == (-1, 1)
    assert digits.label.tolist() == raw.target.tolist()
    assert (digits.classes, digits.shape, len(digits)) == (10, (1, 8, 8), 1797)
    np.testing.assert_array_equal(data.to_pixels(digits.x)[:, 0].numpy() * 16, raw.images)


def test_a_scikit_learn_without_the_file_of_digits_is_asked_for_them(monkeypatch):
    digits = data.digits()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    asked = data.digits()
    assert torch.equal(asked.x, digits.x)
    assert torch.equal(asked.label, digits.label)


def test_digits_are_read_without_an_import_of_scikit_learn():
    code = (
        "import sys; from rlfusion import data; data.digits()\n"
        "print(*{name.split('.')[0] for name in sys.modules} & {'sklearn', 'scipy', 'pandas'})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_a_size_of_data_that_have_their_own_is_refused(tmp_path):
    np.savez(tmp_path / "own.npz", images=np.zeros((4, 16, 16), np.uint8), labels=np.arange(4))
    for name, size, own in (("digits", 16, "8x8"), (str(tmp_path / "own.npz"), 64, "16x16")):
        with pytest.raises(ConfigError, match=f"size = {size}: data .* are {own} as they are, expected no size"):
            data.load(name, size)
    assert data.load("digits", 8).shape == (1, 8, 8)
    assert data.load(str(tmp_path / "own.npz"), 16).shape == (1, 16, 16)


def test_to_pixels_clamps():
    assert data.to_pixels(torch.tensor([-1.5, -1, 0, 1, 3])).tolist() == [0, 0, 0.5, 1, 1]


def test_the_split_is_stratified_disjoint_and_keyed():
    digits = data.digits()
    digits.x[:, 0, 0, 0] = torch.arange(1797) / 1797  # mark every sample
    train, held = digits.split(0.2)
    marks = [set(part.x[:, 0, 0, 0].tolist()) for part in (train, held)]
    assert not marks[0] & marks[1]
    assert len(marks[0]) + len(marks[1]) == 1797
    for c in range(10):
        count = int((digits.label == c).sum())
        assert int((held.label == c).sum()) == round(0.2 * count)
    assert torch.equal(digits.split(0.2)[1].x, held.x)
    assert not torch.equal(digits.split(0.2, seed=1)[1].x, held.x)
    assert len(digits.split(0.0)[1]) == 0


def write_image(path, size, grey, mode="L"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, grey).save(path)


def test_a_folder_of_class_folders(tmp_path):
    write_image(tmp_path / "cat" / "deep" / "a.png", (10, 20), 255)
    write_image(tmp_path / "ant" / "b.png", (16, 16), 0)
    (tmp_path / "cat" / "notes.txt").write_text("not an image")
    loaded = data.load(str(tmp_path), size=8)
    assert loaded.names == ("ant", "cat")
    assert loaded.x.shape == (2, 3, 8, 8)
    assert [int(loaded.x[loaded.label == c].mean()) for c in (0, 1)] == [-1, 1]


def test_a_flat_folder_is_one_class_and_crops_to_the_middle(tmp_path):
    image = Image.new("RGB", (30, 10), (255, 0, 0))
    image.paste((0, 0, 255), (10, 0, 20, 10))
    image.save(tmp_path / "a.png")
    loaded = data.folder(tmp_path, 10)
    assert loaded.names == ("all",)
    assert loaded.x[0, :, 5, 5].tolist() == [-1, -1, 1]
    assert (loaded.x[0, 2] == 1).all()


def test_an_npz_of_bytes_or_floats(tmp_path):
    grey = np.arange(2 * 4 * 4, dtype=np.uint8).reshape(2, 4, 4)
    np.savez(tmp_path / "a.npz", images=grey, labels=np.array([2, 0]))
    loaded = data.load(str(tmp_path / "a.npz"))
    assert loaded.x.shape == (2, 1, 4, 4)
    assert loaded.label.tolist() == [2, 0]
    assert loaded.names == ("0", "1", "2")
    np.testing.assert_allclose(loaded.x[:, 0].numpy(), grey / 127.5 - 1, atol=1e-6)
    np.savez(tmp_path / "b.npz", images=np.stack([grey] * 3, -1))
    assert data.npz(tmp_path / "b.npz").x.shape == (2, 3, 4, 4)
    floats = np.linspace(-1, 1, 48).reshape(1, 3, 4, 4)
    np.savez(tmp_path / "c.npz", images=floats)
    np.testing.assert_allclose(data.npz(tmp_path / "c.npz").x.numpy(), floats, atol=1e-7)


@pytest.mark.parametrize(
    ("arrays", "match"),
    [
        ({"pictures": np.zeros((2, 4, 4), np.uint8)}, "expected an array 'images'"),
        ({"images": np.zeros((2, 1, 4, 4)) + 5.0}, r"expected uint8 .* or float"),
        ({"images": np.zeros((2, 1, 4, 4)) * np.nan}, r"expected uint8 .* or float"),
        ({"images": np.zeros((2, 4, 4), np.int64)}, "int64"),
        ({"images": np.zeros((2, 4, 4), np.uint8), "labels": np.array([0.0, 1.0])}, "labels"),
        ({"images": np.zeros((2, 4, 4), np.uint8), "labels": np.array([0])}, "labels"),
        ({"images": np.zeros((2, 4, 4), np.uint8), "labels": np.array([0, -1])}, r"0\.\."),
    ],
)
def test_an_npz_that_cannot_be_used_is_refused(tmp_path, arrays, match):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(ConfigError, match=match):
        data.npz(tmp_path / "a.npz")


def test_missing_empty_or_broken_sources_are_named(tmp_path):
    for source in ("nowhere", "nowhere.npz"):
        with pytest.raises(ConfigError, match="nowhere"):
            data.load(str(tmp_path / source))
    with pytest.raises(ConfigError, match="no image"):
        data.load(str(tmp_path))
    (tmp_path / "bad.png").write_text("not a picture")
    with pytest.raises(ConfigError, match=r"bad\.png"):
        data.load(str(tmp_path))


def test_a_dataset_checks_its_shapes_and_labels():
    with pytest.raises(ConfigError, match="samples are"):
        data.Dataset(torch.zeros(2, 4, 4), torch.zeros(2, dtype=torch.int64), ("a",))
    with pytest.raises(ConfigError, match=r"0\.\.0"):
        data.Dataset(torch.zeros(2, 1, 4, 4), torch.tensor([0, 1]), ("a",))


@pytest.mark.parametrize(("total", "batch"), [(10, 4), (10, 10), (3, 8), (10, 1)])
def test_batches_are_pure_in_the_step_and_cover_each_epoch(total, batch):
    steps = [data.batch_indices(total, batch, k, 0, "train") for k in range(3 * total)]
    assert all(len(s) == batch for s in steps)
    flat = np.concatenate(steps)
    for epoch in range(len(flat) // total):
        assert sorted(flat[epoch * total : (epoch + 1) * total]) == list(range(total))
    np.testing.assert_array_equal(data.batch_indices(total, batch, 7, 0, "train"), steps[7])
    if total > 3:
        other = np.concatenate([data.batch_indices(total, batch, k, 1, "train") for k in range(3 * total)])
        assert (other != flat).any()
        assert (flat[:total] != flat[total : 2 * total]).any()
