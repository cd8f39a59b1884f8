"""Networks in whose features samples are compared with real images, by name: ``--features``.

    thumbnails    root-mean-square differences of 16x16 pixels; needs no weights, and says little
    Inception     Inception v3 as the published FID and KID have it (the package torch-fidelity)
    CLIP          the image tower of a CLIP (``rewards.clip``)

An extractor is a class, made with its settings, whose objects are called with samples (N, C, H, W) in [0, 1] and give
features (N, F); or such a function.
"""

import inspect
import io
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rlfusion.common import spec
from rlfusion.common.errors import ConfigError, NumericalError, shorten, unknown
from rlfusion.common.registry import Registry
from rlfusion.common.user_code import running

Extractor = Callable[[Tensor], Tensor]

EXTRACTORS = Registry(
    "feature extractor",
    "rlfusion.extractors",
    {
        "thumbnails": "rlfusion.evaluation.plain:thumbnails",
        "Inception": "rlfusion.evaluation.extractors:Inception",
        "CLIP": "rlfusion.rewards.clip.extractor:Clip",
    },
)
INCEPTION = "pt_inception-2015-12-05-6726825d.pth"
"""torch-fidelity's file of the weights of the published FID."""
AT_ONCE = 64


def make_extractor(text: str) -> Extractor:
    """The extractor that a text writes.

    Raises:
        ConfigError: no such extractor or setting, or weights that are not there.
    """
    name, settings = spec.split(text)
    found = EXTRACTORS.find(name)
    if inspect.isfunction(found.object):
        parameters = dict(list(spec.signature_of(found.object).parameters.items())[1:])
        for key in settings:
            if key not in parameters:
                raise unknown(f"setting of feature extractor {name!r}", key, parameters)
        spec.require_fit(parameters, settings, f"feature extractor {name!r}")
        return partial(found.object, **settings)
    made: Any = spec.make(EXTRACTORS, found, settings)
    if not callable(made):
        raise ConfigError(f"feature extractor {text!r} is not callable: expected samples (N, C, H, W) -> (N, F)")
    return made


@torch.no_grad()
def extracted(text: str, extractor: Extractor, samples: Tensor) -> Tensor:
    """The features (N, F) of samples (N, C, H, W) in [0, 1], some at a time.

    Raises:
        ConfigError: they are not (N, F).
        NumericalError: one is not finite.
        UserCodeError: a stranger's extractor raises.
    """
    with running(f"feature extractor {text!r}"):
        parts = [extractor(part) for part in samples.split(AT_ONCE)]
    for part, some in zip(parts, samples.split(AT_ONCE)):
        if not isinstance(part, Tensor) or part.ndim != 2 or len(part) != len(some):
            got = tuple(part.shape) if isinstance(part, Tensor) else type(part).__name__
            raise ConfigError(f"feature extractor {text!r} gives {got} of {len(some)} samples: expected (N, F)")
    found = torch.cat(parts)
    if not bool(found.isfinite().all()):
        raise NumericalError(f"feature extractor {text!r}: features are not finite")
    return found


@dataclass(frozen=True)
class Inception:
    """Inception v3 of the published FID and KID, its 2,048 features. Needs ``torch-fidelity`` (extra ``fid``).

    Attributes:
        weights: torch-fidelity's file ``INCEPTION``, as .pth of tensors alone or .safetensors; empty for the one in
            torch.hub's folder.
    """

    weights: str = ""

    def __post_init__(self) -> None:
        _inception(self._file)

    def __call__(self, samples: Tensor) -> Tensor:
        if samples.shape[1] not in (1, 3):
            raise ConfigError(f"Inception reads images of 1 or 3 channels: got samples {tuple(samples.shape[1:])}")
        levels = (samples.expand(-1, 3, -1, -1) * 255).round().to(torch.uint8)
        (found,) = _inception(self._file).to(samples.device)(levels)
        return found

    @property
    def _file(self) -> str:
        return self.weights or str(Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION)


@lru_cache(maxsize=2)
def _inception(file: str) -> nn.Module:
    """torch-fidelity's own network, with the weights of ``file``.

    Raises:
        ConfigError: no file, no package, or a file of something else.
    """
    if not Path(file).is_file():
        raise ConfigError(
            f"features = Inception needs {file!r}: expected torch-fidelity's weights {INCEPTION} there (from "
            "https://github.com/toshas/torch-fidelity/releases), their path as Inception(weights=...), or others"
        )
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError as error:
        raise ConfigError("features = Inception needs torch-fidelity: pip install 'rlfusion[fid]'") from error
    try:
        if file.endswith(".safetensors"):
            from safetensors.torch import load_file

            held = load_file(file)
        else:
            held = torch.load(file, map_location="cpu", weights_only=True)  # tensors alone: no code is run
        ours = io.BytesIO()  # the package reads whatever a file holds, and runs it; these bytes are our own
        torch.save(dict(held), ours)
        ours.seek(0)
        return FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path=ours)
    except Exception as error:  # whatever a wrong file brings about is one refusal
        raise ConfigError(f"{file!r} does not hold the weights of Inception: {shorten(error, 200)}") from error
