"""FLUX.1: a flow transformer over packed latents, CLIP and T5, the guidance scale an input (dev) or none (schnell).

    packed token (i, j) = the channels of the 2x2 latent pixels at (2i, 2j), channel by channel

The network gets 1 + w, diffusers' guidance scale, and the time in [0, 1].
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rlfusion.models.pipelines.conditions import Rows
from rlfusion.models.pipelines.family import ATTENTION, Family, Shape, dynamic_shift


def encode(
    pipe: Any, prompt: str, negative: str | None, side: int, device: Any, **sequence: int
) -> tuple[Rows, Rows | None]:
    """ "text" (1, L, D) and "pooled" (1, P); there is no negative prompt."""
    text, pooled, _ = pipe.encode_prompt(prompt, device=device, **sequence)
    return {"text": text, "pooled": pooled}, None


def pack(x: Tensor) -> Tensor:
    """Latents (B, C, h, w) -> tokens (B, h/2 w/2, 4 C)."""
    b, c, h, w = x.shape
    return x.reshape(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, h * w // 4, 4 * c)


def unpack(y: Tensor, like: Tensor) -> Tensor:
    """Tokens (B, h/2 w/2, 4 C) -> latents shaped ``like`` (B, C, h, w)."""
    b, c, h, w = like.shape
    return y.reshape(b, h // 2, w // 2, c, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(b, c, h, w)


def places(x: Tensor) -> Tensor:
    """(0, i, j) of the tokens of latents x, (h/2 w/2, 3)."""
    rows, columns = (torch.arange(side // 2, device=x.device, dtype=x.dtype) for side in x.shape[2:])
    held = torch.cartesian_prod(rows, columns)
    return torch.cat([torch.zeros_like(held[:, :1]), held], 1)


def answer(model: nn.Module, x: Tensor, t: Tensor, c: Rows) -> Tensor:
    """y (B, 16, h, w)."""
    tokens = model(
        hidden_states=pack(x),
        timestep=t / 1000,
        guidance=(1 + c["w"]).float() if "w" in c else None,
        pooled_projections=c["pooled"],
        encoder_hidden_states=c["text"],
        txt_ids=torch.zeros(c["text"].shape[1], 3, device=x.device, dtype=x.dtype),
        img_ids=places(x),
        return_dict=False,
    )[0]
    return unpack(tokens, x)


def grid(config: Mapping[str, Any], shape: Shape) -> Callable[[Any, int], dict[str, Any]]:
    """Even sigmas from 1, and the shift for so many tokens."""
    tokens = shape[1] * shape[2] // 4

    def arguments(scheduler: Any, steps: int) -> dict[str, Any]:
        return {"sigmas": np.linspace(1.0, 1 / steps, steps), "mu": dynamic_shift(scheduler, tokens, 1.15)}

    return arguments


def embeds(config: Mapping[str, Any]) -> bool:
    """Whether the network reads the guidance weight (dev), or was distilled for few steps without (schnell)."""
    return bool(config.get("guidance_embeds"))


FAMILY = Family(
    network="transformer",
    texts=("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"),
    encode=encode,
    answer=answer,
    channels=lambda config: config["in_channels"] // 4,
    side=lambda config: 128,
    grid=grid,
    embeds=embeds,
    targets=f"{ATTENTION},add_q_proj,add_k_proj,add_v_proj,to_add_out",
    multiple=2,
    guided=False,
    reads={"tokenizer": 0, "tokenizer_2": 512},
    sequence=lambda config: (512 if embeds(config) else 256, 512),
    given=pack,
    taken=lambda pipe, made, like: unpack(made, like),
)
