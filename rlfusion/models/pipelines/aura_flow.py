"""AuraFlow: a flow transformer over image and text tokens, one T5 encoder whose padding is set to zero."""

from typing import Any

from torch import Tensor, nn

from rlfusion.models.pipelines.conditions import Rows
from rlfusion.models.pipelines.family import ATTENTION, Family, plain_grid


def encode(
    pipe: Any, prompt: str, negative: str | None, side: int, device: Any, **sequence: int
) -> tuple[Rows, Rows | None]:
    """ "text" (1, L, D) of both; L = 256 unless told otherwise."""
    text, _, text_0, _ = pipe.encode_prompt(prompt, negative, True, device=device, **sequence)
    return {"text": text}, {"text": text_0}


def answer(model: nn.Module, x: Tensor, t: Tensor, c: Rows) -> Tensor:
    """y (B, 4, h, w)."""
    return model(x, encoder_hidden_states=c["text"], timestep=(t / 1000).to(x), return_dict=False)[0]


FAMILY = Family(
    network="transformer",
    texts=("text_encoder", "tokenizer"),
    encode=encode,
    answer=answer,
    channels=lambda config: config["in_channels"],
    side=lambda config: config["sample_size"],
    grid=plain_grid,
    embeds=lambda config: False,
    targets=f"{ATTENTION},add_q_proj,add_k_proj,add_v_proj,to_add_out",
    multiple=2,
    reads={"tokenizer": 256},
    sequence=lambda config: (256, 512),
)
