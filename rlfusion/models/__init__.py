"""Models: how a denoiser is described, built, saved and loaded.

A model folder holds ``weights.safetensors`` and ``model.json``: everything that is needed to build the denoiser again,
and the SHA-256 of the weights. (A ``model.json`` written by hand may leave that out.)
"""

from rlfusion.models import autoencoder, lora, pipelines
from rlfusion.models.arithmetic import Arithmetic
from rlfusion.models.build import NETS, SCHEDULES, adapt, build, initial, make_net, require_trainable
from rlfusion.models.card import Card, Config
from rlfusion.models.load import (
    Hollow,
    build_hollow,
    describe,
    digest,
    find,
    load,
    load_card,
    load_hollow,
    load_into,
    load_on_disk,
    load_space,
)
from rlfusion.models.save import FORMAT, UNSEALED, save, space_blob
from rlfusion.models.seal import require_seal, sealed

__all__ = [
    "FORMAT",
    "NETS",
    "SCHEDULES",
    "UNSEALED",
    "Arithmetic",
    "Card",
    "Config",
    "Hollow",
    "adapt",
    "autoencoder",
    "build",
    "build_hollow",
    "describe",
    "digest",
    "find",
    "initial",
    "load",
    "load_card",
    "load_hollow",
    "load_into",
    "load_on_disk",
    "load_space",
    "lora",
    "make_net",
    "pipelines",
    "require_seal",
    "require_trainable",
    "save",
    "sealed",
    "space_blob",
]
