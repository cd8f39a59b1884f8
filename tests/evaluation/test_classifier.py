"""The small classifiers: accuracy on digits not seen, exact repetition, files and the cache."""

import os
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from rlfusion.common.errors import ConfigError
from rlfusion.common.seeding import stream
from rlfusion.data import Dataset, digits, to_pixels
from rlfusion.evaluation import classifier
from rlfusion.evaluation.classifier import JUDGE, REWARD, accuracy, augment, cached, load, save, train
from rlfusion.nets.classifier import Classifier

SHORT = {"mlp": replace(REWARD, steps=12), "conv": replace(JUDGE, steps=12)}


@pytest.fixture(scope="module")
def parts():
    return digits().split(0.25, seed=0)


@pytest.fixture(scope="module", params=[(REWARD, 0.96), (JUDGE, 0.97)], ids=["mlp", "conv"])
def trained(request, parts):
    config, wanted = request.param
    return train(parts[0], config), wanted


def test_presets_are_accurate_on_held_out_digits(trained, parts):
    module, wanted = trained
    assert accuracy(module, parts[1]) >= wanted
    assert not module.training
    assert not any(p.requires_grad for p in module.parameters())


def test_accuracy_counts_what_is_right(trained, parts):
    module, _ = trained
    wrong = Dataset(parts[1].x, (parts[1].label + 1) % 10, parts[1].names)
    assert accuracy(module, wrong) <= 1 - accuracy(module, parts[1])


@pytest.mark.parametrize("kind", ["mlp", "conv"])
def test_training_repeats_bit_for_bit_and_differs_by_seed(kind, parts):
    torch.manual_seed(1)
    first = train(parts[0], SHORT[kind]).state_dict()
    before = torch.get_rng_state()
    again = train(parts[0], SHORT[kind]).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    other = train(parts[0], replace(SHORT[kind], seed=1)).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)


def test_training_is_on_one_thread_and_restores_their_number(parts, monkeypatch):
    threads, seen = torch.get_num_threads(), []
    monkeypatch.setattr(classifier, "augment", lambda *a: seen.append(torch.get_num_threads()) or augment(*a))
    torch.set_num_threads(2)
    try:
        train(parts[0], SHORT["mlp"])
        assert set(seen) == {1}
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


def test_augment_shifts_whole_images_by_at_most_shift():
    x = torch.zeros(200, 2, 8, 8)
    x[:, 0, 3, 4], x[:, 1, 3, 4] = 1, 2
    moved = augment(x, 1, 0.0, stream(0))
    where = moved[:, 0].flatten(1).argmax(1)
    assert set(where.tolist()) == {8 * row + column for row in (2, 3, 4) for column in (3, 4, 5)}
    assert torch.equal(moved[:, 1], 2 * moved[:, 0])
    assert torch.equal(moved.sum((2, 3)), x.sum((2, 3)))
    assert torch.equal(augment(x, 0, 0.0, stream(0)), x)


def test_augment_adds_noise_of_its_standard_deviation():
    noise = augment(torch.zeros(500, 1, 8, 8), 1, 0.3, stream(0))
    assert noise.std().item() == pytest.approx(0.3, rel=0.02)
    assert abs(noise.mean().item()) < 0.01


@pytest.mark.parametrize("kind", ["mlp", "conv"])
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 32, 32), (4, 9, 17)])
def test_every_architecture_takes_every_shape(kind, shape, tmp_path):
    module = Classifier(kind, shape, 7)
    x = torch.rand(3, *shape)
    assert module.features(x).shape == (3, module.width)
    torch.testing.assert_close(module(x), module.head(module.features(x)))
    assert module(x).shape == (3, 7)
    save(module, tmp_path / "c.safetensors")
    held = load(tmp_path / "c.safetensors")
    assert (held.kind, held.shape, held.classes) == (kind, shape, 7)
    assert torch.equal(held(x), module(x))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("cnn", (1, 8, 8), 10), "unknown kind of classifier 'cnn': .* did you mean 'conv'"),
        (("mlp", (1, 8, 7), 10), "H and W at least 8"),
        (("mlp", (8, 8), 10), r"shape = \(8, 8\)"),
        (("mlp", (1, 8, 8), 1), "classes = 1"),
    ],
)
def test_classifiers_that_cannot_be(arguments, message):
    with pytest.raises(ConfigError, match=message):
        Classifier(*arguments)


@pytest.mark.parametrize("setting", [{"steps": 0}, {"lr": float("nan")}, {"noise": -1.0}, {"ema_decay": 1.0}])
def test_settings_that_cannot_work(setting):
    with pytest.raises(ConfigError, match=next(iter(setting))):
        replace(REWARD, **setting)


def test_files_that_hold_no_classifier_are_named(tmp_path):
    with pytest.raises(ConfigError, match=r"'.*absent' does not exist"):
        load(tmp_path / "absent")
    (tmp_path / "torn").write_bytes(b"\x10\x00")
    with pytest.raises(ConfigError, match=r"torn' cannot be read"):
        load(tmp_path / "torn")
    save_file({"w": torch.zeros(1)}, tmp_path / "other", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"other' holds no classifier: its metadata has \['format'\]"):
        load(tmp_path / "other")


def test_a_failed_save_leaves_the_old_file_and_no_scrap(tmp_path, monkeypatch):
    path = tmp_path / "c.safetensors"
    save(Classifier("mlp", (1, 8, 8), 10), path)
    before = path.read_bytes()

    def fail(source, target):
        raise OSError("disk")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk"):
        save(Classifier("mlp", (1, 8, 8), 10), path)
    assert path.read_bytes() == before
    assert [f.name for f in tmp_path.iterdir()] == ["c.safetensors"]


def test_the_cache_trains_once_for_each_setting_and_data(parts, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(classifier, "train", lambda data, config: calls.append(config) or train(data, config))
    path = cached(parts[0], SHORT["mlp"], tmp_path)
    assert path.parent == tmp_path / "cache"
    assert cached(parts[0], SHORT["mlp"], tmp_path) == path
    assert len(calls) == 1
    x = to_pixels(parts[1].x)
    assert torch.equal(load(path)(x), train(parts[0], SHORT["mlp"])(x))
    assert cached(parts[0], replace(SHORT["mlp"], noise=0.0), tmp_path) != path
    assert cached(parts[1], SHORT["mlp"], tmp_path) != path
    assert len(calls) == 3


def test_a_torn_cache_file_is_trained_again_and_named(parts, tmp_path):
    path = cached(parts[0], SHORT["mlp"], tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.warns(UserWarning, match="cannot be read"):
        assert cached(parts[0], SHORT["mlp"], tmp_path) == path
    assert path.read_bytes() == whole


def test_a_cache_file_of_other_data_or_with_flipped_bits_is_trained_again(parts, tmp_path):
    path, other = cached(parts[0], SHORT["mlp"], tmp_path), cached(parts[1], SHORT["mlp"], tmp_path)
    whole = path.read_bytes()
    path.write_bytes(other.read_bytes())
    with pytest.warns(UserWarning, match="of other data"):
        cached(parts[0], SHORT["mlp"], tmp_path)
    assert path.read_bytes() == whole
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 64]))
    with pytest.warns(UserWarning, match="SHA-256"):
        cached(parts[0], SHORT["mlp"], tmp_path)
    assert path.read_bytes() == whole
