"""Small image classifiers: an MLP for rewards, and a ConvNet, of another architecture, that judges.

Both read pixels (B, C, H, W) in [0, 1], so that rewards can feed samples directly, and answer logits (B, classes);
``features`` is what the last linear layer reads, (B, ``width``).
"""

import math

from torch import Tensor, nn

from rlfusion.common.errors import ConfigError, unknown

SMALLEST = 8


class Classifier(nn.Module):
    """logits = head(body(2 x - 1)). Final: an architecture is a row of ``BODIES``."""

    def __init__(self, kind: str, shape: tuple[int, ...], classes: int) -> None:
        """``kind`` is a name in ``BODIES``, ``shape`` the (C, H, W) of the images.

        Raises:
            ConfigError: an unknown kind, a shape that is not (C, H, W) with H, W >= 8, or fewer than two classes.
        """
        super().__init__()
        if kind not in BODIES:
            raise unknown("kind of classifier", kind, BODIES)
        if len(shape) != 3 or min(shape[1:]) < SMALLEST:
            raise ConfigError(f"shape = {tuple(shape)}: expected (C, H, W) with H and W at least {SMALLEST}")
        if classes < 2:
            raise ConfigError(f"classes = {classes}: expected at least 2")
        self.kind, self.shape, self.classes = kind, tuple(shape), classes
        self.body, self.width = BODIES[kind](self.shape)
        self.head = nn.Linear(self.width, classes)

    def features(self, x: Tensor) -> Tensor:
        """Pixels (B, C, H, W) in [0, 1] -> (B, width).

        Raises:
            ConfigError: images of another shape than the classifier's.
        """
        if tuple(x.shape[1:]) != self.shape:
            raise ConfigError(f"images of shape {tuple(x.shape[1:])}: this {self.kind} classifier reads {self.shape}")
        return self.body(2 * x - 1)

    def forward(self, x: Tensor) -> Tensor:
        """Pixels (B, C, H, W) in [0, 1] -> logits (B, classes)."""
        return self.head(self.features(x))


def mlp_body(shape: tuple[int, ...]) -> tuple[nn.Module, int]:
    """Two hidden layers of 128; smooth, so that its log-probability has gradients everywhere."""
    width = 128
    layers = [nn.Flatten(), nn.Linear(math.prod(shape), width), nn.SiLU(), nn.Linear(width, width), nn.SiLU()]
    return nn.Sequential(*layers), width


def conv_body(shape: tuple[int, ...]) -> tuple[nn.Module, int]:
    """Three 3x3 convolutions, pooled to 4x4, then 32 features: few, so that some hundred images fix the covariance."""
    width, channels = 32, 32
    halved = [-(-side // 2) for side in shape[1:]]
    layers = [
        *(nn.Conv2d(shape[0], 16, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(16, channels, 3, padding=1, stride=2), nn.ReLU()),
        *(nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU()),
        nn.Identity() if halved == [4, 4] else nn.AdaptiveAvgPool2d(4),  # the pooling is slow even when it does nothing
        *(nn.Flatten(), nn.Linear(channels * 16, width), nn.ReLU()),
    ]
    return nn.Sequential(*layers), width


BODIES = {"mlp": mlp_body, "conv": conv_body}
