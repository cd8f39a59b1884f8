"""Qwen-Image: a flow transformer over packed latents, Qwen2.5-VL for text, an autoencoder of videos for one frame.

    (1)  y = m |y_c| / |m|,     m = y_0 + s (y_c - y_0),     s = 1 + w,     |.| of each token's 4 C numbers

The guided answer has the length of that to the prompt, token by token. The pipeline is guided only where it is told a
negative prompt, for which its model card has a blank.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rlfusion.common.errors import ConfigError
from rlfusion.models.pipelines import flux
from rlfusion.models.pipelines.conditions import Rows
from rlfusion.models.pipelines.family import ATTENTION, Family

LENGTH = 512
"""Tokens of a prompt, the marks that end it among them; its pipeline takes twice as many."""
BLANK = " "


def encode(
    pipe: Any, prompt: str, negative: str | None, side: int, device: Any, max_sequence_length: int = LENGTH
) -> tuple[Rows, Rows | None]:
    """ "text" (1, L, D), zeros where its "mask" (1, L) is false, of both; L = 512 unless told otherwise."""

    def padded(words: str) -> Rows:
        text, _ = pipe.encode_prompt(words, device=device, max_sequence_length=max_sequence_length)
        held = text.new_zeros(1, max_sequence_length, text.shape[2])
        held[:, : text.shape[1]] = text
        return {"text": held, "mask": torch.arange(max_sequence_length, device=text.device)[None] < text.shape[1]}

    return padded(prompt), padded(negative or BLANK)


def answer(model: nn.Module, x: Tensor, t: Tensor, c: Rows) -> Tensor:
    """y (B, 16, h, w)."""
    tokens = model(
        hidden_states=flux.pack(x),
        timestep=t.to(x) / 1000,
        encoder_hidden_states=c["text"],
        encoder_hidden_states_mask=c["mask"],
        img_shapes=[[(1, x.shape[2] // 2, x.shape[3] // 2)]] * len(x),
        return_dict=False,
    )[0]
    return flux.unpack(tokens, x)


def mix(y_c: Tensor, y_0: Tensor, w: float | Tensor) -> Tensor:
    """Eq. (1) of answers (B, C, h, w); NaN, as in diffusers, in a token where m is 0."""
    long, mixed = flux.pack(y_c), flux.pack(y_0 + (1 + w) * (y_c - y_0))
    return flux.unpack(mixed * (long.norm(dim=-1, keepdim=True) / mixed.norm(dim=-1, keepdim=True)), y_c)


def embeds(config: Mapping[str, Any]) -> bool:
    """No; a network that reads a guidance weight beside two answers is refused.

    Raises:
        ConfigError: it is such a network.
    """
    if config.get("guidance_embeds"):
        raise ConfigError("transformer: guidance_embeds = true: Qwen-Image is guided by two answers, expected false")
    return False


def idle(model: nn.Module) -> list[str]:
    """What the last block makes of text, which nothing reads."""
    last = len(model.transformer_blocks) - 1
    return [f"transformer_blocks.{last}.attn.{name}" for name in ("add_q_proj", "to_add_out")]


FAMILY = Family(
    network="transformer",
    texts=("text_encoder", "tokenizer"),
    encode=encode,
    answer=answer,
    channels=lambda config: config["in_channels"] // 4,
    side=lambda config: 128,
    grid=flux.grid,
    embeds=embeds,
    targets=f"{ATTENTION},add_q_proj,add_k_proj,add_v_proj,to_add_out",
    multiple=2,
    idle=idle,
    normalises=True,
    reads={"tokenizer": LENGTH},
    sequence=lambda config: (LENGTH, 2 * LENGTH),
    given=flux.pack,
    taken=lambda pipe, made, like: flux.unpack(made, like),
    mix=mix,
    blank=BLANK,
    scale="true_cfg_scale",
)
