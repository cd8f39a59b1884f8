"""aesthetic(x) = h(f(x)): how much people like the image, as a head on a CLIP's embedding predicts. Differentiable.

h is linear, as in the first LAION predictor, or the layers of "improved aesthetic predictor" (v2, MLP), linear maps one
after another with no nonlinearity between them; which of the two it is, the file of its weights says:

    weight (1, d), bias (1,)                    linear           layers.0.weight, layers.2.weight, ...      MLP

The published heads answer about 1 to 10. Each belongs to one CLIP: by default OpenAI's ViT-L/14 and the MLP that ddpo
was shown with (sac+logos+ava1-l14-linearMSE).
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from torch import Tensor, nn

from rlfusion.common.errors import ConfigError
from rlfusion.common.tensors import Cond
from rlfusion.diffusion.denoiser import Precision
from rlfusion.rewards.clip.checkpoints import local_file, read_tensors
from rlfusion.rewards.clip.reward import ClipReward, Source

HEAD = "hf-hub:trl-lib/ddpo-aesthetic-predictor/aesthetic-model.pth"


class Aesthetic(ClipReward):
    """How much people like the image, as a head on a CLIP's embedding predicts. Differentiable.

    Args:
        model, checkpoint: the CLIP that the head was trained on, as ``openclip.load``.
        head: the file of the head's weights, or hf-hub:OWNER/REPO/FILE; or the widths of its layers, from the
            embedding's to 1, for a head whose weights are to come as a state dict.
        precision, resize_mode, batch, architecture: as ``clip.Source``.

    Raises:
        ConfigError: no head in the file, or one for embeddings of another width.
    """

    def __init__(
        self,
        model: str | None = "ViT-L-14-quickgelu",
        checkpoint: str = "openai",
        head: str | Sequence[int] = HEAD,
        precision: Precision = "float32",
        resize_mode: str = "",
        batch: int = 64,
        architecture: Mapping[str, Any] | None = None,
    ) -> None:
        layers = read_head(head) if isinstance(head, str) else _layers(head)
        source = Source(model, checkpoint, precision, resize_mode, batch, architecture, (3, 224, 224))
        clip = source.open()
        super().__init__(clip, source)
        self.head = layers.eval().requires_grad_(False)
        if self.head[0].in_features != clip.width:
            read = self.head[0].in_features
            raise ConfigError(f"head = {head!r} reads {read} numbers: the embeddings of {model!r} have {clip.width}")

    def blank(self) -> dict[str, Any]:
        """As ``Learned.blank``."""
        widths = [layer.in_features for layer in self.head] + [1]
        return super().blank() | {"model": "", "head": widths}

    def forward(self, samples: Tensor, cond: Cond) -> Tensor:
        """samples (B, C, H, W) in [0, 1] -> (B,); the condition is not looked at."""
        return self.head(self.features(samples))[:, 0]


def read_head(head: str) -> nn.Sequential:
    """The layers in a file of weights.

    Raises:
        ConfigError: no such file, or no layers that follow one another down to one number.
    """
    state = read_tensors(local_file(head, f"head = {head!r}"), f"head = {head!r}")
    names = sorted((name for name in state if name.endswith("weight")), key=_place)
    weights, biases = [state[n] for n in names], [state.get(f"{n.removesuffix('weight')}bias") for n in names]
    widths = [w.shape[1] for w in weights if w.ndim == 2] + [1]
    fits = [
        w.shape == (n, m) and b is not None and b.shape == (n,)
        for w, b, m, n in zip(weights, biases, widths, widths[1:])
    ]
    if not weights or len(widths) != len(weights) + 1 or not all(fits) or len(state) != 2 * len(names):
        shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
        raise ConfigError(f"head = {head!r} holds {shapes}: expected weight (1, d) and bias (1,), or such of layers.N")
    layers = _layers(widths)
    layers.load_state_dict(
        {f"{i}.{part}": t for part, ts in (("weight", weights), ("bias", biases)) for i, t in enumerate(ts)}
    )
    return layers


def _place(name: str) -> int:
    """The number in layers.N.weight; dropouts have one too, so that numbers are missing between layers."""
    digits = [word for word in name.split(".") if word.isdigit()]
    return int(digits[0]) if digits else 0


def _layers(widths: Sequence[int]) -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(m, n) for m, n in pairwise(widths)))
