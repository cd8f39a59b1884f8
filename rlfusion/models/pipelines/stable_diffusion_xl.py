"""Stable Diffusion XL, and its Turbo and latent consistency versions: a U-Net, two text encoders, added time ids.

The ids (Podell et al. 2023, section 2.2) are those of a whole, uncropped image: its size, a crop at (0, 0), its size.
"""

from typing import Any

import torch
from torch import Tensor, nn

from rlfusion.models.pipelines.conditions import Rows
from rlfusion.models.pipelines.family import Family, plain_grid
from rlfusion.models.pipelines.stable_diffusion import embeds, side, weight_embedding


def encode(pipe: Any, prompt: str, negative: str | None, side: int, device: Any) -> tuple[Rows, Rows | None]:
    """ "text" (1, 77, D), "pooled" (1, P) and "ids" (1, 6) of both."""
    text, text_0, pooled, pooled_0 = pipe.encode_prompt(prompt, device=device, negative_prompt=negative)
    ids = torch.tensor([[side, side, 0, 0, side, side]], dtype=text.dtype, device=text.device)
    return {"text": text, "pooled": pooled, "ids": ids}, {"text": text_0, "pooled": pooled_0, "ids": ids}


def answer(model: nn.Module, x: Tensor, t: Tensor, c: Rows) -> Tensor:
    """y (B, 4, h, w)."""
    weight = weight_embedding(c["w"], model.config["time_cond_proj_dim"]).to(x) if "w" in c else None
    added = {"text_embeds": c["pooled"], "time_ids": c["ids"]}
    out = model(x, t, encoder_hidden_states=c["text"], timestep_cond=weight, added_cond_kwargs=added, return_dict=False)
    return out[0]


FAMILY = Family(
    network="unet",
    texts=("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"),
    encode=encode,
    answer=answer,
    channels=lambda config: config["in_channels"],
    side=side,
    grid=plain_grid,
    embeds=embeds,
    normalises=True,
    reads={"tokenizer": 0, "tokenizer_2": 0},
)
