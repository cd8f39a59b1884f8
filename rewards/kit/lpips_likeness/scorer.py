"""Likeness to a reference image by LPIPS (Zhang et al. 2018), by its package ``lpips``."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rlfusion.common.errors import ConfigError, shorten
from rlfusion.rewards.base import require_labels
from rlfusion.rewards.kit.calling import by_name, package

KIT = "lpips_likeness"
SMALLEST = 64


class LpipsLikeness(nn.Module):
    """Minus the distance to the reference of each prompt; a gradient passes.

    Images whose shorter side is below ``SMALLEST`` are brought to it, as the backbone's layers need.
    """

    def __init__(
        self,
        reference: str = "",
        net: str = "alex",
        weights: str = "",
        device: str = "cpu",
        *,
        prompts: Sequence[str],
        metadata: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        """
        Args:
            reference: an image for all prompts; empty takes the column ``reference`` of the prompts' file.
            net: alex, vgg or squeeze.
            weights: torchvision's file of the backbone's; empty lets torchvision find or download it.

        Raises:
            ConfigError: no reference, a file that is no image, or other weights than the backbone's.
        """
        super().__init__()
        named = [reference or str(row.get("reference") or "") for row in metadata or [{}] * len(prompts)]
        if (count := named.count("")) or not named:
            raise ConfigError(
                f"lpips_likeness: {count} of {len(named)} prompts have no reference: expected the option reference, or "
                "a column of that name in the prompts' file"
            )
        self.references = [_read(path) for path in named]
        theirs = package("lpips", KIT).LPIPS
        with torch.random.fork_rng(devices=[]):
            model = by_name(KIT, theirs, {("net",): net, ("pnet_rand",): bool(weights), ("verbose",): False})
        if weights:
            _load(model.net, weights)
        self.distance = model.to(device).eval().requires_grad_(False)

    def forward(self, samples: Tensor, cond: Tensor) -> Tensor:
        """samples (B, 1 or 3, H, W) in [0, 1], cond (B,) -> (B,)."""
        rows = require_labels(cond, len(samples), len(self.references), KIT).tolist()
        device = next(self.distance.parameters()).device
        ours = _fit(samples.to(device).expand(-1, 3, -1, -1))
        theirs = torch.cat([_sized(self.references[row].to(device), ours.shape[2:]) for row in rows])
        found = by_name(KIT, self.distance, {("in0",): ours * 2 - 1, ("in1",): theirs * 2 - 1})
        return -found.flatten(1).mean(1).to(samples.device)


def _fit(x: Tensor) -> Tensor:
    short = min(x.shape[2:])
    return x if short >= SMALLEST else _sized(x, [round(side * SMALLEST / short) for side in x.shape[2:]])


def _sized(x: Tensor, size: Sequence[int]) -> Tensor:
    if tuple(x.shape[2:]) == tuple(size):
        return x
    return nn.functional.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False, antialias=True)


def _read(path: str) -> Tensor:
    """An image (1, 3, H, W) in [0, 1]."""
    import numpy as np
    from PIL import Image

    try:
        with Image.open(Path(path).expanduser()) as image:
            held = np.array(image.convert("RGB"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"lpips_likeness: reference {shorten(repr(path))} is no image that can be read: {error}"
        ) from error
    return torch.from_numpy(held).permute(2, 0, 1)[None].float() / 255


FAULTS = (OSError, EOFError, RuntimeError, KeyError, TypeError, IndexError, torch.serialization.pickle.UnpicklingError)
"""What a file that holds other things brings about."""


def _load(backbone: nn.Module, file: str) -> None:
    """torchvision's "features.3.weight" into lpips' "slice2.3.weight"."""
    try:
        held = torch.load(file, map_location="cpu", weights_only=True)  # tensors alone: no code is run
        backbone.load_state_dict({n: held["features." + n.partition(".")[2]] for n in backbone.state_dict()})
    except FAULTS as error:
        said = shorten(" ".join(str(error).split()), 200)
        raise ConfigError(f"{file!r} does not hold the weights of this backbone: {said}") from error
