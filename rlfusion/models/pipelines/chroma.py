"""Chroma: FLUX.1's transformer over packed latents with T5 alone, and guidance by two answers.

Of a prompt's padding the network sees the first token; the mask is added to the scores of attention as it is in
diffusers, a one for each pair of tokens that are there.
"""

from typing import Any

import torch
from torch import Tensor, nn

from rlfusion.models.pipelines.conditions import Rows
from rlfusion.models.pipelines.family import ATTENTION, Family
from rlfusion.models.pipelines.flux import grid, pack, places, unpack


def encode(
    pipe: Any, prompt: str, negative: str | None, side: int, device: Any, **sequence: int
) -> tuple[Rows, Rows | None]:
    """ "text" (1, L, D) and its "mask" (1, L) of both; L = 512 unless told otherwise."""
    text, _, mask, text_0, _, mask_0 = pipe.encode_prompt(prompt, negative or "", device=device, **sequence)
    return {"text": text, "mask": mask}, {"text": text_0, "mask": mask_0}


def answer(model: nn.Module, x: Tensor, t: Tensor, c: Rows) -> Tensor:
    """y (B, 16, h, w)."""
    tokens = pack(x)
    there = torch.ones(tokens.shape[:2], device=x.device, dtype=c["mask"].dtype)
    out = model(
        hidden_states=tokens,
        timestep=t.to(x) / 1000,
        encoder_hidden_states=c["text"],
        txt_ids=torch.zeros(c["text"].shape[1], 3, device=x.device, dtype=x.dtype),
        img_ids=places(x),
        attention_mask=torch.cat([c["mask"], there], 1),
        return_dict=False,
    )[0]
    return unpack(out, x)


FAMILY = Family(
    network="transformer",
    texts=("text_encoder", "tokenizer"),
    encode=encode,
    answer=answer,
    channels=lambda config: config["in_channels"] // 4,
    side=lambda config: 128,
    grid=grid,
    embeds=lambda config: False,
    targets=f"{ATTENTION},add_q_proj,add_k_proj,add_v_proj,to_add_out",
    multiple=2,
    reads={"tokenizer": 512},
    sequence=lambda config: (512, 512),
    given=pack,
    taken=lambda pipe, made, like: unpack(made, like),
)
