"""Rewards as people have them: published signatures and their variants give the right numbers, or are refused."""

import functools
import sys
import types
from typing import Union

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from rlfusion.common import notices
from rlfusion.common.errors import ConfigError, UserCodeError
from rlfusion.rewards import RewardError, asks, build, score, task_info
from rlfusion.rewards.remote.exchange import greet, greeted

PROMPTS = ("a cat", "two dogs", "a long red bridge")
METADATA = ({"k": 1}, {"k": 20}, {"k": 300})
COND = torch.tensor([2, 0, 1, 1])
TOLD = task_info(PROMPTS, (3, 4, 4), METADATA)


@pytest.fixture
def samples():
    return torch.rand(4, 3, 4, 4, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def named(monkeypatch):
    """Names a thing as a user does, in a module of its own."""
    module = types.ModuleType("their_rewards")
    monkeypatch.setitem(sys.modules, "their_rewards", module)
    monkeypatch.setattr(notices, "_said", set())

    def name(thing):
        module.thing = thing
        return "their_rewards:thing"

    return name


def means(samples):
    return samples.mean((1, 2, 3))


def eight_bit(samples):
    return (samples * 255).round().mean((1, 2, 3))


LENGTHS = torch.tensor([float(len(PROMPTS[c])) for c in COND])
KEYS = torch.tensor([float(METADATA[c]["k"]) for c in COND])


# --- published signatures, their bodies reduced to a mean of the picture and a length of the prompt ---


def ddpo_factory():  # ddpo-pytorch, Flow-GRPO: reward_fn = getattr(rewards, name)()
    def _fn(images, prompts, metadata):
        if isinstance(images, torch.Tensor):
            images = (images * 255).round().clamp(0, 255).to(torch.uint8).cpu().numpy()
            images = images.transpose(0, 2, 3, 1)  # NCHW -> NHWC
        return np.array([x.mean() + len(p) + m["k"] for x, p, m in zip(images, prompts, metadata)]), {}

    return _fn


def trl_factory(scale=2.0):  # TRL's aesthetic_scorer
    scorer = lambda images: scale * images.mean((1, 2, 3))  # noqa: E731

    def _fn(images, prompts, metadata):
        return scorer(images), {}

    return _fn


def multi_score(images, prompts, metadata):  # Flow-GRPO's multi_score
    return {"ink": means(images), "words": [float(len(p)) for p in prompts]}, {}


class ImageReward:  # ImageReward, an object with score(prompt, image)
    def score(self, prompt, image):
        if isinstance(image, list):
            return [self.score(prompt, x) for x in image]
        assert isinstance(image, Image.Image)
        return np.asarray(image).mean() + len(prompt)


class ManyOfOnePrompt:  # its list form
    def score(self, prompt, images):
        return [np.asarray(x).mean() + len(prompt) for x in images]


class PromptImage(nn.Module):  # classes with (prompt=, image=)
    def __init__(self, scale=1.0):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(scale))

    def forward(self, *, prompt, image):
        return self.scale * image.mean() + len(prompt)


class PickScore:  # Flow-GRPO's PickScoreScorer, PIL images
    def __call__(self, prompt: list[str], images: list[Image.Image]):
        assert len(prompt) == len(images)
        return torch.tensor(
            [np.asarray(x).mean() + len(p) for x, p in zip(images, prompt)], dtype=torch.bfloat16
        ).double()


def ours(samples, cond):
    return means(samples) + cond


class Positional:
    def __call__(self, images, /, cond=None):
        return means(images)


def with_words(samples, cond, *, prompts):
    assert prompts == PROMPTS  # a setting: the words of each condition
    return means(samples) + torch.tensor([float(len(prompts[int(c)])) for c in cond])


def optional(images, prompts=None, metadata=None, temperature=1.0):
    return temperature * means(images) + torch.tensor([float(len(p)) for p in prompts])


def pil_string(images: "list[Image.Image]", prompts: "list[str]"):
    return [np.asarray(x).mean() for x in images]


def arrays(images: np.ndarray, prompts):
    assert images.shape == (4, 4, 4, 3)
    return images.mean((1, 2, 3))


def either(images: Union[torch.Tensor, np.ndarray]):  # noqa: UP007
    return means(images)


def one(image, prompt):
    return float(image.mean()) + len(prompt)


def one_pil(image: Image.Image, prompt: str) -> float:
    return np.asarray(image).mean() + len(prompt)


def swapped(prompts, images):
    assert all(isinstance(p, str) for p in prompts)
    return means(images)


def column(images):
    return means(images)[:, None]


def whole_numbers(images):
    return (means(images) * 100).long()


def flags(images):
    return means(images) > 0.5


def listed(images):
    return [x.mean() for x in images]


def meta(samples, cond, metadata):
    return torch.tensor([float(m["k"]) for m in metadata])


def meta_keyword(samples, cond, *, metadata):
    return torch.tensor([float(m["k"]) for m in metadata])


def samples_alone(samples):
    return means(samples)


def one_of_two(images):
    return {"good": means(images)}


def required(images, threshold):
    return means(images) - threshold


@pytest.mark.parametrize(
    ("thing", "options", "expected"),
    [
        (ddpo_factory, {}, lambda x: eight_bit(x) + LENGTHS + KEYS),
        (trl_factory, {"scale": 3.0}, lambda x: 3 * means(x)),
        (multi_score, {"adapter": {"scores": {"ink": 2, "words": 0.5}}}, lambda x: 2 * means(x) + LENGTHS / 2),
        (ImageReward, {}, lambda x: eight_bit(x) + LENGTHS),
        (ImageReward(), {"adapter": "image_reward"}, lambda x: eight_bit(x) + LENGTHS),
        (ddpo_factory, {"adapter": "ddpo"}, lambda x: eight_bit(x) + LENGTHS + KEYS),
        (lambda img_path, words: np.asarray(img_path).mean() + len(words), {"adapter": "hps"},
         lambda x: eight_bit(x) + LENGTHS),
        (ManyOfOnePrompt, {}, lambda x: eight_bit(x) + LENGTHS),
        (PromptImage, {"scale": 4.0}, lambda x: 4 * means(x) + LENGTHS),
        (PickScore, {}, lambda x: (eight_bit(x) + LENGTHS).bfloat16()),
        (ours, {}, lambda x: means(x) + COND),
        (lambda x, c: means(x) + c, {}, lambda x: means(x) + COND),
        (Positional, {}, means),
        (with_words, {}, lambda x: means(x) + LENGTHS),
        (optional, {"temperature": 3.0}, lambda x: 3 * means(x) + LENGTHS),
        (pil_string, {}, eight_bit),
        (arrays, {}, eight_bit),
        (either, {}, means),
        (one, {}, lambda x: means(x) + LENGTHS),
        (one_pil, {}, lambda x: eight_bit(x) + LENGTHS),
        (one, {"adapter": {"images": "numpy"}}, lambda x: eight_bit(x) + LENGTHS),
        (swapped, {}, means),
        (column, {}, means),
        (whole_numbers, {}, lambda x: (means(x) * 100).long()),
        (flags, {}, lambda x: means(x) > 0.5),
        (listed, {}, means),
        (meta, {}, lambda x: KEYS),
        (meta_keyword, {}, lambda x: KEYS),
        (samples_alone, {}, means),
        (one_of_two, {}, means),
        (required, {"threshold": 0.25}, lambda x: means(x) - 0.25),
        (lambda foo, bar: means(foo) + len(bar), {"adapter": {"parameters": {"foo": "images", "bar": "prompts"}}},
         lambda x: means(x) + 4),
        (lambda *args: means(args[0]) + args[1], {"adapter": {"parameters": {}, "like": "native"}}, None),
        (lambda a, b, m: (means(a) + torch.tensor([float(len(p)) for p in b]), {}), {"adapter": "ddpo"},
         lambda x: means(x) + LENGTHS),
    ],
)  # fmt: skip
def test_scorers_as_they_are_published_give_their_numbers(thing, options, expected, named, samples):
    name = named(thing)
    if expected is None:
        with pytest.raises(ConfigError, match="cannot tell what 'args' is"):
            build(name, {name: options}, TOLD)
        return
    reward = build(name, {name: options} if options else {}, TOLD)
    torch.testing.assert_close(score(reward, samples, COND, name), expected(samples).float(), rtol=1e-5, atol=1e-5)


async def asynchronous(images, prompts):
    return means(images)


async def streaming(images):
    yield means(images)


async def async_factory(scale=1.0):
    return means


class Asynchronous:
    async def __call__(self, images, prompts):
        return means(images)


@pytest.mark.parametrize(
    ("thing", "options", "said"),
    [
        (
            lambda foo, bar: foo,
            {},
            r"needs the options \['foo', 'bar'\], if it makes a reward: expected parameters named samples",
        ),
        (lambda prompts, cond: None, {}, r"\['cond'\], if it makes a reward: expected parameters named samples"),
        (lambda images, foo: None, {}, "foo"),
        (lambda images, *args: None, {}, "cannot tell what 'args' is"),
        (lambda images, samples: None, {}, "two of its parameters are images"),
        (lambda prompt, images: None, {}, "one sample a call, or all"),
        (lambda image, prompts: None, {}, "one sample a call, or all"),
        (swapped, {"adapter": "ddpo"}, "gives images in the place of the parameter 'prompts'"),
        (ours, {"adapter": "pick_score"}, "gives prompts in the place of the parameter 'samples'"),
        (ours, {"adapter": "ddop"}, "did you mean 'ddpo'"),
        (ours, {"adapter": {"imags": "pil"}}, "did you mean 'images'"),
        (ours, {"adapter": {"images": "pli"}}, "did you mean 'pil'"),
        (ours, {"adapter": {"parameters": {"samples": "imagse"}}}, "did you mean 'image"),
        (ours, {"scale": 2}, "takes no options"),
        (required, {}, r"threshold"),
        (lambda: 3, {}, "made int"),
        (asynchronous, {}, "is async: expected a function that returns the scores"),
        (functools.partial(asynchronous, prompts=None), {}, "is async"),
        (Asynchronous, {}, "is async"),
        (Asynchronous(), {}, "is async"),
        (streaming, {}, "is async"),
        (async_factory, {}, "is async"),
        (torch.jit.trace(nn.Linear(4, 1), torch.zeros(1, 4)), {}, "its parameters cannot be read"),
        (dict, {}, "."),
        (object, {}, "made object: expected a callable"),
    ],
)
def test_what_cannot_be_bound_is_refused_with_the_remedy(thing, options, said, named):
    name = named(thing)
    with pytest.raises(ConfigError, match=said) as error:
        build(name, {name: options} if options else {}, TOLD)
    assert "\n" not in str(error.value)


def of_c(samples, c=None):
    return means(samples) if c is None else means(samples) + c


def scaled(images, prompts=None, shape=None, scale=1.0):
    return scale * means(images) + (0.0 if prompts is None else len(prompts)) + (0.0 if shape is None else len(shape))


def first_fixed(offset, images, c):
    return means(images) + offset + (100.0 if c is None else 0.0)


class OfC:
    def of_c(self, samples, c=None):
        return of_c(samples, c)

    __call__ = functools.partialmethod(of_c, c=None)


class ScoreOfC:
    def scored(self, samples, c=None):
        return of_c(samples, c)

    score = functools.partialmethod(scored, c=None)


class ForwardOfC(nn.Module):
    def of_c(self, samples, c=None):
        return of_c(samples, c)

    forward = functools.partialmethod(of_c, c=None)


class Sized:
    def __init__(self, classes, prompts=()):
        self.classes, self.prompts = classes, prompts

    def __call__(self, images):
        return means(images) + self.classes + len(self.prompts)


def sized(prompts, scale):
    return lambda images: scale * means(images) + len(prompts)


def like(thing, partial):
    return functools.update_wrapper(partial, thing)


@pytest.mark.parametrize(
    ("thing", "options", "expected"),
    [
        (functools.partial(of_c, c=None), {}, means),
        (like(of_c, functools.partial(of_c, c=None)), {}, means),
        (functools.partial(like(of_c, functools.partial(of_c, c=None))), {}, means),
        (functools.partial(of_c, c=None), {"adapter": {"parameters": {"c": "cond"}}}, lambda x: means(x) + COND),
        (functools.partial(of_c), {}, lambda x: means(x) + COND),
        (functools.partial(scaled, prompts=None, shape=None), {}, means),
        (functools.partial(scaled, prompts=None, shape=None, scale=3.0), {}, lambda x: 3 * means(x)),
        (functools.partial(scaled, prompts=None, shape=(1, 2), scale=3.0), {"scale": 2.0}, lambda x: 2 * means(x) + 2),
        (functools.partial(first_fixed, 7.0, c=None), {}, lambda x: means(x) + 107),
        (like(first_fixed, functools.partial(first_fixed, 7.0)), {}, lambda x: means(x) + 7),
        (OfC, {}, means),
        (OfC(), {}, means),
        (ScoreOfC, {"adapter": {"images": "tensor"}}, means),
        (ForwardOfC, {}, means),
        (functools.partial(Sized, classes=40), {}, lambda x: means(x) + 43),
        (functools.partial(Sized, classes=40, prompts=()), {}, lambda x: means(x) + 40),
        (functools.partial(sized, scale=2.0), {}, lambda x: 2 * means(x) + 3),
        (functools.partial(sized, prompts="ab", scale=2.0), {}, lambda x: 2 * means(x) + 2),
    ],
)
def test_what_partial_has_fixed_stands(thing, options, expected, named, samples):
    name = named(thing)
    reward = build(name, {name: options}, TOLD)
    torch.testing.assert_close(score(reward, samples, COND, name), expected(samples).float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "thing",
    [
        lambda images, label=3: means(images),
        lambda images, c=0.5: means(images),
        lambda image, prompt="a cat": 0.0,
        lambda images, *, texts="a cat": means(images),
        functools.partial(lambda images, label, c=2.0: means(images), label=3),
    ],
)
def test_a_parameter_that_may_be_a_setting_is_no_condition(thing, named, samples):
    with pytest.raises(ConfigError, match=r"a setting, or the .* samples\? expected its option \{.* or \{adapter"):
        build(named(thing), {}, TOLD)


def test_a_parameter_that_may_be_a_setting_is_what_the_options_say(named, samples):
    name = named(lambda images, label=3: means(images) + label)
    as_setting = build(name, {name: {"label": 5}}, TOLD)
    torch.testing.assert_close(score(as_setting, samples, COND, name), means(samples) + 5)
    as_condition = build(name, {name: {"adapter": {"parameters": {"label": "cond"}}}}, TOLD)
    torch.testing.assert_close(score(as_condition, samples, COND, name), means(samples) + COND)


def paths(images: list[str], prompts: list[str]):
    return [0.0]


def test_a_scorer_of_paths_is_refused(named):
    with pytest.raises(ConfigError, match="no image: expected a scorer of images"):
        build(named(paths), {}, TOLD)


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ({"a": [1.0] * 4, "b": [2.0] * 4}, r"answered the scores \['a', 'b'\]: expected the option"),
        ([1.0, 2.0], r"list of 2: expected \(4,\)"),
        ([1.0, None, 2.0, 3.0], "NoneType for item 1"),
        (None, "NoneType"),
        ("good", "str"),
        (3.0, "float"),
        (torch.zeros(4, 4), r"shape \(4, 4\)"),
        (torch.zeros(1, 4), r"shape \(1, 4\)"),
        (torch.zeros(()), r"shape \(\)"),
        ((torch.zeros(4), torch.zeros(4)), r"\(Tensor, Tensor\)"),
        (torch.zeros(4, dtype=torch.complex64), "complex64"),
        (torch.zeros(4).to_sparse(), "answered a sparse_coo tensor"),
        (np.array(["a"] * 4), "expected one number a sample"),
        ([[1.0], [2.0, 3.0], [1.0], [1.0]], "list of 1 for item 0"),
        (torch.tensor([1.0, float("nan"), 0, 0]), "not finite"),
        (np.ma.array([1.0, 2.0, 3.0, 4.0], mask=[0, 1, 0, 0]), "an array with a mask"),
        ([np.ma.masked, 1.0, 2.0, 3.0], "for item 0: expected a number"),
        ([1.0, np.complex64(1 + 2j), 2.0, 3.0], "for item 1: expected a number"),
        ([1.0, 2.0, torch.tensor(1 + 2j), 3.0], "for item 2: expected a number"),
        ([np.str_("1")] * 4, "for item 0: expected a number"),
        ([np.datetime64(3, "s")] * 4, "for item 0: expected a number"),
        (b"abcd", "answered bytes of 4"),
        (bytearray(4), "answered bytearray"),
        (memoryview(b"abcd"), "answered memoryview"),
        ([10**400, 1, 2, 3], "too large"),
    ],
)
def test_answers_that_are_no_numbers_are_refused(answer, said, named, samples):
    name = named(lambda images, prompts: answer)
    with pytest.raises(RewardError, match=said):
        score(build(name, {}, TOLD), samples, COND, name)


@pytest.mark.parametrize(
    "answer",
    [torch.arange(4), torch.arange(4.0).double(), torch.arange(4.0).bfloat16(), np.arange(4),
     np.arange(3, -1, -1)[::-1],
     [0, 1, 2, 3], (0.0, 1.0, 2.0, 3.0), [np.float32(i) for i in range(4)], [torch.tensor(i) for i in range(4)],
     torch.arange(4)[:, None], np.arange(4)[:, None], ([0, 1, 2, 3], {}), (torch.arange(4), {"n": 4}),
     ([0, 1, 2, 3], None)],
)  # fmt: skip
def test_answers_of_every_kind_are_read(answer, named, samples):
    name = named(lambda images: answer)
    assert score(build(name, {}, TOLD), samples, COND, name).tolist() == [0, 1, 2, 3]


def test_gradients_pass_through_tensors_and_a_line_says_how_a_scorer_is_called(named, samples, caplog):
    name = named(trl_factory)
    reward = build(name, {}, TOLD)
    assert caplog.messages == [
        "reward 'their_rewards:thing' is called as (images, prompts, metadata), images as floats in [0, 1], a batch, "
        "as its parameters' names say"
    ]
    x = samples.clone().requires_grad_()
    (slope,) = torch.autograd.grad(reward(x, COND).sum(), x)
    torch.testing.assert_close(slope, torch.full_like(slope, 2 / 48))
    name = named(PromptImage)
    reward = build(name, {}, TOLD)
    assert list(reward.state_dict()) == ["inside.scale"]
    (slope,) = torch.autograd.grad(reward(x, COND).sum(), x)
    torch.testing.assert_close(slope, torch.full_like(slope, 1 / 48))
    pil = build(named(PickScore), {}, TOLD)
    assert not pil(x, COND).requires_grad


def test_grey_samples_are_rgb_where_pil_is_asked_for(named):
    seen = []

    def scorer(images: list[Image.Image]):
        seen.extend(images)
        return [0.0] * len(images)

    build(named(scorer), {}, TOLD)(torch.full((2, 1, 4, 4), 0.2), COND[:2])
    assert [image.mode for image in seen] == ["RGB", "RGB"]
    assert np.asarray(seen[0]).tolist() == np.full((4, 4, 3), 51).tolist()


def test_which_facts_are_asked_for_is_known_by_name(named):
    expected = {
        ours: set(), meta: {"metadata"}, one: {"prompts"}, multi_score: {"prompts", "metadata"},
        ImageReward: {"prompts"},
        ddpo_factory: {"prompts", "metadata"}, with_words: {"prompts"},
    }  # fmt: skip
    for thing, told in expected.items():
        assert asks(named(thing)) == told


def test_metadata_cross_the_wire():
    assert greeted(greet(TOLD))["metadata"] == list(METADATA)
    odd = task_info(("é", "b"), (3, 4, 4), ({"s": "\U0001f600 ß", "n": [1, {"x": None}]}, {}))
    assert greeted(greet(odd))["metadata"] == list(odd["metadata"])
    none = task_info(("a", "b"), (3, 4, 4))
    assert greeted(greet(none))["metadata"] == [{}, {}]


@pytest.mark.parametrize("parameters", ["images, prompts", "samples, cond"])
def test_what_compiled_code_raises_is_the_users(parameters, named, samples):
    """``lru_cache`` calls hash its arguments in C: no frame of the traceback is the user's."""
    there: dict = {"means": means}
    exec(f"def scorer({parameters}):\n    return means({parameters.partition(',')[0]})", there)
    name = named(functools.lru_cache(there["scorer"]))
    with pytest.raises(UserCodeError, match=r"their_rewards:thing.*unhashable type: 'list'"):
        score(build(name, {}, TOLD), samples, COND if "prompts" in parameters else [0, 1, 2, 1], name)


def test_words_that_the_model_has_not_are_an_error(named, samples):
    reward = build(named(swapped))
    with pytest.raises(ConfigError, match="asks for prompts: expected a model with prompts"):
        reward(samples, COND)
    with pytest.raises(ConfigError, match=r"knows the labels 0\.\.2: got 0\.\.7"):
        build(named(swapped), {}, TOLD)(samples, torch.tensor([0, 7, 1, 1]))


@pytest.mark.parametrize("made", [np.asarray, list, lambda m: m.tolist(), lambda m: list(m.numpy())])
def test_a_reward_of_samples_and_cond_may_answer_an_array_or_a_list(made):
    samples = torch.rand(4, 1, 8, 8)
    means = samples.mean((1, 2, 3))
    found = score(lambda samples, cond: made(means), samples, None, "mine")
    torch.testing.assert_close(found, means)
    assert found.dtype == torch.float32


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ([1.0, 2.0], r"answered shape \(2,\): expected \(4,\)"),
        ([1.0, "x", 2.0, 3.0], "answered str .* for item 1"),
        (np.full(4, np.nan), "not finite for 4 of 4"),
        (np.ones((4, 2)), r"answered shape \(4, 2\)"),
        (1.0, "answered float"),
        (None, "answered NoneType"),
        (np.array(list("abcd")), "expected one number a sample"),
    ],
)
def test_what_is_no_number_a_sample_is_refused(answer, said):
    with pytest.raises(RewardError, match=said):
        score(lambda samples, cond: answer, torch.rand(4, 1, 8, 8), None, "mine")
