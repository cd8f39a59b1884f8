"""Rewards against hand-worked numbers, finite differences and an encoder called on its own; names, options, errors."""

import contextlib
import math
import sys
import textwrap
import time

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from rlfusion.common.errors import ConfigError, NumericalError, UserCodeError
from rlfusion.data import digits, to_pixels
from rlfusion.evaluation.classifier import save
from rlfusion.nets.classifier import Classifier
from rlfusion.rewards import (
    REWARDS,
    ClassLogProb,
    JpegCompressibility,
    JpegIncompressibility,
    RewardError,
    WeightedSum,
    build,
    find,
    ink,
    score,
    symmetry,
    task_info,
)


@pytest.fixture
def images():
    return torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def label():
    return torch.tensor([3, 1, 4, 1, 5])


@pytest.fixture
def plug(tmp_path, monkeypatch):
    """Write a module ``plug_rewards`` and put it on the path, for one test."""

    def write(text):
        (tmp_path / "plug_rewards.py").write_text(textwrap.dedent(text))
        monkeypatch.syspath_prepend(str(tmp_path))
        monkeypatch.delitem(sys.modules, "plug_rewards", raising=False)
        return tmp_path

    yield write
    sys.modules.pop("plug_rewards", None)


def finite_difference(f, x, h=1e-6):
    """d sum f / d x, central."""
    grad = torch.zeros_like(x)
    for i in range(x.numel()):
        step = torch.zeros_like(x).flatten()
        step[i] = h
        step = step.reshape(x.shape)
        grad.view(-1)[i] = (f(x + step).sum() - f(x - step).sum()) / (2 * h)
    return grad


# --- the rewards ---


def test_ink_by_hand():
    x = torch.tensor([[[[0.0, 1.0], [0.5, 0.1]]], [[[1.0, 1.0], [1.0, 1.0]]]])
    assert ink(x, None).tolist() == pytest.approx([0.4, 1.0])


def test_symmetry_by_hand():
    rows = torch.tensor([[[[0.0, 1.0, 0.5], [0.2, 0.9, 0.2]]]])  # |0 - 0.5| twice, the rest 0, over 6 pixels
    assert symmetry(rows, None).item() == pytest.approx(-1 / 6)
    assert symmetry(torch.cat([rows, rows.flip(-1)], -1), None).item() == 0
    top_down = torch.tensor([[[[1.0, 1.0], [0.0, 0.0]]]])  # mirrored left-right, not up-down
    assert symmetry(top_down, None).item() == 0


@pytest.mark.parametrize("name", ["ink", "symmetry", "class_logprob", "sum"])
def test_gradients_match_finite_differences(name, label):
    x = torch.rand(2, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    reward = build({"ink": 2.0, "symmetry": -0.5} if name == "sum" else name)
    reward = reward.double() if isinstance(reward, nn.Module) else reward

    def f(y):
        return score(reward, y, label[:2], name)

    leaf = x.clone().requires_grad_()
    f(leaf).sum().backward()
    assert leaf.grad.abs().max() > 1e-4
    torch.testing.assert_close(leaf.grad, finite_difference(f, x), atol=1e-7, rtol=1e-5)


def encoded_bytes(x, quality, scale, path):
    """An independent encoding, through a file; nearest 8-bit image, PIL's own upscaling is not used."""
    up = nn.Upsample(scale_factor=scale, mode="bilinear")(x[None])[0] if scale > 1 else x
    array = np.rint(up.numpy() * 255).astype(np.uint8)
    picture = Image.fromarray(array[0], "L") if len(array) == 1 else Image.fromarray(np.moveaxis(array, 0, -1), "RGB")
    picture.save(path / "x.jpg", quality=quality)
    return (path / "x.jpg").stat().st_size


@pytest.mark.parametrize(
    ("shape", "settings", "quality", "scale"),
    [
        ((1, 8, 8), {}, 95, 8),
        ((3, 32, 32), {}, 95, 2),
        ((3, 80, 64), {}, 95, 1),
        ((1, 8, 8), {"quality": 60, "scale": 3}, 60, 3),
    ],
)
def test_jpeg_sizes_are_those_of_files(shape, settings, quality, scale, tmp_path):
    x = torch.rand(4, *shape, generator=torch.Generator().manual_seed(2))
    x[1] = x[1] / 4  # other sizes, larger and smaller in turn: one buffer serves all
    x[2] = 0.5
    expected = [encoded_bytes(image, quality, scale, tmp_path) / 1000 for image in x]
    assert JpegIncompressibility(**settings)(x, None).tolist() == pytest.approx(expected, abs=1e-6)
    assert JpegCompressibility(**settings)(x, None).tolist() == pytest.approx([-e for e in expected], abs=1e-6)
    assert len(set(expected)) == 4


def test_jpeg_default_scale_sees_the_digit_and_not_the_header():
    x = to_pixels(digits().x[:100])
    header = JpegIncompressibility()(torch.zeros(1, 1, 8, 8), None)
    assert JpegIncompressibility()(x, None).min() > 2 * header
    assert JpegIncompressibility(scale=1)(x, None).max() < 2 * header


def test_jpeg_passes_no_gradient_and_refuses_two_channels(images):
    assert not JpegCompressibility()(images.requires_grad_(), None).requires_grad
    with pytest.raises(ConfigError, match="2 channels"):
        JpegCompressibility()(torch.rand(1, 2, 8, 8), None)


@pytest.mark.alone
def test_jpeg_is_quick():
    reward, x = JpegCompressibility(), torch.rand(256, 1, 8, 8)
    reward(x, None)
    start = time.perf_counter()
    reward(x, None)
    assert time.perf_counter() - start < 1.0  # 0.02 s alone on one core


def test_class_logprob_is_the_label_s_log_softmax(tmp_path, images, label):
    torch.manual_seed(0)
    module = Classifier("mlp", (1, 8, 8), 10)
    save(module, tmp_path / "c.safetensors")
    reward = build("class_logprob", {"class_logprob": {"weights": str(tmp_path / "c.safetensors")}})
    expected = [math.log(module(images).softmax(1)[i, c].item()) for i, c in enumerate(label)]
    assert reward(images, label).tolist() == pytest.approx(expected, rel=1e-5)
    remote = build("class_logprob", {"class_logprob": reward.blank()})
    assert not torch.equal(remote(images, label), reward(images, label))
    remote.load_state_dict(reward.state_dict())
    assert torch.equal(remote(images, label), reward(images, label))


@pytest.mark.parametrize("cond", [None, torch.zeros(5), torch.zeros(4, dtype=torch.int64), torch.full((5,), 10)])
def test_class_logprob_refuses_what_is_no_label(images, cond):
    with pytest.raises(ConfigError, match="label"):
        ClassLogProb()(images, cond)


def test_class_logprob_refuses_other_files_and_shapes(tmp_path, images, label):
    save(Classifier("mlp", (3, 9, 9), 4), tmp_path / "c.safetensors")
    with pytest.raises(ConfigError, match=r"classes = 10: the classifier in .* has 4"):
        ClassLogProb(str(tmp_path / "c.safetensors"), classes=10)
    with pytest.raises(ConfigError, match=r"\(1, 8, 8\): this mlp classifier reads \(3, 9, 9\)"):
        ClassLogProb(str(tmp_path / "c.safetensors"))(images, label % 4)
    with pytest.raises(ConfigError, match="does not exist"):
        ClassLogProb(str(tmp_path / "absent"))


# --- the weighted sum ---


def test_weighted_sum_and_its_terms(images, label):
    total = build({"ink": 2.0, "symmetry": -3.0, "class_logprob": 0.5})
    terms = total.terms(images, label)
    assert list(terms) == ["ink", "symmetry", "class_logprob"]
    assert torch.equal(terms["ink"], ink(images, None))
    by_hand = 2 * terms["ink"] - 3 * terms["symmetry"] + 0.5 * terms["class_logprob"]
    torch.testing.assert_close(total(images, label), by_hand)
    torch.testing.assert_close(total.combine(terms), by_hand)


def test_weighted_sum_carries_the_state_of_its_modules(images, label):
    one, other = build({"class_logprob": 1.0, "ink": 1.0}), build({"class_logprob": 1.0, "ink": 1.0})
    assert not torch.equal(one(images, label), other(images, label))
    other.load_state_dict(one.state_dict())
    assert torch.equal(one(images, label), other(images, label))
    dotted = WeightedSum({"a.b:c": ClassLogProb()}, {"a.b:c": 1.0})
    assert len(dotted.state_dict()) == 6


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({}, "expected one for each"),
        ({"ink": math.nan}, "'ink' = nan: expected a finite number"),
        ({"ink": "1"}, "'ink' = '1': expected a finite number"),
        ({"ink": 0.0}, "is 0"),
    ],
)
def test_weights_that_cannot_work(weights, message):
    with pytest.raises(ConfigError, match=message):
        build(weights)


def test_the_sum_names_the_term_that_fails(images):
    total = WeightedSum({"ink": ink, "mine": lambda x, c: None}, {"ink": 1.0, "mine": 0.0})
    with pytest.raises(RewardError, match="'mine' answered NoneType"):
        total(images, None)


# --- score ---


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (None, r"'mine' answered NoneType: expected a tensor of shape \(5,\)"),
        (torch.zeros(4), r"'mine' answered shape \(4,\): expected \(5,\)"),
        (torch.zeros(5, 1), r"'mine' answered shape \(5, 1\)"),
        (torch.tensor(0.0), r"'mine' answered shape \(\)"),
        (torch.zeros(5, dtype=torch.complex64), "real numbers"),
        (torch.zeros(5).to_sparse(), "'mine' answered a sparse_coo tensor: expected a plain one of numbers"),
        (torch.zeros(5, device="meta"), "'mine' answered a meta tensor"),
        (torch.tensor([0, math.nan, 1, -math.inf, 2]), "2 of 5 samples: item 1 = nan, item 3 = -inf$"),
    ],
)
def test_a_bad_result_is_an_error_that_names_reward_and_items(images, result, message):
    with pytest.raises(RewardError, match=message) as caught:
        score(lambda x, c: result, images, None, "mine")
    assert isinstance(caught.value, NumericalError)


def test_ten_bad_items_are_named_and_the_rest_counted():
    with pytest.raises(RewardError, match=r"12 of 12 .* item 9 = nan, and 2 more$"):
        score(lambda x, c: torch.full((12,), math.nan), torch.rand(12, 1, 8, 8), None, "mine")


def test_an_exception_of_the_users_code_is_its_cause_and_gets_the_name(images):
    def broken(x, c):
        raise KeyError("caption")

    with pytest.raises(UserCodeError, match=r"reward 'mine' on samples \(5, 1, 8, 8\): KeyError: 'caption'") as caught:
        score(broken, images, None, "mine")
    assert isinstance(caught.value.__cause__, KeyError)


def test_score_is_float32_and_keeps_gradient(images):
    assert score(lambda x, c: torch.arange(5), images, None, "i").dtype == torch.float32
    assert score(lambda x, c: torch.zeros(5).double(), images, None, "d").dtype == torch.float32
    assert score(ink, images.bfloat16(), None, "ink").dtype == torch.float32
    assert score(ink, images.requires_grad_(), None, "ink").requires_grad


# --- names and options ---


def test_short_names():
    of_a_clip = {"clip_score", "clip_class", "clip_similarity", "aesthetic", "hps_v2", "pick_score"}
    jpeg = {"jpeg_compressibility", "jpeg_incompressibility"}
    assert {"ink", "symmetry", "class_logprob"} | jpeg | of_a_clip <= set(REWARDS)
    assert build("ink") is ink
    assert build("jpeg_compressibility", {"jpeg_compressibility": {"quality": 80}}) == JpegCompressibility(80)
    assert build("jpeg_incompressibility") == JpegIncompressibility()


@pytest.mark.parametrize(
    ("reward", "options", "message"),
    [
        (
            "inc",
            {},
            r"unknown reward 'inc': .* did you mean 'ink'\? \(or package.module:name, path/to/file.py:name, http",
        ),
        ({"simmetry": 1.0}, {}, "did you mean 'symmetry'"),
        ("jpeg_compressibility", {"jpeg_compressibility": {"qualty": 9}}, "'qualty': .* did you mean 'quality'"),
        ("jpeg_compressibility", {"jpeg_compressibility": {"quality": 0}}, "quality = 0: expected"),
        ("jpeg_compressibility", {"jpeg_compressibility": {"scale": "8"}}, "scale = '8' of reward .*: expected int"),
        ("ink", {"ink": {"power": 2}}, "'ink' takes no options: got 'power'"),
        ("ink", {"inc": {}}, "unknown reward in the options 'inc': .* did you mean 'ink'"),
        ("no_such_package.rewards:f", {}, "no module 'no_such_package'"),
        ("math:sqr", {}, "unknown name in module 'math' 'sqr': .* did you mean 'sqrt'"),
        ("math:pi", {}, "'math:pi' is float"),
        ("math:", {}, "expected package.module:name"),
        (":f", {}, "expected package.module:name"),
    ],
)
def test_names_and_options_that_cannot_work(reward, options, message):
    with pytest.raises(ConfigError, match=message):
        build(reward, options)


def test_a_user_s_functions_classes_and_factories_by_module(plug, images):
    plug(
        """
        import torch

        def top(samples, cond, *, power=1.0):
            return samples.amax((1, 2, 3)) ** power

        def make(scale=2.0, offset=1.0):
            return lambda samples, cond: scale * samples.mean((1, 2, 3)) + offset

        class Settings:
            def __init__(self, factor):
                self.factor = factor

            def __call__(self, samples, cond):
                return self.factor * samples.mean((1, 2, 3))

        class Net(torch.nn.Module):
            def forward(self, samples, cond):
                return samples.sum((1, 2, 3))

        net = Net()
        half = Settings(0.5)

        def nothing():
            return None
        """
    )
    mean, peak = images.mean((1, 2, 3)), images.amax((1, 2, 3))

    def result(name, **options):
        return build(f"plug_rewards:{name}", {f"plug_rewards:{name}": options})(images, None)

    torch.testing.assert_close(result("top"), peak)
    torch.testing.assert_close(result("top", power=3.0), peak**3)
    torch.testing.assert_close(result("make"), 2 * mean + 1)
    torch.testing.assert_close(result("make", offset=0.0), 2 * mean)
    torch.testing.assert_close(result("Settings", factor=4), 4 * mean)
    torch.testing.assert_close(result("half"), 0.5 * mean)
    torch.testing.assert_close(result("net"), images.sum((1, 2, 3)))
    torch.testing.assert_close(result("Net"), images.sum((1, 2, 3)))
    with pytest.raises(ConfigError, match=r"needs the options \['factor'\]"):
        result("Settings")
    with pytest.raises(ConfigError, match=r"'powr'.*did you mean 'power'"):
        result("top", powr=3.0)
    with pytest.raises(ConfigError, match="made NoneType"):
        result("nothing")
    total = build({"plug_rewards:Net": 1.0, "plug_rewards:top": 2.0})
    torch.testing.assert_close(total(images, None), images.sum((1, 2, 3)) + 2 * peak)


def test_what_a_reward_asks_of_the_model_is_filled_in(plug, images):
    plug(
        """
        import torch

        def length(samples, cond, *, prompts):
            return torch.tensor([len(prompts[c]) for c in cond]) + samples.mean((1, 2, 3))

        class Pixels:
            def __init__(self, shape, classes, prompts=("none",)):
                self.value = (*shape, classes, *prompts)

            def __call__(self, samples, cond):
                return samples.sum((1, 2, 3))
        """
    )
    told, cond = task_info(("a", "two"), (1, 8, 8)), torch.tensor([0, 1, 1, 0, 0])
    result = build("plug_rewards:length", task_info=told)(images, cond) - images.mean((1, 2, 3))
    torch.testing.assert_close(result, torch.tensor([1.0, 3, 3, 1, 1]))
    said = {"plug_rewards:length": {"prompts": ["four", "one"]}}
    result = build("plug_rewards:length", said, told)(images, cond) - images.mean((1, 2, 3))
    torch.testing.assert_close(result, torch.tensor([4.0, 3, 3, 4, 4]))
    assert build("plug_rewards:Pixels", task_info=told).value == (1, 8, 8, 2, "a", "two")
    with pytest.raises(ConfigError, match=r"needs the options \['prompts'\]"):
        build("plug_rewards:length")
    assert build("class_logprob", task_info=task_info("ab", (3, 9, 9))).classifier.shape == (3, 9, 9)


def test_a_module_that_lacks_its_own_import_says_so(plug):
    plug("import absent_dependency\n")
    with pytest.raises(ConfigError, match=r"'plug_rewards:f' cannot be loaded.*absent_dependency.*line 1"):
        build("plug_rewards:f")


def test_an_entry_point_of_an_installed_package_is_found(plug, images):
    folder = plug("def blank(samples, cond):\n    return -samples.mean((1, 2, 3))\n")
    info = folder / "plug_rewards-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: plug-rewards\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[rlfusion.rewards]\nblank = plug_rewards:blank\nodd = math:pi\n")
    torch.testing.assert_close(build("blank")(images, None), -images.mean((1, 2, 3)))
    with pytest.raises(ConfigError, match="did you mean 'blank'"):
        build("blnk")
    with pytest.raises(ConfigError, match="'odd' is float"):
        find("odd")


@pytest.mark.parametrize("change", [lambda x, c: x.zero_(), lambda x, c: c.add_(1), lambda x, c: x[:, 0].mul_(2)])
def test_a_reward_that_changes_what_others_read_is_refused(change, images, label):
    with pytest.raises(RewardError, match="in place"):
        score(lambda x, c: change(x, c) is None or x.mean((1, 2, 3)), images, label, "rude")


SETTERS = {
    "threads": (torch.get_num_threads, lambda: torch.set_num_threads(torch.get_num_threads() + 1)),
    "dtype": (torch.get_default_dtype, lambda: torch.set_default_dtype(torch.float64)),
    "gradients": (torch.is_grad_enabled, lambda: torch.set_grad_enabled(not torch.is_grad_enabled())),
    "device": (torch.get_default_device, lambda: torch.set_default_device("meta")),
}


@pytest.mark.parametrize("raises", [False, True])
@pytest.mark.parametrize(("get", "change"), SETTERS.values(), ids=SETTERS)
def test_what_a_reward_sets_of_torch_is_put_back(get, change, raises, images, label):
    def rude(x, c):
        change()
        return x.mean((1, 2, 3)) if not raises else 1 / 0

    before = get()
    with pytest.raises(UserCodeError) if raises else contextlib.nullcontext():
        score(rude, images, label, "rude")
    assert get() == before
