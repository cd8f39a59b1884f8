"""Writing a model's folder: its weights, and ``model.json`` with the SHA-256 of each file and of itself."""

from dataclasses import replace
from pathlib import Path

from torch import nn

from rlfusion.common import storage, streamed
from rlfusion.common.weights import pack, sha256
from rlfusion.diffusion.space import Space
from rlfusion.models import lora, pipelines
from rlfusion.models.autoencoder import Latents
from rlfusion.models.card import Card
from rlfusion.models.seal import digest, sealed

WEIGHTS = "weights.safetensors"
FORMAT, UNSEALED = "rlfusion-model-2", "rlfusion-model-1"
"""``model.json`` as it is written, with a digest of itself, and as earlier versions wrote it, without."""


def space_blob(space: Space) -> dict[str, bytes]:
    """{"space": the autoencoder's weights}, or nothing for pixels."""
    return {"space": pack(space.module.state_dict())} if isinstance(space, Latents) else {}


def save(folder: Path, denoiser: nn.Module, card: Card) -> None:
    """Write a model folder, with its autoencoder if it has one; each file appears whole or not at all. Adapters are
    merged into the weights, and kept beside them; of a pretrained pipeline diffusers' own files are written. Tensors
    are written one at a time; of what is split over ranks all of them make each together, and so call this.
    """
    storage.make_folder(folder)
    if card.pipeline:
        made = replace(card, pipeline=pipelines.save(folder, denoiser.net, denoiser.space, card.pipeline))
        if storage.writes():
            files = {name: digest(folder / name) for name in _files(folder)}  # of diffusers
            storage.write(folder / "model.json", sealed({"format": FORMAT, **made.to_json(), "files": files}))
        return
    weights = streamed.write(folder / WEIGHTS, lora.parts(denoiser, storage.writes()))
    about = {"format": FORMAT, **card.to_json(), "sha256": weights}
    for name, content in space_blob(denoiser.space).items():
        about[f"{name}_sha256"] = sha256(content)
        storage.write(folder / f"{name}.safetensors", content)
    storage.write(folder / "model.json", sealed(about))


def _files(folder: Path) -> list[str]:
    """The names of the files below ``folder`` but ``model.json``."""
    found = (str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file())
    return sorted(name for name in found if name != "model.json" and not name.endswith(".tmp"))
