"""A family of text-to-image pipelines: a record of small functions, one file a family.

A family encodes prompts by its pipeline's own ``encode_prompt``, calls its network, and says how its pipeline asks its
scheduler for times. All else (schedules, kinds, kernels, guidance, decoding) is common.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from rlfusion.common.tensors import Cond
from rlfusion.diffusion.denoiser import Mix
from rlfusion.models.pipelines.conditions import Conditions, Rows

Shape = tuple[int, ...]
SEQUENCE = "max_sequence_length"
"""The tokens of a prompt that a large text encoder reads, padding among them: a setting of some pipelines' calls."""
ATTENTION = "to_q,to_k,to_v,to_out.0"
"""The layers that LoRA is usually given, by the ends of their names."""


@dataclass(frozen=True)
class Family:
    """A family of pipelines.

    Attributes:
        network: the component that is trained, "unet" or "transformer".
        texts: the components that read prompts, which are not needed once embeddings are there.
        encode: (pipeline, prompt, negative prompt or None, side in pixels, device) -> the embeddings of both, batch 1;
            the second None where the family has no guidance by two answers.
        answer: (network, x, time (B,), embeddings) -> y. Embeddings hold "w", the guidance weight (B,), if ``embeds``.
        channels: network's configuration -> channels of a latent.
        side: network's configuration -> the side of a latent unless told otherwise.
        grid: (network's configuration, latent shape) -> (scheduler, steps) -> keywords of ``set_timesteps``.
        embeds: network's configuration -> whether the network reads the guidance weight.
        targets: LoRA's layers.
        multiple: sides of a latent are multiples of it.
        guided: whether guidance by a second answer is its own way.
        idle: the network -> the full names of layers that cannot change its answer, which get no adapters.
        normalises: whether its pipeline undoes a mean and std of each channel of latents (latents_mean, latents_std).
        reads: how many tokens of a prompt, with their marks, the encoder behind each tokenizer gets; 0 for as many as
            the tokenizer's own limit.
        call: further settings with which the pipeline itself makes an image of just the size that it is told.
        sequence: network's configuration -> the max_sequence_length that its model card has, and the largest that its
            pipeline takes; None where the pipeline has no such setting. ``encode`` is given it by keyword.
        adaptable: whether diffusers' pipeline reads and writes adapters (LoRA).
        given: latents (B, C, h, w) as its pipeline's call takes them; parity with it alone asks for this and the next.
        taken: (pipeline, what its call returns as latents, latents of ours of that size) -> the same as ours.
        mix: (y_c, y_0, w) -> the guided answer of the network's two, (B, C, h, w); None for (1 + w) y_c - w y_0.
        blank: the negative prompt of those without one, of a pipeline whose call is not guided unless it is told one.
        scale: the parameter of its pipeline's call that our guidance_scale is.
        offset: how far our guidance_scale s, y_0 + s (y - y_0), is above that of its pipeline's call.
    """

    network: str
    texts: tuple[str, ...]
    encode: Callable[..., tuple[Rows, Rows | None]]
    answer: Callable[[nn.Module, Tensor, Tensor, Rows], Tensor]
    channels: Callable[[Mapping[str, Any]], int]
    side: Callable[[Mapping[str, Any]], int]
    grid: Callable[[Mapping[str, Any], Shape], Callable[[Any, int], dict[str, Any]]]
    embeds: Callable[[Mapping[str, Any]], bool]
    targets: str = ATTENTION
    multiple: int = 1
    guided: bool = True
    idle: Callable[[nn.Module], Sequence[str]] = lambda model: ()
    normalises: bool = False
    reads: Mapping[str, int] = field(default_factory=lambda: {"tokenizer": 0})
    call: Mapping[str, Any] = field(default_factory=dict)
    sequence: Callable[[Mapping[str, Any]], tuple[int, int]] | None = None
    adaptable: bool = True
    given: Callable[[Tensor], Tensor] = Tensor.clone
    taken: Callable[[Any, Tensor, Tensor], Tensor] = lambda pipe, made, like: made
    mix: Mix | None = None
    blank: str | None = None
    scale: str = "guidance_scale"
    offset: float = 0.0


class Net(nn.Module):
    """A family's network with a denoiser's call, ``net(x, time, cond)``: conditions are numbers of prompts."""

    def __init__(self, model: nn.Module, family: Family, conditions: Conditions, dtype: torch.dtype) -> None:
        super().__init__()
        self.model, self.family, self.conditions, self.dtype = model, family, conditions, dtype

    def forward(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """cond (B,) int64, or {"label": such, "w": (B,)} of a network that reads the guidance weight."""
        label = cond["label"] if isinstance(cond, dict) else cond
        rows = self.conditions(label, self.dtype)
        if isinstance(cond, dict):
            rows["w"] = cond["w"]
        return self.family.answer(self.model, x.to(self.dtype), t, rows)


def plain_grid(config: Mapping[str, Any], shape: Shape) -> Callable[[Any, int], dict[str, Any]]:
    """Of a pipeline that asks for a number of steps alone."""
    return lambda scheduler, steps: {"num_inference_steps": steps}


def dynamic_shift(scheduler: Any, tokens: int, most: float) -> float:
    """mu of a scheduler that shifts by the number of image tokens: on the line through its two settings."""
    c = scheduler.config
    low, high = c.get("base_image_seq_len", 256), c.get("max_image_seq_len", 4096)
    first, last = c.get("base_shift", 0.5), c.get("max_shift", most)
    return first + (last - first) / (high - low) * (tokens - low)
