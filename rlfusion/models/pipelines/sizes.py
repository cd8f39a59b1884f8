"""How many samples a call has for a pretrained pipeline, unless told: a rule, fixed and written down.

Nothing is measured, so that a run does not depend on a machine's speed or load: the numbers follow from the sizes of
the network and of the images, the kind of the device and its memory. They are settings like any other: ``config.yaml``
has them, and a run that goes on keeps them.

On a CPU they are ``CPU``. On a GPU of M bytes, for a network of P parameters of w bytes and images of n pixels:

    (1)  room  R = .8 M - held,    held = 1.1 w P with adapters, else 48 P (weights, gradients, moments, copies: 12 n)
    (2)  activations of a sample that has gradients  A = 1.5 GiB (w / 2) (P / 860 10^6)^(3/4) n / 512^2;  of one without
         gradients, or whose activations are made again (checkpointing),  A / 8
    (3)  the autoencoder's, in float32, with gradients  D = 4 GiB n / 512^2
    (4)  agent.micro_batch = 3/4 R / A (or / (A / 8)),    rollout.item = 3/4 R / (A / 8),    pipeline.decode = 1/4 R / D

each the next power of two below, within 1 and ``MOST``. By count, what SD 1.5, SDXL, Sana, SD3 medium and FLUX keep for
the backward pass of a sample in bfloat16 is .9, 6.4, 3.7, 6.4 and 40 GiB; Eq. (2) gives 1.5, 14, 9.6, 11 and 43.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from rlfusion.models.pipelines import hub

GIB, SHARE = 2**30, 0.8


class Sizes(NamedTuple):
    """Samples of one call.

    Attributes:
        micro_batch: of an update.
        item: of a rollout.
        decode: of the autoencoder.
    """

    micro_batch: int
    item: int
    decode: int


CPU, MOST = Sizes(8, 8, 8), Sizes(64, 64, 8)


class Network(NamedTuple):
    """What Eq. (1) and (2) ask of a pipeline: P, w, n, whether adapters alone are trained, and whether activations are
    made again.
    """

    parameters: int
    width: int
    pixels: int
    adapters: bool
    checkpointing: bool

    @property
    def held(self) -> float:
        """Bytes, without activations; Eq. (1)."""
        return self.parameters * (1.1 * self.width if self.adapters else 48)

    @property
    def activations(self) -> float:
        """Bytes of a sample with gradients, A of Eq. (2)."""
        return 1.5 * GIB * self.width / 2 * (self.parameters / 860e6) ** 0.75 * self.pixels / 512**2


def network(about: Mapping[str, Any], told: Mapping[str, Any], adapters: bool) -> Network:
    """Of the pipeline of which a card keeps ``about``: name, variant and family at least. ``told`` are those of size,
    dtype and checkpointing that the user sets, as text or None; what is no such value counts as not told.
    """
    path = hub.folder(about["name"], about.get("variant", ""))
    family = hub.family(path, about.get("family", ""))
    size, dtype, again = (told.get(key) for key in ("size", "dtype", "checkpointing"))
    side = int(size) if str(size).isdigit() else about.get("side", 0)
    again = about.get("checkpointing", False) if again is None else str(again).lower() == "true"
    width = 4 if (dtype or about.get("dtype") or "float32") == "float32" else 2
    pixels = math.prod(hub.shape(path, side, family)[1:])
    return Network(hub.parameters(path, family.network), width, pixels, adapters, again)


def fitting(network: Network, memory: int) -> Sizes:
    """Eq. (4), for a GPU with so many bytes."""
    room = max(0.0, SHARE * memory - network.held)
    without = 6 * room / network.activations
    updated = without if network.checkpointing else without / 8
    decoded = room / 4 / (4 * GIB * network.pixels / 512**2)
    fit = (
        min(most, 2 ** (max(1, int(found)).bit_length() - 1)) for most, found in zip(MOST, (updated, without, decoded))
    )
    return Sizes(*fit)
