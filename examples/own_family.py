"""A family of pipelines of your own in one file: PixArt-Sigma, as it would be added if rlfusion did not have it.

rlfusion check-model PixArt-alpha/PixArt-Sigma-XL-2-512-MS --pipeline.family examples/own_family.py:PIXART \
    --pipeline.prompts "a red cat"

The file says how prompts are encoded and how the network is called. What it predicts, its schedule and its times come
from the pipeline's own scheduler.
"""

from typing import Any

from torch import Tensor, nn

from rlfusion.models.pipelines.conditions import Rows
from rlfusion.models.pipelines.family import Family, plain_grid


def encode(pipe: Any, prompt: str, negative: str | None, side: int, device: Any) -> tuple[Rows, Rows | None]:
    """ "text" (1, 300, D) and its "mask" (1, 300) of both, by the pipeline itself."""
    text, mask, text_0, mask_0 = pipe.encode_prompt(prompt, True, negative or "", device=device)
    return {"text": text, "mask": mask}, {"text": text_0, "mask": mask_0}


def answer(model: nn.Module, x: Tensor, t: Tensor, c: Rows) -> Tensor:
    """eps (B, 4, h, w). The other half of what the network gives is a learned variance, which is not used."""
    size = {"resolution": None, "aspect_ratio": None}
    out = model(
        x,
        encoder_hidden_states=c["text"],
        encoder_attention_mask=c["mask"],
        timestep=t,
        added_cond_kwargs=size,
        return_dict=False,
    )[0]
    return out[:, : x.shape[1]]


PIXART = Family(
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
)
