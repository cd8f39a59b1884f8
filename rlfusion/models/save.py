"""Writing a model's folder: its weights, and ``model.json`` with the SHA-256 of each file and of itself."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import nn

from rlfusion.common import shards, storage
from rlfusion.common.weights import pack, sha256
from rlfusion.diffusion.space import Space
from rlfusion.models import lora, pipelines
from rlfusion.models.autoencoder import Latents
from rlfusion.models.card import Card
from rlfusion.models.seal import digest, sealed

FORMAT, UNSEALED = "rlfusion-model-2", "rlfusion-model-1"
"""``model.json`` as it is written, with a digest of itself, and as earlier versions wrote it, without."""


def space_blob(space: Space) -> dict[str, bytes]:
    """{"space": the autoencoder's weights}, or nothing for pixels."""
    return {"space": pack(space.module.state_dict())} if isinstance(space, Latents) else {}


def save(folder: Path, denoiser: nn.Module, card: Card) -> None:
    """Write a model folder, with its autoencoder if it has one; each file appears whole or not at all. Adapters are
    merged into the weights, and kept beside them; of a pretrained pipeline diffusers' own files are written. What is
    split over ranks is gathered, for which all of them call this.
    """
    denoiser = shards.gathered(denoiser, here=storage.writes())
    if not storage.writes():
        return
    storage.make_folder(folder)
    if card.pipeline:

        def write() -> dict[str, Any]:
            try:
                return pipelines.save(folder, denoiser.net, denoiser.space, card.pipeline)
            except SafetensorError as error:
                raise OSError(*storage.told(str(error))) from error

        made = replace(card, pipeline=storage.patiently(write, folder))
        files = {name: digest(folder / name) for name in _files(folder)}  # of diffusers
        storage.write(folder / "model.json", sealed({"format": FORMAT, **made.to_json(), "files": files}))
        return
    denoiser = lora.merged(denoiser)
    blob, space = pack(denoiser.state_dict()), space_blob(denoiser.space)
    about = {"format": FORMAT, **card.to_json(), "sha256": sha256(blob)}
    about |= {f"{name}_sha256": sha256(content) for name, content in space.items()}
    contents = {f"{name}.safetensors": content for name, content in {"weights": blob, **space}.items()}
    for name, content in (contents | {"model.json": sealed(about)}).items():
        storage.write(folder / name, content)


def _files(folder: Path) -> list[str]:
    """The names of the files below ``folder`` but ``model.json``."""
    found = (str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file())
    return sorted(name for name in found if name != "model.json" and not name.endswith(".tmp"))
