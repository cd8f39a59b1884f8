"""PixArt-alpha and PixArt-Sigma: a transformer with cross attention to T5, eps with a learned variance left unused.

PixArt-alpha of 1024 pixels reads the size of the image, and the ratio of its sides; Sigma reads neither.
Prompts are lowered and stripped, as by pipelines with ``clean_caption=False``. Told one step, alpha's pipeline ends
with x0_hat, as PixArt-DMD wants it; ours ends at the scheduler's last level.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from rlfusion.models.pipelines.conditions import Rows
from rlfusion.models.pipelines.family import Family, plain_grid

ALPHA_SIDE = 128
"""Latents of the alpha models that read the size, by which their pipeline knows them."""


def encode(
    pipe: Any, prompt: str, negative: str | None, side: int, device: Any, **sequence: int
) -> tuple[Rows, Rows | None]:
    """ "text" (1, L, D) and its "mask" (1, L) of both, L = 300, of alpha 120; where sizes are read also "resolution"
    (1, 2) and "ratio" (1, 1).
    """
    text, mask, text_0, mask_0 = pipe.encode_prompt(prompt, True, negative or "", device=device, **sequence)
    size: Rows = {}
    if "Alpha" in type(pipe).__name__ and pipe.transformer.config.sample_size == ALPHA_SIDE:
        size["resolution"] = torch.tensor([[side, side]], dtype=text.dtype, device=text.device)
        size["ratio"] = torch.ones(1, 1, dtype=text.dtype, device=text.device)
    return {"text": text, "mask": mask, **size}, {"text": text_0, "mask": mask_0, **size}


def answer(model: nn.Module, x: Tensor, t: Tensor, c: Rows) -> Tensor:
    """eps (B, 4, h, w)."""
    out = model(
        x,
        encoder_hidden_states=c["text"],
        encoder_attention_mask=c["mask"],
        timestep=t,
        added_cond_kwargs={"resolution": c.get("resolution"), "aspect_ratio": c.get("ratio")},
        return_dict=False,
    )[0]
    return out[:, : x.shape[1]]


SIGMA = Family(
    network="transformer",
    texts=("text_encoder", "tokenizer"),
    encode=encode,
    answer=answer,
    channels=lambda config: config["in_channels"],
    side=lambda config: config["sample_size"],
    grid=plain_grid,
    embeds=lambda config: False,
    call={"use_resolution_binning": False, "clean_caption": False},
    reads={"tokenizer": 300},
    multiple=2,
    sequence=lambda config: (300, 512),
    adaptable=False,
)
ALPHA = replace(SIGMA, reads={"tokenizer": 120}, sequence=lambda config: (120, 512))
