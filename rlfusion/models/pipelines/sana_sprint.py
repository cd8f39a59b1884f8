"""Sana-Sprint: Sana distilled to one to four steps (sCM), its guidance scale an input.

The network counts s = sin t / (sin t + cos t) of the angle t and has the answers of a flow at s,

    (1)  n = sqrt(s^2 + (1 - s)^2),    F = ((1 - 2 s) n x + (1 - 2 s + 2 s^2) f(n x, s)) / n

where f is the network and F the answer of TrigFlow.
"""

import inspect
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from rlfusion.models.pipelines import sana
from rlfusion.models.pipelines.conditions import Rows


def encode(pipe: Any, prompt: str, negative: str | None, side: int, device: Any, **sequence: int) -> tuple[Rows, None]:
    """ "text" (1, L, D) and its "mask" (1, L); there is no negative prompt. The instruction is the pipeline's own."""
    instruction = inspect.signature(type(pipe).__call__).parameters["complex_human_instruction"].default
    text, mask = pipe.encode_prompt(prompt, device=device, complex_human_instruction=instruction, **sequence)
    return {"text": text, "mask": mask}, None


def answer(model: nn.Module, x: Tensor, t: Tensor, c: Rows) -> Tensor:
    """y (B, 32, h, w), Eq. (1)."""
    s = (torch.sin(t) / (torch.cos(t) + torch.sin(t))).to(x)
    e = s.reshape(-1, *[1] * (x.dim() - 1))
    n = (e**2 + (1 - e) ** 2).sqrt()
    guidance = ((1 + c["w"]) * model.config["guidance_embeds_scale"]).to(x)
    f = model(n * x, c["text"], timestep=s, guidance=guidance, encoder_attention_mask=c["mask"], return_dict=False)[0]
    return ((1 - 2 * e) * n * x + (1 - 2 * e + 2 * e**2) * f) / n


FAMILY = replace(sana.FAMILY, encode=encode, answer=answer, embeds=lambda config: True, guided=False)
