"""What a pipeline itself makes of given noise, by its own code: what our sampler is held against.

Noise that its scheduler draws on the way is ours too: the module of the scheduler gets it in the place of its own.
"""

import inspect
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from rlfusion.pipelines import flux, hub
from rlfusion.pipelines.model import adapted, load


@contextmanager
def drawn(scheduler: Any, noise: Sequence[Tensor]) -> Iterator[None]:
    """Within the context the scheduler draws ``noise``, one after the other."""
    module, left = sys.modules[type(scheduler).__module__], iter(noise)
    own = getattr(module, "randn_tensor", None)
    if own is None:
        yield
        return
    module.randn_tensor = lambda *_, **__: next(left)
    try:
        yield
    finally:
        module.randn_tensor = own


@torch.no_grad()
def published(about: dict[str, Any], prompts: Sequence[str], label: Sequence[int], z: Tensor, scale: float) -> Tensor:
    """The latents (B, C, h, w) that the whole pipeline of ``about`` (see ``model``) ends with, for the prompts of these
    numbers and noise z (B, K+1, C, h, w) as ``walk`` takes it; ``scale`` is diffusers' guidance scale.
    """
    told = torch.tensor([bool(about["negatives"][i]) for i in label])
    if bool(told.any()) and not bool(told.all()):  # to a pipeline no negative prompt is not an empty one
        made = torch.empty_like(z[:, 0])
        for rows in (told.nonzero().flatten(), (~told).nonzero().flatten()):
            made[rows] = published(about, prompts, [label[i] for i in rows.tolist()], z[rows], scale).to(made)
        return made
    path = hub.folder(about["name"], about["variant"])
    family = hub.family(path)
    pipe = adapted(load(path, about), about["adapters"]).to(z.device)
    pipe.set_progress_bar_config(disable=True)
    settings = dict(family.call)
    known = "negative_prompt" in inspect.signature(type(pipe).__call__).parameters and family.guided
    if known and bool(told.any()):
        settings["negative_prompt"] = [about["negatives"][i] for i in label]
    _, height, width = hub.shape(path, about["side"])
    packed = family is flux.FAMILY
    with drawn(pipe.scheduler, list(z.transpose(0, 1)[1:])):
        made = pipe(
            [prompts[i] for i in label],
            height=height,
            width=width,
            num_inference_steps=z.shape[1] - 1,
            guidance_scale=scale,
            latents=flux.pack(z[:, 0]) if packed else z[:, 0].clone(),
            output_type="latent",
            **settings,
        ).images
    return flux.unpack(made, z[:, 0]) if packed else made
