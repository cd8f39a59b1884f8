"""Sana: a flow transformer with linear attention in the latents of a deep autoencoder, one language model for text."""

import inspect
from typing import Any

from torch import Tensor, nn

from rlfusion.models.pipelines.conditions import Rows
from rlfusion.models.pipelines.family import Family, plain_grid


def encode(
    pipe: Any, prompt: str, negative: str | None, side: int, device: Any, **sequence: int
) -> tuple[Rows, Rows | None]:
    """ "text" (1, L, D) and its "mask" (1, L) of both; L = 300 unless told otherwise. The instruction before the prompt
    is the pipeline's own.
    """
    instruction = inspect.signature(type(pipe).__call__).parameters["complex_human_instruction"].default
    text, mask, text_0, mask_0 = pipe.encode_prompt(
        prompt, True, negative or "", device=device, complex_human_instruction=instruction, **sequence
    )
    return {"text": text, "mask": mask}, {"text": text_0, "mask": mask_0}


def answer(model: nn.Module, x: Tensor, t: Tensor, c: Rows) -> Tensor:
    """y (B, 32, h, w)."""
    time = t * model.config["timestep_scale"]
    out = model(x, c["text"], timestep=time, encoder_attention_mask=c["mask"], return_dict=False)[0]
    return out[:, : x.shape[1]]  # the rest, if any, is a learned variance


FAMILY = Family(
    network="transformer",
    texts=("text_encoder", "tokenizer"),
    encode=encode,
    answer=answer,
    channels=lambda config: config["in_channels"],
    side=lambda config: config["sample_size"],
    grid=plain_grid,
    embeds=lambda config: False,
    call={"use_resolution_binning": False},
    reads={"tokenizer": 299},
    sequence=lambda config: (300, 8192),
)
