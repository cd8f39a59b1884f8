"""Z-Image and Z-Image-Turbo: a flow transformer over one stream of image and text tokens, Qwen 3 for text.

The network counts time from noise to data and takes a list of latents and a list of texts, each of its own length. Its
pipeline's guidance_scale g adds g (y - y_0) to the answer y, so that our guidance_scale is 1 + g.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rlfusion.models.pipelines.conditions import Rows
from rlfusion.models.pipelines.family import Family, Shape, dynamic_shift

LENGTH = 512
"""Tokens of a prompt, the marks of a conversation among them."""


def encode(
    pipe: Any, prompt: str, negative: str | None, side: int, device: Any, max_sequence_length: int = LENGTH
) -> tuple[Rows, Rows | None]:
    """ "text" (1, L, D), zeros after its "count" (1,) tokens, of both; L = 512 unless told otherwise."""
    found = pipe.encode_prompt(prompt, device, True, negative, max_sequence_length=max_sequence_length)
    return _padded(found[0][0], max_sequence_length), _padded(found[1][0], max_sequence_length)


def _padded(text: Tensor, length: int) -> Rows:
    held = text.new_zeros(1, length, text.shape[1])
    held[0, : len(text)] = text
    return {"text": held, "count": torch.tensor([len(text)], device=text.device)}


def answer(model: nn.Module, x: Tensor, t: Tensor, c: Rows) -> Tensor:
    """y (B, 16, h, w)."""
    texts = [text[:count] for text, count in zip(c["text"], c["count"].tolist())]
    time = ((1000 - t) / 1000).to(x)
    made = model(list(x[:, :, None].unbind(0)), time, texts, return_dict=False)[0]
    return -torch.stack(list(made)).squeeze(2)


def grid(config: Mapping[str, Any], shape: Shape) -> Callable[[Any, int], dict[str, Any]]:
    """Even sigmas from 1, and the shift for so many tokens."""
    tokens = shape[1] * shape[2] // 4

    def arguments(scheduler: Any, steps: int) -> dict[str, Any]:
        return {"sigmas": np.linspace(1.0, 1 / steps, steps).tolist(), "mu": dynamic_shift(scheduler, tokens, 1.15)}

    return arguments


FAMILY = Family(
    network="transformer",
    texts=("text_encoder", "tokenizer"),
    encode=encode,
    answer=answer,
    channels=lambda config: config["in_channels"],
    side=lambda config: 128,
    grid=grid,
    embeds=lambda config: False,
    multiple=2,
    reads={"tokenizer": LENGTH},
    sequence=lambda config: (LENGTH, LENGTH),
    offset=1.0,
)
