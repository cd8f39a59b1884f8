"""FLUX.2: a flow transformer over packed latents with four places a token; Mistral 3 (dev) or Qwen 3 (Klein) for text.

To dev the guidance scale, 1 + w, is an input. A distilled Klein has no guidance; the base models have that of two
answers, the second for no words. The autoencoder's
latents are normalised by the running mean and variance of its batch normalisation, over patches of 2 x 2 (``space``).
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rlfusion.models.pipelines import hub, space
from rlfusion.models.pipelines.conditions import Rows
from rlfusion.models.pipelines.family import ATTENTION, Family, Shape
from rlfusion.models.pipelines.flux import embeds, pack, places, unpack


def encode(
    pipe: Any, prompt: str, negative: str | None, side: int, device: Any, **sequence: int
) -> tuple[Rows, Rows | None]:
    """ "text" (1, L, D) of both, L = 512 unless told otherwise; of a distilled model that of the prompt alone."""
    text, _ = pipe.encode_prompt(prompt, device=device, **sequence)
    if pipe.config.is_distilled:
        return {"text": text}, None
    return {"text": text}, {"text": pipe.encode_prompt(negative or "", device=device, **sequence)[0]}


def encode_one(
    pipe: Any, prompt: str, negative: str | None, side: int, device: Any, **sequence: int
) -> tuple[Rows, None]:
    """ "text" (1, L, D), L = 512 unless told otherwise; dev has no negative prompt."""
    return {"text": pipe.encode_prompt(prompt, device=device, **sequence)[0]}, None


def answer(model: nn.Module, x: Tensor, t: Tensor, c: Rows) -> Tensor:
    """y (B, 32, h, w)."""
    length = torch.arange(c["text"].shape[1], device=x.device, dtype=x.dtype)[:, None]
    held = places(x)
    tokens = model(
        hidden_states=pack(x),
        timestep=t.to(x) / 1000,
        guidance=(1 + c["w"]).float() if "w" in c else None,
        encoder_hidden_states=c["text"],
        txt_ids=torch.cat([torch.zeros_like(length).expand(-1, 3), length], 1)[None].expand(len(x), -1, -1),
        img_ids=torch.cat([held, torch.zeros_like(held[:, :1])], 1)[None].expand(len(x), -1, -1),
        return_dict=False,
    )[0]
    return unpack(tokens, x)


def grid(config: Mapping[str, Any], shape: Shape) -> Callable[[Any, int], dict[str, Any]]:
    """Even sigmas from 1, and the shift that diffusers finds for so many tokens and steps."""
    tokens = shape[1] * shape[2] // 4

    def arguments(scheduler: Any, steps: int) -> dict[str, Any]:
        mu = hub.diffusers().pipelines.flux2.pipeline_flux2.compute_empirical_mu(tokens, steps)
        return {"sigmas": np.linspace(1.0, 1 / steps, steps), "mu": mu}

    return arguments


def given(x: Tensor) -> Tensor:
    """Latents (B, C, h, w) as the pipeline takes them, a patch a place: (B, 4 C, h/2, w/2)."""
    return pack(x).transpose(1, 2).reshape(len(x), -1, x.shape[2] // 2, x.shape[3] // 2)


def taken(pipe: Any, made: Tensor, like: Tensor) -> Tensor:
    """The pipeline's latents, which are the autoencoder's, as the network's."""
    shift, scale = space.levels(pipe.vae, False)
    return ((made - space.tiled(shift, made)) * space.tiled(scale, made)).to(made)


KLEIN = Family(
    network="transformer",
    texts=("text_encoder", "tokenizer"),
    encode=encode,
    answer=answer,
    channels=lambda config: config["in_channels"] // 4,
    side=lambda config: 128,
    grid=grid,
    embeds=lambda config: False,
    targets=f"{ATTENTION},add_q_proj,add_k_proj,add_v_proj,to_add_out,to_qkv_mlp_proj,attn.to_out",
    multiple=2,
    reads={"tokenizer": 512},
    sequence=lambda config: (512, 512),
    given=given,
    taken=taken,
)
DEV = replace(KLEIN, encode=encode_one, embeds=embeds, guided=False, taken=lambda pipe, made, like: unpack(made, like))
