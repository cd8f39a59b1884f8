"""Words that can be read in images: by RapidOCR itself where it is installed, and how its answers are scored."""

import sys
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont

from rlfusion.common.errors import ConfigError
from rlfusion.rewards import build, score
from rlfusion.rewards.ocr_accuracy import accuracy, edits, quoted
from rlfusion.rewards.registry import task_info

PROMPTS = ('a sign that says "OPEN 24"', "a cup with \u201chello\u201d on it")
INFO = task_info(PROMPTS, (3, 96, 320))


def written(words: str) -> torch.Tensor:
    image = Image.new("RGB", (320, 96), "white")
    ImageDraw.Draw(image).text((20, 20), words, fill="black", font=ImageFont.load_default(48))
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float() / 255


def test_words_are_read_for_real():
    pytest.importorskip("rapidocr_onnxruntime")
    made = build("ocr_accuracy", {}, INFO)
    samples = torch.stack([written("OPEN 24"), written("hello"), written("hello"), torch.rand(3, 96, 320)])
    cond = torch.tensor([0, 1, 0, 1])
    values = score(made, samples, cond, "ocr_accuracy")
    assert values[:2].tolist() == [1.0, 1.0]
    assert values[2] < 0.5
    assert values[3] == 0.0
    assert torch.equal(values, score(made, samples, cond, "ocr_accuracy"))


@pytest.fixture
def stand_in(monkeypatch):
    """A package of RapidOCR's name and signature, which reads what it is told."""
    read, asked = [], []

    class RapidOCR:
        def __init__(self, config_path=None, **kwargs):
            asked.append(kwargs)

        def __call__(self, img_content, use_det=None, use_cls=None, use_rec=None, **kwargs):
            assert (img_content.shape, img_content.dtype) == ((96, 320, 3), np.uint8)
            asked.append(img_content)
            lines = [[[[0, 0], [1, 0], [1, 1], [0, 1]], line, 0.9] for line in read]
            return (lines, [0.1, 0.1, 0.1]) if lines else (None, None)

    module = ModuleType("rapidocr_onnxruntime")
    module.RapidOCR = RapidOCR
    monkeypatch.setitem(sys.modules, "rapidocr_onnxruntime", module)
    return read, asked


@pytest.mark.parametrize(
    ("lines", "expected"),
    [([], 0.0), (["Open", "24"], 1.0), (["OPEN 2"], 5 / 6), (["open 24!"], 5 / 6), (["closed until tomorrow"], 0.0)],
)
def test_lines_are_joined_and_compared_without_spaces_and_case(lines, expected, stand_in):
    stand_in[0].extend(lines)
    made = build("ocr_accuracy", {"ocr_accuracy": {"threads": 2}}, INFO)
    assert score(made, torch.rand(1, 3, 96, 320), torch.tensor([0]), "ocr_accuracy").item() == pytest.approx(expected)
    assert stand_in[1][0] == {"intra_op_num_threads": 2, "inter_op_num_threads": 1}


def test_channels_are_in_the_order_of_opencv_and_grey_images_are_read(stand_in):
    made = build("ocr_accuracy", {"ocr_accuracy": {"text": "a"}}, INFO)
    red = torch.zeros(1, 3, 96, 320)
    red[:, 0] = 1
    made(red, torch.tensor([0]))
    assert stand_in[1][-1][0, 0].tolist() == [0, 0, 255]
    made(torch.full((1, 1, 96, 320), 0.2), torch.tensor([1]))
    assert stand_in[1][-1][0, 0].tolist() == [51, 51, 51]


def test_edits_are_those_of_levenshtein():
    assert [edits(*pair) for pair in (("kitten", "sitting"), ("", "abc"), ("abc", ""), ("flaw", "lawn"))] == [
        3,
        3,
        3,
        2,
    ]
    assert accuracy("abcdefghij", "xy") == 0.0


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("a sign 'open' and \"closed\"", "open closed"),
        ("the baker's sign that says 'bread'", "bread"),
        ("\u2018one\u2019 \u201ctwo\u201d", "one two"),
        ("no words, it's plain", ""),
    ],
)
def test_words_between_quotes_are_asked_for(prompt, words):
    assert quoted(prompt) == words


def test_a_prompt_without_words_and_a_missing_package_are_refused(monkeypatch):
    with pytest.raises(ConfigError, match="prompt 'a cat' asks for no words, expected some between quotes"):
        build("ocr_accuracy", {}, task_info(("a cat",), (3, 8, 8)))
    monkeypatch.setitem(sys.modules, "rapidocr_onnxruntime", None)
    with pytest.raises(ConfigError, match=r"pip install 'rlfusion\[ocr\]'"):
        build("ocr_accuracy", {}, INFO)
