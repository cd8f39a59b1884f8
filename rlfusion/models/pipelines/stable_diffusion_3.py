"""Stable Diffusion 3 and 3.5: a flow transformer over image and text tokens, two CLIP encoders and an optional T5."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from rlfusion.models.pipelines.conditions import Rows
from rlfusion.models.pipelines.family import ATTENTION, Family, Shape, dynamic_shift


def encode(
    pipe: Any, prompt: str, negative: str | None, side: int, device: Any, **sequence: int
) -> tuple[Rows, Rows | None]:
    """ "text" (1, L, D) and "pooled" (1, P) of both."""
    text, text_0, pooled, pooled_0 = pipe.encode_prompt(
        prompt, None, None, device=device, negative_prompt=negative, **sequence
    )
    return {"text": text, "pooled": pooled}, {"text": text_0, "pooled": pooled_0}


def answer(model: nn.Module, x: Tensor, t: Tensor, c: Rows) -> Tensor:
    """y (B, 16, h, w)."""
    return model(x, c["text"], c["pooled"], t, return_dict=False)[0]


def grid(config: Mapping[str, Any], shape: Shape) -> Callable[[Any, int], dict[str, Any]]:
    """The number of steps, and the shift for so many tokens where the scheduler wants one."""
    tokens = (shape[1] // config["patch_size"]) * (shape[2] // config["patch_size"])

    def arguments(scheduler: Any, steps: int) -> dict[str, Any]:
        shift = {"mu": dynamic_shift(scheduler, tokens, 1.16)} if scheduler.config.get("use_dynamic_shifting") else {}
        return {"num_inference_steps": steps, **shift}

    return arguments


def idle(model: nn.Module) -> list[str]:
    """The queries of text in a last block, which only asks for what image tokens become."""
    blocks = enumerate(model.transformer_blocks)
    return [f"transformer_blocks.{i}.attn.add_q_proj" for i, block in blocks if block.context_pre_only]


FAMILY = Family(
    network="transformer",
    texts=("text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2", "tokenizer_3"),
    encode=encode,
    answer=answer,
    channels=lambda config: config["in_channels"],
    side=lambda config: config["sample_size"],
    grid=grid,
    embeds=lambda config: False,
    targets=f"{ATTENTION},add_q_proj,add_k_proj,add_v_proj,to_add_out",
    multiple=2,
    idle=idle,
    reads={"tokenizer": 0, "tokenizer_2": 0, "tokenizer_3": 256},
    sequence=lambda config: (256, 512),
)
