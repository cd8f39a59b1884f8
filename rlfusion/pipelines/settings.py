"""What a user says of a pretrained pipeline, beside its name; and what a model card keeps of it."""

import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rlfusion.errors import ConfigError, require_not_negative, require_positive
from rlfusion.pipelines import hub
from rlfusion.pipelines.family import plain_grid
from rlfusion.pipelines.prompts import Prompts, read
from rlfusion.pipelines.scheduler import read as read_scheduler

MOST_STEPS = 20
"""Steps of a chain that is trained, unless told otherwise or the pipeline's own are fewer."""


@dataclass(frozen=True)
class Settings:
    """Settings of a pretrained text-to-image pipeline; other models take none of them.

    Attributes:
        prompts: one prompt, or a file of them: .txt, one a line, or .jsonl, with "prompt" and "negative" in each line.
        size: side of the images in pixels; 0 for the pipeline's own.
        dtype: of the network's frozen weights and arithmetic; latents, transitions, log-probabilities, adapters and the
            autoencoder stay in float32. All but float32 needs adapters (lora).
        variant: of the weights' files, such as fp16.
        checkpointing: compute activations again in the backward pass, for less memory.
        decode: samples that the autoencoder decodes at a time.
    """

    prompts: str = ""
    size: int = 0
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    variant: str = ""
    checkpointing: bool = False
    decode: int = 8

    def __post_init__(self) -> None:
        require_not_negative(self, "size")
        require_positive(self, "decode")

    def about(self, name: str, negative: str, cache: Path | None) -> tuple[dict[str, Any], Prompts]:
        """What a card keeps of the pipeline ``name`` (see ``model``), and the prompts.

        Raises:
            ConfigError: no prompts, or a file of them that cannot be read.
        """
        if not self.prompts:
            raise ConfigError(f"model {name!r} reads texts: expected pipeline.prompts, a prompt or a file of them")
        prompts = read(self.prompts, negative)
        place = str(Path(name).resolve()) if Path(name).exists() else name  # a worker, or a later run, has another cwd
        held = {"name": place, "variant": self.variant, "dtype": self.dtype, "checkpointing": self.checkpointing}
        held |= {"side": self.size, "decode": self.decode, "negatives": list(prompts.negatives)}
        return held | {"cache": str(cache.resolve()) if cache else "", "adapters": []}, prompts


def defaults(name: str, training: bool, variant: str = "") -> dict[str, Any]:
    """The chain that a pipeline was published with, as defaults of ``Chain`` by name; for ``training``, with noise at
    every step and no more than ``MOST_STEPS`` of them.

    Raises:
        ConfigError: no such pipeline, or one with a scheduler that is not followed.
    """
    path = hub.folder(name, variant)
    family = hub.family(path)
    sampling = read_scheduler(hub.scheduler(path), plain_grid({}, ()))
    own = inspect.signature(getattr(hub.diffusers(), hub.index(path)["_class_name"]).__call__).parameters
    steps, scale = own["num_inference_steps"].default, own["guidance_scale"].default
    if family.guided or family.embeds(hub.config(path, family.network)):
        guidance = {"guidance_scale": scale}
    else:
        guidance = {}
    kernel = sampling.explore if training else sampling.kernel
    return {"spacing": "model", "steps": min(steps, MOST_STEPS) if training else steps, "kernel": kernel, **guidance}
