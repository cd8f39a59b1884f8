"""The result of a pipeline's own code from given noise: our sampler is compared with it.

Noise that its scheduler draws on the way is ours too: the module of the scheduler gets it in the place of its own.
"""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rlfusion.models.pipelines import hub
from rlfusion.models.pipelines.adapters import adapted, adapted_texts
from rlfusion.models.pipelines.drawn import drawn
from rlfusion.models.pipelines.family import SEQUENCE
from rlfusion.models.pipelines.model import load


class Whole:
    """The whole pipeline of ``about`` (see ``model``), as diffusers itself runs it."""

    def __init__(self, about: dict[str, Any], device: torch.device | str = "cpu") -> None:
        """Raises ConfigError for files that cannot be read."""
        self.about, self.path = about, hub.folder(about["name"], about["variant"])
        self.family = hub.family(self.path, about.get("family", ""))
        pipe = adapted_texts(load(self.path, about), about["adapters"], self.family)
        self.pipe = adapted(pipe, about["adapters"], self.family).to(device)
        self.pipe.set_progress_bar_config(disable=True)
        self.known = inspect.signature(type(self.pipe).__call__).parameters
        """The parameters of its call."""

    @torch.no_grad()
    def latents(
        self, prompts: Sequence[str], label: Sequence[int], z: Tensor, scheduler: Any = None, **guidance: float
    ) -> Tensor:
        """The latents (B, C, h, w) that it ends with, for the prompts of these numbers and noise z (B, K+1, C, h, w) as
        ``walk`` takes it. ``scheduler`` takes the place of its own; ``guidance`` are parameters of its call.
        """
        negatives = [self.about["negatives"][i] or self.family.blank or "" for i in label]
        told = torch.tensor([bool(text) for text in negatives])
        if bool(told.any()) and not bool(told.all()):  # to a pipeline no negative prompt is not an empty one
            made = torch.empty_like(z[:, 0])
            for rows in (told.nonzero().flatten(), (~told).nonzero().flatten()):
                part = self.latents(prompts, [label[i] for i in rows.tolist()], z[rows], scheduler, **guidance)
                made[rows] = part.to(made)
            return made
        settings = {**self.family.call, **{k: self.about[k] for k in (SEQUENCE,) if k in self.about}, **guidance}
        if "negative_prompt" in self.known and self.family.guided and bool(told.any()):
            settings["negative_prompt"] = negatives
        return self._made([prompts[i] for i in label], z, scheduler, settings)

    def _made(self, texts: list[str], z: Tensor, scheduler: Any, settings: dict[str, Any]) -> Tensor:
        """The latents of a call with ``settings``; what else an ``output_type`` among them says."""
        if "intermediate_timesteps" in self.known and z.shape[1] != 3:
            settings = settings | {"intermediate_timesteps": None}  # which only two steps have
        _, height, width = hub.shape(self.path, self.about["side"], self.family)
        own = self.pipe.scheduler
        if "guidance_scale" in settings:
            told = settings["guidance_scale"] - self.family.offset
            settings = {key: held for key, held in settings.items() if key != "guidance_scale"}
            settings[self.family.scale] = told
        self.pipe.scheduler = scheduler or own
        try:
            with drawn(self.pipe.scheduler, list(z.transpose(0, 1)[1:])):
                made = self.pipe(
                    prompt=texts,
                    height=height,
                    width=width,
                    num_inference_steps=z.shape[1] - 1,
                    latents=self.family.given(z[:, 0]),
                    **{"output_type": "latent", **settings},
                ).images
        finally:
            self.pipe.scheduler = own
        return made if "output_type" in settings else self.family.taken(self.pipe, made, z[:, 0])


def published(about: dict[str, Any], prompts: Sequence[str], label: Sequence[int], z: Tensor, scale: float) -> Tensor:
    """``Whole.latents`` of the pipeline of ``about`` once, at diffusers' guidance scale."""
    return Whole(about, z.device).latents(prompts, label, z, guidance_scale=scale)
