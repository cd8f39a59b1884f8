"""Lumina Image 2: a flow transformer that counts time from noise to data, Gemma 2 for text.

Its pipeline scales a guided answer to the norm of the unguided one, row by row (``cfg_normalization``); our guidance is
that of the pipeline with ``cfg_normalization=False``.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from torch import Tensor, nn

from rlfusion.models.pipelines.conditions import Rows
from rlfusion.models.pipelines.family import Family, Shape, dynamic_shift


def encode(
    pipe: Any, prompt: str, negative: str | None, side: int, device: Any, **sequence: int
) -> tuple[Rows, Rows | None]:
    """ "text" (1, L, D) and its "mask" (1, L) of both; L = 256 unless told otherwise. The words before the prompt are
    the pipeline's own.
    """
    text, mask, text_0, mask_0 = pipe.encode_prompt(prompt, True, negative, device=device, **sequence)
    return {"text": text, "mask": mask}, {"text": text_0, "mask": mask_0}


def answer(model: nn.Module, x: Tensor, t: Tensor, c: Rows) -> Tensor:
    """y (B, 16, h, w)."""
    time = (1 - t / 1000).to(x)
    return -model(x, time, c["text"], c["mask"], return_dict=False)[0]


def grid(config: Mapping[str, Any], shape: Shape) -> Callable[[Any, int], dict[str, Any]]:
    """Even sigmas from 1, and the shift, for which the pipeline takes the channels of a latent for its tokens."""

    def arguments(scheduler: Any, steps: int) -> dict[str, Any]:
        return {"sigmas": np.linspace(1.0, 1 / steps, steps), "mu": dynamic_shift(scheduler, shape[0], 1.15)}

    return arguments


FAMILY = Family(
    network="transformer",
    texts=("text_encoder", "tokenizer"),
    encode=encode,
    answer=answer,
    channels=lambda config: config["in_channels"],
    side=lambda config: config["sample_size"],
    grid=grid,
    embeds=lambda config: False,
    multiple=2,
    reads={"tokenizer": 256},
    call={"cfg_normalization": False},
    sequence=lambda config: (256, 256),
)
