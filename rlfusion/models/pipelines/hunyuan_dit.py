"""HunyuanDiT: a transformer with cross attention to a bilingual CLIP and mT5, v with a learned variance left unused.

Positions are rotary, on a grid that is cropped from that of 512 pixels. The network reads the size of the original, of
the image and of the crop, and a style; here those of the pipeline's call: 1024 x 1024, the image, (0, 0), and style 0.
"""

from typing import Any

import torch
from torch import Tensor, nn

from rlfusion.models.pipelines import hub
from rlfusion.models.pipelines.conditions import Rows
from rlfusion.models.pipelines.family import Family, plain_grid

LENGTHS = (77, 256)
"""Tokens of a prompt that each encoder reads."""


def encode(pipe: Any, prompt: str, negative: str | None, side: int, device: Any) -> tuple[Rows, Rows | None]:
    """ "text" (1, 77, D), "text_2" (1, 256, D_2), their masks, and "ids" (1, 6) of both."""
    rows: list[Rows] = [{}, {}]
    for index, (length, end) in enumerate(zip(LENGTHS, ("", "_2"))):
        told = {"negative_prompt": negative, "max_sequence_length": length, "text_encoder_index": index}
        text, text_0, mask, mask_0 = pipe.encode_prompt(prompt, device, pipe.transformer.dtype, **told)
        for row, embedded, seen in zip(rows, (text, text_0), (mask, mask_0)):
            row |= {f"text{end}": embedded, f"mask{end}": seen}
    ids = torch.tensor([[1024, 1024, side, side, 0, 0]], dtype=rows[0]["text"].dtype, device=device)
    return {**rows[0], "ids": ids}, {**rows[1], "ids": ids}


def rotary(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the places of the tokens, as the pipeline makes them."""
    library = hub.diffusers()
    cropped = library.pipelines.hunyuandit.pipeline_hunyuandit.get_resize_crop_region_for_grid
    patch = model.config["patch_size"]
    size = (x.shape[2] // patch, x.shape[3] // patch)
    crops = cropped(size, 64 // patch)
    width = model.inner_dim // model.num_heads
    return library.models.embeddings.get_2d_rotary_pos_embed(width, crops, size, device=x.device, output_type="pt")


def answer(model: nn.Module, x: Tensor, t: Tensor, c: Rows) -> Tensor:
    """v (B, 4, h, w)."""
    out = model(
        x,
        t.to(x),
        encoder_hidden_states=c["text"],
        text_embedding_mask=c["mask"],
        encoder_hidden_states_t5=c["text_2"],
        text_embedding_mask_t5=c["mask_2"],
        image_meta_size=c["ids"],
        style=torch.zeros(len(x), dtype=torch.long, device=x.device),
        image_rotary_emb=rotary(model, x),
        return_dict=False,
    )[0]
    return out[:, : x.shape[1]]


FAMILY = Family(
    network="transformer",
    texts=("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"),
    encode=encode,
    answer=answer,
    channels=lambda config: config["in_channels"],
    side=lambda config: config["sample_size"],
    grid=plain_grid,
    embeds=lambda config: False,
    multiple=2,
    call={"use_resolution_binning": False},
    reads={"tokenizer": 77, "tokenizer_2": 256},
    adaptable=False,
)
