"""How well the words that a prompt asks for can be read in its image, by RapidOCR (the extra ``ocr``), on the CPU.

    (1)  R = 1 - min(d, n) / n,    d the edits (Levenshtein) from what is read to the n characters that are asked for

Both without spaces and in small letters. The words are those between quotes in the prompt ("a sign that says 'open'"),
as in Flow-GRPO's text rendering, or ``text`` for all. RapidOCR's weights (PP-OCRv4, Apache 2.0) are in its package, so
that nothing is fetched. No gradient passes.
"""

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rlfusion.common.errors import ConfigError, require_positive, shorten
from rlfusion.common.tensors import Cond
from rlfusion.rewards.adapters import converted
from rlfusion.rewards.base import require_labels

QUOTED = re.compile(r"\"([^\"]+)\"|\u201c([^\u201d]+)\u201d|(?<!\w)'([^']+)'(?!\w)|\u2018([^\u2019]+)\u2019")
"""Words between quotes; an apostrophe within a word is none."""


class OcrAccuracy:
    """The accuracy of the words in an image, in [0, 1]."""

    def __init__(self, text: str = "", threads: int = 1, *, prompts: Sequence[str] = ()) -> None:
        """
        Args:
            text: the words of all images; "" takes those between quotes in each prompt.
            threads: of the CPU.
            prompts: the text of each condition.

        Raises:
            ConfigError: a prompt asks for no words, or the package is not installed.
        """
        self.threads = threads
        require_positive(self, "threads")
        wanted = [text] * len(prompts) if text else [quoted(prompt) for prompt in prompts]
        self.wanted = [plain(words) for words in wanted] if prompts else [plain(text)]
        for prompt, words in zip(prompts or [text], self.wanted):
            if not words:
                raise ConfigError(
                    f"ocr_accuracy: prompt {shorten(repr(prompt))} asks for no words, expected some between quotes in "
                    "each prompt, or the option text"
                )
        self.engine = _engine(threads)

    def __call__(self, samples: Tensor, cond: Cond) -> Tensor:
        """samples (B, C, H, W) in [0, 1] -> (B,) in [0, 1], Eq. (1)."""
        label = require_labels(cond, len(samples), len(self.wanted), "ocr_accuracy").tolist()
        images = converted(samples, "numpy", "ocr_accuracy")
        found = [accuracy(self.read(image), self.wanted[i]) for image, i in zip(images, label)]
        return torch.tensor(found, dtype=torch.float32, device=samples.device)

    def read(self, image: Any) -> str:
        """The words in an image (H, W, C) uint8, from top to bottom, as ``plain``."""
        grey = image.shape[-1] == 1
        lines, _ = self.engine(
            image.repeat(3, axis=-1) if grey else image[..., ::-1]
        )  # which takes them as OpenCV has them
        return plain(" ".join(line[1] for line in lines or []))


def _engine(threads: int) -> Any:
    try:
        from rapidocr_onnxruntime import RapidOCR
    except ImportError as error:
        raise ConfigError("ocr_accuracy needs the package rapidocr-onnxruntime: pip install 'rlfusion[ocr]'") from error
    return RapidOCR(intra_op_num_threads=threads, inter_op_num_threads=1)


def quoted(prompt: str) -> str:
    """The words between quotes, one after the other."""
    return " ".join("".join(match) for match in QUOTED.findall(prompt))


def plain(words: str) -> str:
    """Without spaces, in small letters."""
    return "".join(words.split()).lower()


def accuracy(read: str, wanted: str) -> float:
    """Eq. (1)."""
    return 1 - min(edits(read, wanted), len(wanted)) / len(wanted)


def edits(a: str, b: str) -> int:
    """The least number of characters to insert, delete or replace that makes ``b`` of ``a``."""
    row = list(range(len(b) + 1))
    for i, one in enumerate(a, 1):
        above, row = row, [i]
        for j, other in enumerate(b, 1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (one != other)))
    return row[-1]
