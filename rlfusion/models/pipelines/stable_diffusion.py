"""Stable Diffusion 1.x and 2.x, and latent consistency models of them: a U-Net, eps or v, one text encoder.

A U-Net with ``time_cond_proj_dim`` reads the guidance weight w as sines and cosines of 1000 w (Luo et al. 2023).
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rlfusion.models.pipelines.conditions import Rows
from rlfusion.models.pipelines.family import Family, plain_grid


def encode(pipe: Any, prompt: str, negative: str | None, side: int, device: Any) -> tuple[Rows, Rows | None]:
    """ "text" (1, 77, D) of both."""
    found = pipe.encode_prompt(prompt, device, 1, True, negative)
    return {"text": found[0]}, {"text": found[1]}


def answer(model: nn.Module, x: Tensor, t: Tensor, c: Rows) -> Tensor:
    """y (B, 4, h, w)."""
    weight = weight_embedding(c["w"], model.config["time_cond_proj_dim"]).to(x) if "w" in c else None
    return model(x, t, encoder_hidden_states=c["text"], timestep_cond=weight, return_dict=False)[0]


def weight_embedding(w: Tensor, width: int) -> Tensor:
    """Sines and cosines of 1000 w at ``width`` / 2 frequencies from 1 to 1e-4, (B, width)."""
    half = width // 2
    rate = torch.exp(-math.log(10000.0) / (half - 1) * torch.arange(half, dtype=torch.float32, device=w.device))
    angle = 1000 * w.float()[:, None] * rate
    return nn.functional.pad(torch.cat([angle.sin(), angle.cos()], 1), (0, width % 2))


def embeds(config: Mapping[str, Any]) -> bool:
    """Whether the U-Net reads the guidance weight."""
    return config.get("time_cond_proj_dim") is not None


def side(config: Mapping[str, Any]) -> int:
    """The U-Net's own size."""
    held = config["sample_size"]
    return held if isinstance(held, int) else held[0]


FAMILY = Family(
    network="unet",
    texts=("text_encoder", "tokenizer"),
    encode=encode,
    answer=answer,
    channels=lambda config: config["in_channels"],
    side=side,
    grid=plain_grid,
    embeds=embeds,
)
